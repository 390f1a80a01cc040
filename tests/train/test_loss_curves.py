"""Training with bf16 weights, and with steps in the backward pass, follows fp32's loss curve.

Over 100 steps in `make test`, over 200 in `make test-all`.

The bound is a share of the progress L(0) - L(t), and the sum of:
- that of bf16 products. An update's relative error is its gradient's, whose path through the policy is
  rounded once for each product, forward and backward: `drift(2^-8, ROUNDINGS, 1)`.
- that of stochastic rounding. A step rounds a weight with a variance of at most |update| * ulp <= lr * ulp,
  so t steps move it by a random walk of sqrt(t * lr * ulp), where updates move it by t * lr. Errors of N
  weights are independent, and progress is their sum: a share of sqrt(ulp / (t * lr * N)), times five for
  five sigmas. Embeddings do not count, because most words do not occur.
- that of 8-bit moments, where they are used: 0.002 of the first loss, as in `test_memory_ladder.py`.
"""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.rounding import drift, unit_roundoff
from tests.variants import variants
from vlafit.nn.batch import Batch
from vlafit.nn.policy import Policy
from vlafit.nn.rng import sample_rng
from vlafit.policies import build_family
from vlafit.recipe import OptimRecipe
from vlafit.train import piecewise_adamw
from vlafit.train.forecast import full_batch
from vlafit.train.frozen import narrow_names
from vlafit.train.gradients import GradientCheck
from vlafit.train.in_backward import StepInBackward
from vlafit.train.optim import begin_step, build_optimizer
from vlafit.train.piecewise_adamw import PiecewiseAdamW
from vlafit.tuning import apply, load_strategy, preview

# One layer of each tower; one tensor is large enough for moments in 8 bits.
CONFIG = {"max_tokens": 8, "vision.depth": 1, "language.depth": 1, "expert.mlp": 512}
ROUNDINGS = 2 * 4 * (1 + 1 + 1)  # forward and backward, four products a layer: tests/rounding.py
LR, ROWS, DRAWS = 2e-4, 2, 8  # most updates are below half the distance to the next bf16 number
LOOKS = (50, 100, 150, 200)
KINDS = {
    "bf16 weights": {"weights": "bf16"},
    "in the backward pass": {"in_backward": True},
    "both, and 8-bit moments": {"weights": "bf16", "in_backward": True, "states": "8bit"},
}

Curve = dict[int, float]


def policy_of() -> Policy:
    return build_family("pi0", "pi0-tiny", CONFIG, torch.Generator().manual_seed(0))


def batch_of(policy: Policy, seed: int) -> Batch:
    rng, values = torch.Generator().manual_seed(seed), {}
    for name, value in full_batch(policy.needs(), ROWS, 1, 0).present().items():
        if value.dtype is torch.bool:
            values[name] = torch.ones(value.shape, dtype=torch.bool)
        elif value.is_floating_point():
            values[name] = torch.randn(value.shape, generator=rng)
        else:
            values[name] = torch.randint(0, 4, value.shape, generator=rng).to(value.dtype)
    return Batch(**values)


def loss_of(policy: Policy, batch: Batch, draw: int) -> Tensor:
    (loss,) = policy(batch, sample_rng([(0, row) for row in range(ROWS)], seed=draw)).values()
    return loss / (ROWS * policy.needs().chunk * policy.needs().action_dim)


def train(steps: int, *, weights: str = "fp32", states: str = "fp32", in_backward: bool = False) -> Curve:
    """Return the loss in fp32, over all batches and draws, before training and after some of the steps."""
    policy, judge, strategy = policy_of(), policy_of(), load_strategy("full")
    batches, bf16 = [batch_of(policy, seed) for seed in range(2)], weights == "bf16"
    for name in narrow_names(policy, preview(policy, strategy), frozen=bf16, trained=bf16):
        policy.get_parameter(name).data = policy.get_parameter(name).data.to(torch.bfloat16)
    plan = apply(policy, strategy)
    recipe = OptimRecipe(lr=LR, states=states, in_backward=in_backward)  # type: ignore[arg-type]
    optimizer = build_optimizer(policy, plan, recipe, seed=1)
    if in_backward:  # without clipping, which differs by intent
        assert isinstance(optimizer, PiecewiseAdamW)
        StepInBackward(optimizer, 0.0, GradientCheck(policy, plan, plan.trainable))
    policy.train()
    curve = {0: evaluate(judge, policy, batches)}
    for step in range(steps):
        begin_step(optimizer, step, 1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(policy, batches[step % 2], step % DRAWS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in LOOKS:
            curve[step + 1] = evaluate(judge, policy, batches)
    return curve


@torch.no_grad()
def evaluate(judge: Policy, policy: Policy, batches: list[Batch]) -> float:
    for own, trained in zip(judge.parameters(), policy.parameters(), strict=True):
        own.copy_(trained)
    losses = [loss_of(judge, batch, draw) for batch in batches for draw in range(DRAWS)]
    return float(sum(losses)) / len(losses)


def bound(fp32: Curve, step: int, states: str) -> float:
    policy = policy_of()
    matrices = [p for n, p in policy.named_parameters() if p.ndim >= 2 and "embed" not in n]
    numbers = sum(p.numel() for p in matrices)
    ulp = 2 * unit_roundoff(torch.bfloat16) * max(float(p.detach().abs().max()) for p in matrices)
    products = drift(unit_roundoff(torch.bfloat16), ROUNDINGS, 1.0)
    rounding = 5 * math.sqrt(ulp / (step * LR * numbers))
    moments = 0.002 * fp32[0] if states == "8bit" else 0.0
    return (products + rounding) * (fp32[0] - fp32[step]) + moments


@cache
def fp32_of(steps: int) -> Curve:
    curve = train(steps)
    assert curve[0] - curve[steps] > 0.05 * curve[0]
    return curve


@pytest.mark.parametrize("steps", variants([100, 200], always=[100]))
@pytest.mark.parametrize("kind", variants(KINDS, always=["both, and 8-bit moments"]))
def test_the_loss_follows_fp32(kind: str, steps: int) -> None:
    curve, fp32 = train(steps, **KINDS[kind]), fp32_of(steps)
    for step in LOOKS[: LOOKS.index(steps) + 1]:
        assert abs(curve[step] - fp32[step]) < bound(fp32, step, KINDS[kind].get("states", "")), step


@pytest.mark.slow  # a variant; test_bf16_weights.py always tests that rounding to nearest loses updates
def test_rounded_to_nearest_the_loss_does_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32 = fp32_of(200)
    nearest: Callable[[Tensor, Tensor], Tensor] = lambda values, _: values.to(torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(piecewise_adamw, "round_stochastically", nearest)
    assert train(50, weights="bf16")[50] - fp32[50] > bound(fp32, 50, "fp32")
