"""Trained weights in bfloat16: rounded stochastically, without a bias, and the same in a resumed run."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.train.test_interruptions import Interrupted, Until, crash
from tests.train.world import assert_same, learned, losses, tiny
from tests.variants import variants
from vlafit.checkpoints import stored_as
from vlafit.errors import ConfigError
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.train import piecewise_adamw, run
from vlafit.train.ema import Ema
from vlafit.train.experiment import build
from vlafit.train.piecewise_adamw import PiecewiseAdamW
from vlafit.train.stochastic_rounding import RoundingBits, round_stochastically

CPU = torch.device("cpu")
NUMBERS = 2**16
ULP = 2.0**-7  # from 1 to 2: the distance of neighbours in bfloat16
SIGMAS = 5  # a correct generator is outside once in 1.7 million


def bits(seed: int = 0, step: int = 0, name: str = "w", numbers: int = NUMBERS) -> Tensor:
    return RoundingBits(seed, step, name, CPU).draw(numbers)


# ---------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_mean_of_roundings_is_the_number(share: float, sign: float) -> None:
    # A rounding takes the upper neighbour with probability `share`: a variance of share (1 - share) ULP^2.
    value = sign * (1 + share * ULP)
    bound = SIGMAS * ULP * math.sqrt(share * (1 - share) / NUMBERS)
    rounded = round_stochastically(torch.full((NUMBERS,), value), bits())
    assert rounded.dtype is torch.bfloat16
    assert set(rounded.float().tolist()) == {sign, sign * (1 + ULP)}
    assert abs(float(rounded.double().mean()) - value) < bound
    nearest = torch.tensor(value).to(torch.bfloat16)
    assert abs(float(nearest) - value) > bound


def test_what_bfloat16_holds_stays_and_what_is_not_finite_stays_so() -> None:
    held = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert torch.equal(round_stochastically(held.float(), bits()), held)
    quiet = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # a GPU's NaN, and -NaN
    odd = torch.cat((quiet, torch.tensor([math.inf, -math.inf])))
    rounded = round_stochastically(odd, torch.full((4,), 2**16 - 1, dtype=torch.int32))
    assert rounded[:2].isnan().all() and rounded[2:].tolist() == [math.inf, -math.inf]


def test_random_bits_belong_to_seed_step_and_tensor() -> None:
    assert torch.equal(bits(), bits())
    assert 0 <= int(bits().min()) < 16 and 2**16 - 16 <= int(bits().max()) < 2**16
    for other in (bits(seed=1), bits(step=1), bits(name="v")):
        assert (other == bits()).float().mean() < 0.01
    assert torch.equal(bits(numbers=1001), bits()[:1001])


# --------------------------------------------------------------------------------------------- optimiser


def stepped(
    start: float, lr: float, steps: int, states: str = "fp32", numbers: int = NUMBERS, dtype=torch.bfloat16
) -> Tensor:
    """Weights after steps of AdamW whose gradients are all 1, so that each is an update of `lr`."""
    weights = nn.Parameter(torch.full((numbers // 256, 256), start, dtype=dtype))
    groups = [{"params": [weights], "names": ["w"], "lr": lr, "weight_decay": 0.0}]
    optimizer = PiecewiseAdamW(groups, (0.9, 0.95), 1e-8, states=states)  # type: ignore[arg-type]
    for step in range(steps):
        optimizer.number = step
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    return weights.detach()


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_updates_below_half_the_distance_to_the_neighbour_move_weights_on_average(
    states: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lr, steps = ULP / 20, 10
    # Each step rounds with a variance of at most lr * ULP; the update is lr to the moments' precision.
    bound = SIGMAS * math.sqrt(steps * lr * ULP / NUMBERS) + (0.02 * steps * lr if states == "8bit" else 0)
    moved = float(stepped(1.5, lr, steps, states).double().mean())
    assert abs(moved - (1.5 - steps * lr)) < bound
    monkeypatch.setattr(piecewise_adamw, "round_stochastically", lambda values, _: values.to(torch.bfloat16))
    assert torch.equal(stepped(1.5, lr, steps, states), torch.full((NUMBERS // 256, 256), 1.5).bfloat16())
    assert bound < steps * lr / 2  # rounding to nearest is far outside


def test_fp32_weights_and_moments_train_as_with_torchs_fused_adamw() -> None:
    plain = nn.Parameter(torch.full((4, 256), 1.5))
    optimizer = torch.optim.AdamW([plain], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    for _ in range(5):
        plain.grad = torch.ones_like(plain)
        optimizer.step()
    assert torch.equal(stepped(1.5, 1e-2, 5, numbers=1024, dtype=torch.float32), plain.detach())


def test_the_size_of_the_pieces_changes_no_byte_of_bf16_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stepped(1.5, 1e-3, 3, "8bit")
    monkeypatch.setattr(piecewise_adamw, "PIECE", 1024)
    assert torch.equal(stepped(1.5, 1e-3, 3, "8bit"), whole)


def test_the_average_of_bf16_weights_is_kept_in_fp32() -> None:
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    ema = Ema(layer, 0.999)
    with torch.no_grad():
        layer.weight += 1
    ema.update()
    assert {average.dtype for average in ema.average.values()} == {torch.float32}
    moved = ema.average["weight"] - (layer.weight.float() - 1)
    assert moved.abs().max() > 0
    with ema.applied():
        assert layer.weight.dtype is torch.bfloat16


# --------------------------------------------------------------------------------------------------- runs


def narrow(card: Path, optim: Mapping[str, object], **train: object) -> Recipe:
    short = {"precision": "bf16", "weights": "bf16", "steps": 4, "save_every": 2, "validate_every": 0}
    recipe = tiny(card, optim=dict(optim), train=short | train)
    config = {"max_tokens": 16, "language.mlp": 256}  # so that there is a tensor with 8-bit moments
    return replace(recipe, policy=replace(recipe.policy, config=config))


OPTIMISERS = {
    "plain": {},
    "8-bit moments": {"states": "8bit"},
    "in the backward pass": {"in_backward": True},
    "both": {"states": "8bit", "in_backward": True},
}


@pytest.mark.parametrize("kind", variants(OPTIMISERS, always=["both"]))
def test_a_run_of_bf16_weights_goes_on_bit_for_bit(kind: str, card: Path, tmp_path: Path) -> None:
    recipe = narrow(card, OPTIMISERS[kind])
    run(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "pieces", callbacks=Until(3, crash))
    run(recipe, tmp_path / "pieces", resume=True)
    saved = learned(tmp_path / "whole", 4)
    assert_same(learned(tmp_path / "pieces", 4), saved)
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    kept = {name.partition("/")[2]: t for name, t in saved.items() if name.startswith("weight/")}
    matrices = [n for n, t in kept.items() if t.dtype is torch.bfloat16]
    assert matrices and all(kept[name].ndim >= 2 for name in matrices)
    assert all(t.dtype is torch.float32 for n, t in saved.items() if n.startswith(("ema/", "adamw.exp_avg/")))


def test_which_weights_are_bf16_and_that_a_checkpoints_are_rounded_is_a_line(card: Path, base: Path) -> None:
    recipe = tiny(card, strategy="expert", train={"precision": "bf16", "frozen": "fp32", "weights": "bf16"})
    made = build(replace(recipe, policy=PolicyRecipe(checkpoint=str(base))), CPU)
    trained = {entry.name: entry for entry in made.plan.entries if entry.trainable}
    wanted = {
        info.name: stored_as(info, torch.bfloat16)
        if info.name in trained and len(trained[info.name].shape) >= 2
        else torch.float32
        for info in made.policy.parts()
    }
    assert {name: p.dtype for name, p in made.policy.named_parameters()} == wanted
    assert made.agreement is not None
    (line,) = [item for item in made.agreement.items if item.value == "bfloat16"]
    count = list(wanted.values()).count(torch.bfloat16)
    assert (line.name, line.status) == ("trained weights", "chosen")
    assert f"{count} tensors" in line.sides["checkpoint"] and "train.weights" in line.reason


@pytest.mark.parametrize(
    ("train", "facts"),
    [
        ({"precision": "fp32"}, ["train.weights", "train.precision", "bf16"]),
        ({"sharding": "full"}, ["train.weights", "train.sharding", "'full'"]),
    ],
)
def test_where_bf16_weights_cannot_be_kept_they_are_refused(
    train: dict[str, str], facts: list[str], card: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        run(narrow(card, {}, **train), tmp_path / "run")
    assert all(fact in str(raised.value) for fact in facts)
    assert not (tmp_path / "run").exists()
