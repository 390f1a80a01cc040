"""Real-time chunking: LeRobot's recorded numbers, the paper's equations written out, and what it is for."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlafit.nn import flow
from vlafit.nn.guidance import Continuation, prefix_weights

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "lerobot_rtc" / "recorded.json").read_text())
SCHEDULES = {"ZEROS": "zeros", "ONES": "ones", "LINEAR": "linear", "EXP": "exponential"}
CHUNK = 8


@pytest.mark.parametrize(
    "case", RECORDED["cases"], ids=lambda c: f"{c['schedule']}-{c['delay']}-{c['horizon']}"
)
def test_weights_and_samples_are_lerobots(case: dict) -> None:
    weights = prefix_weights(SCHEDULES[case["schedule"]], case["delay"], case["horizon"], CHUNK)  # type: ignore[arg-type]
    # Weights of up to 1 round two or three times, by up to 2^-25 = 3e-8 each.
    assert torch.allclose(weights, torch.tensor(case["weights"]), rtol=0, atol=1e-7)
    weight, noise = torch.tensor(RECORDED["weight"]), torch.tensor(RECORDED["noise"])
    left = torch.zeros_like(noise)
    left[:, : CHUNK - 2] = torch.tensor(RECORDED["left"])
    continuation = Continuation(left, weights[None, :, None].expand_as(left), torch.full((2,), 10.0), False)
    velocity = continuation.guided(lambda x, t: torch.tanh(x @ weight) + t)
    # A step rounds sums of at most 8 terms of up to 4, and the correction multiplies their error by up to 10:
    # 10 * 8 * 4 * 2^-24 = 1.9e-5.
    got = flow.euler(velocity, noise, RECORDED["steps"])
    assert torch.allclose(got, torch.tensor(case["actions"]), rtol=0, atol=2e-5)


def test_the_correction_goes_through_the_network_as_in_the_paper() -> None:
    torch.manual_seed(1)
    weight = torch.randn(3, 3, dtype=torch.float64)
    x, left = torch.randn(1, CHUNK, 3, dtype=torch.float64), torch.randn(1, CHUNK, 3, dtype=torch.float64)
    weights = prefix_weights("exponential", 2, 6, CHUNK).double()[None, :, None].expand_as(left)

    def velocity(x: Tensor, time: float) -> Tensor:
        return torch.tanh(x @ weight) + time

    for time in (1.0, 0.7, 0.2):
        tau = 1 - time  # the paper's time, in which its velocity is minus ours
        clean = x + (1 - tau) * -velocity(x, time)
        jacobian = torch.autograd.functional.jacobian(lambda x, t=time: x - t * velocity(x, t), x).reshape(
            24, 24
        )
        correction = (weights * (left - clean)).reshape(24) @ jacobian
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        strength = 5.0 if tau == 0 else min(5.0, (1 - tau) / (tau * r2))
        wanted = -(-velocity(x, time) + strength * correction.reshape(x.shape))
        continuation = Continuation(left, weights, torch.tensor([5.0], dtype=torch.float64), True)
        # 5 times a sum of 24 products of up to 10, each rounded by 2^-53: 1.3e-13.
        assert torch.allclose(continuation.guided(velocity)(x, time), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("jacobian", [True, False])
def test_a_guided_chunk_begins_as_the_old_one_goes_on_and_ends_free(jacobian: bool) -> None:
    """Two modes, +1 and -1: unguided noise chooses either, a continuation keeps the one that was chosen."""

    def velocity(x: Tensor, time: float) -> Tensor:
        mean = x.mean((1, 2), keepdim=True)
        return (x - torch.tanh(8 * mean).expand_as(x)) / max(time, 0.05)

    noise = torch.randn(64, CHUNK, 2, generator=torch.Generator().manual_seed(0))
    free = flow.euler(velocity, noise, 20)
    assert 0.2 < (free[:, 0, 0] > 0).float().mean() < 0.8
    left = torch.ones_like(noise)
    weights = prefix_weights("exponential", 3, 6, CHUNK)[None, :, None].expand_as(left)
    continuation = Continuation(left, weights, torch.full((64,), 5.0), jacobian)
    held = flow.euler(continuation.guided(velocity), noise, 20)
    assert (held[:, :3] - 1).abs().mean() < 0.3 * (free[:, :3] - 1).abs().mean()


def test_weights_of_zero_change_nothing() -> None:
    noise = torch.randn(2, CHUNK, 3, generator=torch.Generator().manual_seed(0))
    nothing = Continuation(torch.ones_like(noise), torch.zeros_like(noise), torch.full((2,), 5.0), True)

    def velocity(x: Tensor, time: float) -> Tensor:
        return torch.tanh(x) * time

    assert torch.equal(flow.euler(nothing.guided(velocity), noise, 4), flow.euler(velocity, noise, 4))
