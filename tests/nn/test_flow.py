import math

import pytest
import torch

from vlafit.nn.flow import euler, interpolate, time_embedding, time_from_uniform


def test_times_are_beta_distributed_and_never_zero():
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = time_from_uniform(uniform)
    assert time.dtype == torch.float32
    assert float(time.min()) >= 0.001 and float(time.max()) <= 1.0
    scaled = (time - 0.001) / 0.999
    # Beta(1.5, 1): mean 0.6, variance 1.5 / (2.5^2 * 3.5), median 2^(-2/3). The mean of 200,000 is within
    # sqrt(0.069 / 200,000) = 6e-4, the variance within 1.6e-4, the median within 9e-4: at least 4 of each.
    assert float(scaled.mean()) == pytest.approx(0.6, abs=0.003)
    assert float(scaled.var()) == pytest.approx(1.5 / (2.5**2 * 3.5), abs=0.001)
    assert float(scaled.median()) == pytest.approx(2 ** (-2 / 3), abs=0.004)


def test_times_reach_from_just_above_zero_to_one():
    assert torch.equal(time_from_uniform(torch.tensor([0.0, 1.0]).double()), torch.tensor([0.001, 1.0]))


def test_the_time_embedding_is_sines_then_cosines_of_geometric_periods():
    got = time_embedding(torch.tensor([[0.37]]), 6)
    periods = [4e-3, 4e-3 * 1000**0.5, 4.0]
    angles = [2 * math.pi * float(torch.tensor(0.37)) / p for p in periods]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    assert got.shape == (1, 1, 6)
    torch.testing.assert_close(got[0, 0], torch.tensor(expected), atol=2**-24, rtol=0)  # one last bit


def test_time_one_is_noise_and_time_zero_the_actions():
    noise, actions = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    x = interpolate(actions, noise, torch.tensor([1.0, 0.0]))
    assert torch.equal(x[0], noise[0])
    assert torch.equal(x[1], actions[1])


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_follows_a_straight_path_exactly_and_ends_at_the_actions(steps: int):
    noise, actions = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    times = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        times.append(t)
        return noise - actions

    # The velocity rounds once and x in every step, each a number of up to twice the largest.
    bound = 2 * (steps + 1) * 2**-24 * float(torch.stack([noise, actions]).abs().max())
    torch.testing.assert_close(euler(velocity, noise, steps), actions, atol=min(bound, 1e-5), rtol=0)
    assert times == [1 - i / steps for i in range(steps)]
