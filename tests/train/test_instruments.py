"""A run logs its speed, its share of a known peak and its memory by kind; the arithmetic is counted."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.policies.tiny import random_batch, random_draws, random_policy
from tests.train.world import metrics, tiny
from vlafit.policies import build_family
from vlafit.train import run
from vlafit.train.batch_shape import BatchShape
from vlafit.train.flops import FlopCounter, peak_flops
from vlafit.train.instruments import Instruments
from vlafit.train.loop import StepResult
from vlafit.tuning import apply, load_strategy, preview

SHAPE = BatchShape(rows=1, cameras=2, tokens=12)


def test_the_products_that_are_counted_are_those_that_layers_make() -> None:
    """Each linear layer makes one product forward, and one for each gradient backward."""
    strategy = load_strategy("expert")
    policy = random_policy("pi0-tiny")
    apply(policy, strategy)
    counted = []

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], _: object) -> None:
        x, weight = inputs[0], layer.get_parameter("weight")
        products = 1 + x.requires_grad + weight.requires_grad if torch.is_grad_enabled() else 1
        places = x.numel() // weight.shape[1] if isinstance(layer, nn.Linear) else 2 * 4  # patches
        counted.append(products * 2 * places * weight.numel())

    for layer in policy.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    noise, time = random_draws(policy.config, rows=1, draws=1)
    policy.flow_loss(random_batch(policy.config, rows=1), noise, time)["loss"].backward()
    attention = sum(_attention(policy.config))
    bare = build_family("pi0", "pi0-tiny", {}, device="meta")
    assert FlopCounter(bare, preview(bare, strategy), draws=1)(SHAPE) == sum(counted) + attention


def _attention(c) -> list[int]:
    """Scores and sums forward are two products; a fused kernel's backward pass makes five."""
    patches, prefix, suffix = 4, 2 * 4 + 12, 1 + 4
    vision = c.vision.depth * 2 * 2 * 2 * patches * patches * c.vision.width  # two images
    heads = c.language.heads * c.language.head_dim
    language = (c.language.depth - 1) * 2 * 2 * prefix * prefix * heads  # the last layer only yields keys
    expert = c.language.depth * (2 + 5) * 2 * suffix * (prefix + suffix) * heads
    return [vision, language, expert]


@pytest.mark.slow
def test_arithmetic_grows_with_rows_and_shrinks_with_what_is_frozen_or_trimmed() -> None:
    bare = build_family("pi0", "pi0-tiny", {"vision.depth": 1, "language.depth": 1}, device="meta")
    full, expert = (FlopCounter(bare, preview(bare, load_strategy(s)), 1) for s in ("full", "expert"))
    assert full(BatchShape(3, 2, 12)) == 3 * full(SHAPE)
    assert max(expert(SHAPE), full(BatchShape(1, 1, 12))) < full(SHAPE)


def test_a_peak_is_given_or_known_and_never_guessed() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(2.5, cpu, "fp32") == 2.5e12
    assert peak_flops(0.0, cpu, "bf16") is None


def _step(seconds: float, waited: float, tokens: float = 0.0) -> StepResult:
    return StepResult(1, 1.0, 1.0, 1e-3, seconds, waited, False, tokens=tokens, shapes=(SHAPE, SHAPE))


def test_speed_is_a_mean_over_the_steps_since_the_last_log() -> None:
    instruments = Instruments(8, 1e12, lambda shape: 10**11)
    instruments.add(_step(1.0, 0.5, 100))
    instruments.add(_step(3.0, 0.5, 100))
    assert instruments.values() == {
        "train/samples_per_s": 4.0,
        "train/data_share": 0.25,
        "train/tokens_per_s": 50.0,
        "train/tflops_per_s": 0.1,
        "train/mfu": 0.1,
    }
    instruments.add(_step(2.0, 0.0))
    assert instruments.values()["train/samples_per_s"] == 4.0
    assert instruments.values() == {}


def test_without_a_peak_nothing_is_counted() -> None:
    def refuse(shape: BatchShape) -> int:
        raise AssertionError(shape)

    instruments = Instruments(8, None, refuse)
    instruments.add(_step(1.0, 0.0))
    assert set(instruments.values()) == {"train/samples_per_s", "train/data_share"}


def test_a_run_logs_speed_utilisation_and_memory_by_kind(card: Path, tmp_path: Path) -> None:
    short = {"steps": 4, "log_every": 2, "save_every": 0, "validate_every": 0, "report": True}
    run(tiny(card, train=short | {"peak_tflops": 0.01}), tmp_path / "run")
    steps = [event for event in metrics(tmp_path / "run") if "train/loss" in event]
    assert [event["step"] for event in steps] == [2, 4]
    for event in steps:
        assert event["train/mfu"] == pytest.approx(event["train/tflops_per_s"] / 0.01)
        assert event["train/tokens_per_s"] > event["train/samples_per_s"] > 0
        kinds = {name: size for name, size in event.items() if name.startswith("train/memory/")}
        assert sum(kinds.values()) == pytest.approx(event["train/peak_memory_gb"])
        assert kinds["train/memory/optimiser_gb"] == pytest.approx(
            2 * kinds["train/memory/gradients_gb"], rel=0.01
        )  # AdamW's two moments, and a count for each tensor
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("Model FLOPs utilisation", "optimiser states", "Waiting for data"):
        assert words in page
