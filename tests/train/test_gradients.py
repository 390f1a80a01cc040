"""The run looks at its own gradients: what is to learn but cannot ends the run at once, by name."""

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.world import tiny
from tests.tuning.toy import ToyPolicy
from tests.variants import variants
from vlafit import tuning
from vlafit.errors import TrainingError
from vlafit.nn.batch import Batch
from vlafit.nn.policy import ParameterInfo
from vlafit.nn.rng import sample_rng
from vlafit.policies import pi0
from vlafit.train import run
from vlafit.train.gradients import GradientCheck

RULES = {
    "all": [{"mode": "full"}],
    "lora": [
        {"select": {"part": "vision", "kind": "conv"}, "mode": "lora", "rank": 2},
        {"select": {"part": ["language", "expert"], "kind": ["attention", "mlp"]}, "mode": "lora", "rank": 2},
        {"mode": "frozen"},
    ],
    "lora below a closed door": [  # the norms of a fresh pi0.5 expert are zero, and so is LoRA's B
        {"select": {"part": "expert", "kind": "norm"}, "mode": "full"},
        {"select": {"part": ["language", "expert"], "kind": ["attention", "mlp"]}, "mode": "lora", "rank": 2},
        {"mode": "frozen"},
    ],
}


class Careless(ToyPolicy):
    """Says of nothing that it is dead."""

    def parts(self) -> list[ParameterInfo]:
        return [replace(info, dead=False) for info in super().parts()]


def batch(config: pi0.Pi0Config, cameras: bool = True) -> Batch:
    rng, size = torch.Generator().manual_seed(0), config.vision.image_size
    return Batch(
        images=torch.rand(2, 1, 3, size, size, generator=rng),
        image_mask=torch.full((2, 1), cameras),
        tokens=torch.randint(0, config.language.vocab, (2, 4), generator=rng),
        token_mask=torch.ones(2, 4, dtype=torch.bool),
        state=torch.randn(2, config.state_dim, generator=rng),
        actions=torch.randn(2, config.chunk, config.action_dim, generator=rng),
        action_mask=torch.ones(2, config.chunk, config.action_dim, dtype=torch.bool),
    )


