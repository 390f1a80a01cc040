"""Optimiser steps in the backward pass: one gradient at a time, clipped by itself, the same when resumed."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train.world import metrics, tiny
from vlafit.errors import ConfigError, TrainingError
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.callbacks import Callbacks
from vlafit.train.experiment import Experiment
from vlafit.train.in_backward import StepInBackward
from vlafit.train.live_bytes import LiveBytes
from vlafit.train.loop import NotFinite
from vlafit.train.piecewise_adamw import PiecewiseAdamW
from vlafit.train.preflight import check

SHORT = {"steps": 4, "save_every": 2, "validate_every": 0}


class NoCheck:
    """The gradients of a module that is no policy."""

    def see(self, parameter: object) -> None:
        pass


def stepping(model: nn.Module, limit: float, lr: float = 1e-2) -> tuple[PiecewiseAdamW, StepInBackward]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    groups = [{"params": list(parameters), "names": list(names), "lr": lr, "weight_decay": 0.0}]
    optimizer = PiecewiseAdamW(groups, (0.9, 0.95), 1e-8, frees_gradients=True)
    return optimizer, StepInBackward(optimizer, limit, NoCheck())  # type: ignore[arg-type]


def model_of(depth: int = 2, width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])


def test_it_steps_as_after_the_backward_pass_and_reports_the_norm_of_all_gradients() -> None:
    one, other = model_of(), model_of()
    after = torch.optim.AdamW(one.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    _, within = stepping(other, 0.0)
    for step in range(3):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
        one(x).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(one.parameters(), math.inf)
        after.step()
        after.zero_grad()
        other(x).square().sum().backward()
        assert all(parameter.grad is None for parameter in other.parameters())
        gradients = within.finish()
        assert gradients.norm == pytest.approx(float(norm), rel=1e-6) and not gradients.fault
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    first, second = model_of(1), model_of(1)
    for model, scale in ((first, 1.0), (second, 3.0)):  # only what is clipped forgets the scale
        optimizer, within = stepping(model, 0.5)
        (scale * model(torch.ones(1, 32)).sum()).backward()
        norms = {
            n: float(optimizer.state[p]["exp_avg"].norm()) / (1 - 0.9) for n, p in model.named_parameters()
        }
        assert norms == pytest.approx({"0.weight": 0.5, "0.bias": 0.5}, rel=1e-4)
        # bias: 32 gradients of `scale`; weight: 1024
        assert within.finish().norm == pytest.approx(scale * math.sqrt(32 + 1024), rel=1e-6)


def test_closed_it_steps_no_more() -> None:
    model = model_of(1)
    _, within = stepping(model, 1.0)
    within.close()
    model(torch.ones(1, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradients_do_not_exist_side_by_side() -> None:
    model = model_of(8)
    numbers, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    assert _kept_by_backward(model) == 4 * numbers
    model.zero_grad()
    stepping(model, 1.0)
    assert _kept_by_backward(model) == 8 * numbers + 4 * tensors + 4 * tensors  # moments, counts, norms


def _kept_by_backward(model: nn.Module) -> int:
    """Bytes that a backward pass leaves behind."""
    loss = model(torch.ones(1, 32)).sum()
    with LiveBytes(model.parameters()) as live:
        loss.backward()
    return live.now


# --------------------------------------------------------------------------------------------------- runs


def within(card: Path, **sections: dict) -> Recipe:
    train, optim = sections.pop("train", {}), sections.pop("optim", {})
    return tiny(card, train=SHORT | train, optim={"in_backward": True} | optim, **sections)


def test_such_a_run_logs_the_norm_of_its_gradients_and_says_how_it_clips(card: Path, tmp_path: Path) -> None:
    recipe = within(card, train={"steps": 2}, policy={"config": {"max_tokens": 16}})  # all layers
    run(recipe, tmp_path / "run")
    logged = [event for event in metrics(tmp_path / "run") if "train/loss" in event]
    assert all(event["train/grad_norm"] > 0 for event in logged)
    # One tensor, not all of them.
    assert 0 < logged[-1]["train/memory/gradients_gb"] < 0.25 * logged[-1]["train/memory/weights_gb"]
    items = json.loads((tmp_path / "run" / "agreement.json").read_text())["items"]
    (line,) = [item for item in items if item["name"] == "gradient clipping"]
    assert line["status"] == "chosen" and "optim.clip_norm = 1" in line["sides"]["recipe"]


class Poison(Callbacks):
    """Makes one weight infinite after the second step."""

    def setup(self, experiment: Experiment) -> None:
        self.policy = experiment.policy

    def step(self, result, total: int, values: dict[str, float]) -> None:
        if result.step == 2:
            with torch.no_grad():
                self.policy.get_parameter("action_out_proj.weight").fill_(math.inf)


def test_a_gradient_that_is_not_finite_stops_at_the_last_checkpoint(card: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(NotFinite) as raised:
        run(within(card), out, callbacks=Poison())
    for fact in ("step 3", "samples (epoch, index) [(", "The gradient of ", "optim.in_backward",
                 "step_000002 is the last good checkpoint"):  # fmt: skip
        assert fact in str(raised.value)
    assert sorted(path.name for path in (out / "checkpoints").glob("step_*")) == ["step_000002"]


def test_a_tensor_without_a_gradient_is_named(card: Path, tmp_path: Path) -> None:
    class Cut(Callbacks):
        def setup(self, experiment: Experiment) -> None:
            experiment.policy.get_submodule("action_in_proj").register_forward_hook(
                lambda *args: args[2].detach()
            )

    with pytest.raises(TrainingError, match=r"action_in_proj\.weight"):
        run(within(card), tmp_path / "run", callbacks=Cut())


@pytest.mark.parametrize(
    ("sections", "processes", "facts"),
    [
        ({"train": {"accumulate": 2}}, 1, ["optim.in_backward", "train.accumulate", "2"]),
        ({"train": {"sharding": "full"}}, 1, ["optim.in_backward", "train.sharding", "'full'"]),
        ({}, 2, ["optim.in_backward", "one process", "2"]),
        ({"strategy": "adalora"}, 1, ["optim.in_backward", "AdaLoRA", "'adalora'"]),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    sections: dict, processes: int, facts: list[str], card: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        check(within(card, **sections), processes)
    assert all(fact in str(raised.value) for fact in facts)