def steps(
    policy: pi0.Pi0, plan: tuning.Plan, feed: Callable[[int], Batch], count: int = 3, new: bool = True
) -> None:
    """Train for some steps, with a check of its gradients in each."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    check = GradientCheck(policy, plan, plan.trainable if new else ())
    for step in range(1, count + 1):
        rng = sample_rng([(0, 0), (0, 1)], seed=step)
        policy.loss(feed(step).trim(), rng)["error"].backward()
        check.look(step)
        optimizer.step()
        optimizer.zero_grad()


def taught(size: str, rules: str) -> tuple[pi0.Pi0, tuning.Plan]:
    policy = pi0.build(pi0.SIZES[size], "cpu")
    return policy, tuning.apply(policy, tuning.parse(RULES[rules], name="rules", where="here"))


@pytest.mark.parametrize("size", ["pi0-tiny", "pi05-tiny"])
@pytest.mark.parametrize("rules", ["all", "lora below a closed door"])
def test_what_can_learn_passes(size: str, rules: str) -> None:
    policy, plan = taught(size, rules)
    steps(policy, plan, lambda _: batch(policy.config))


def test_lora_learns_in_pi0_and_not_behind_the_closed_norms_of_a_fresh_pi05() -> None:
    policy, plan = taught("pi0-tiny", "lora")
    steps(policy, plan, lambda _: batch(policy.config))
    policy, plan = taught("pi05-tiny", "lora")
    with pytest.raises(TrainingError, match="frozen matrices are zero.* expert.*norm") as error:
        steps(policy, plan, lambda _: batch(policy.config))
    (missing,) = tomllib.loads(str(error.value).split("if there are stages):")[1].split("Otherwise")[0])[
        "rule"
    ]
    policy = pi0.build(pi0.SIZES["pi05-tiny"], "cpu")
    rules = [missing, *RULES["lora"]]
    plan = tuning.apply(policy, tuning.parse(rules, name="rules", where="here"))
    steps(policy, plan, lambda _: batch(policy.config))


@pytest.mark.parametrize("size", variants(["pi0-tiny", "pi05-tiny"], always=["pi05-tiny"]))
@pytest.mark.parametrize("preset", variants(["progressive", "progressive-lora"], always=["progressive"]))
def test_the_progressive_presets_train_a_fresh_expert_through_all_their_stages(
    preset: str, size: str, card: Path, tmp_path: Path
) -> None:
    recipe = tiny(card, strategy=preset, train={"steps": 20, "validate_every": 0, "save_every": 0})
    recipe = replace(recipe, policy=replace(recipe.policy, size=size, config={"max_tokens": 32}))
    assert run(recipe, tmp_path / "run").finished


def test_what_the_loss_does_not_reach_is_named_after_the_first_backward_pass() -> None:
    torch.manual_seed(0)
    policy = Careless()
    plan = tuning.apply(policy, tuning.parse(RULES["all"], name="rules", where="here"))  # type: ignore[arg-type]
    policy(torch.randn(2, 3, 4, 4), torch.tensor([1, 2])).square().sum().backward()
    with pytest.raises(TrainingError) as error:
        GradientCheck(policy, plan, ()).look(1)
    message = str(error.value)
    assert "depend on 2 of the" in message and 'mode = "frozen"' in message
    assert "  language, mlp: 2 tensors, language.2.mlp.weight, language.2.mlp.bias" in message


def test_cameras_may_be_missing_for_two_steps_and_not_for_three() -> None:
    policy, plan = taught("pi0-tiny", "all")
    steps(policy, plan, lambda step: batch(policy.config, cameras=step == 3))
    policy, plan = taught("pi0-tiny", "all")
    with pytest.raises(TrainingError, match="zero in the first 3 steps") as error:
        steps(policy, plan, lambda _: batch(policy.config, cameras=False))
    message = str(error.value)
    assert "vision, conv: 2 tensors" in message and "language" not in message and "a camera" in message
    policy, plan = taught("pi0-tiny", "all")
    steps(policy, plan, lambda _: batch(policy.config, cameras=False), new=False)  # they learned before


def test_steps_without_demonstrations_do_not_count() -> None:
    policy, plan = taught("pi05-tiny", "all")
    nothing = replace(batch(policy.config), action_mask=torch.zeros_like(batch(policy.config).action_mask))

    def train(steps: dict[int, Batch], last: int) -> None:
        check = GradientCheck(policy, plan, plan.trainable)
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
        for step in range(1, last + 1):
            policy(steps.get(step, nothing), sample_rng([(0, 0), (0, 1)], seed=step))["error"].backward()
            check.look(step, is_whole=step in steps)
            optimizer.step()
            optimizer.zero_grad()

    train({7: batch(policy.config), 9: batch(policy.config), 12: batch(policy.config)}, 12)
    policy, plan = taught("pi05-tiny", "all")
    dark = batch(policy.config, cameras=False)
    with pytest.raises(TrainingError, match="zero in the first 3 steps, not counting 2 without") as error:
        train({2: dark, 3: dark, 5: dark}, 5)
    assert "vision, conv: 2 tensors" in str(error.value)


def test_a_run_that_began_in_the_midst_of_the_three_steps_is_not_judged() -> None:
    policy, plan = taught("pi0-tiny", "all")
    check = GradientCheck(policy, plan, plan.trainable)
    check.look(2)
    check.look(3)


def test_a_run_whose_projections_lie_behind_closed_norms_ends_and_says_so(card: Path, tmp_path: Path) -> None:
    fresh = {"family": "pi0", "size": "pi05-tiny", "config": {"max_tokens": 40}}
    with pytest.raises(TrainingError, match=r"4 of the 8 .*\n  projections, linear: 4 .*time_mlp_in"):
        run(tiny(card, strategy="projections", policy=fresh), tmp_path / "run")
    assert run(
        tiny(card, strategy="progressive", policy=fresh, train={"steps": 10}), tmp_path / "all"
    ).finished
