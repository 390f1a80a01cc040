"""Random numbers are decided by what names a row, and by nothing else."""

import numpy as np
import torch

from vlafit.nn.rng import VALIDATION, SampleRng, rollout_rng, sample_rng
from vlafit.policies import pi0
from vlafit.types import EpisodeKey


def test_the_draws_of_a_sample_do_not_depend_on_the_rest_of_the_batch():
    both, alone = sample_rng([(0, 5), (1, 2)], seed=1), sample_rng([(1, 2)], seed=1)
    assert both.uniform(2)[1:].equal(alone.uniform(2))
    assert both.normal(2, 4, 3)[1:].equal(alone.normal(2, 4, 3))


def test_seed_epoch_index_and_stream_each_change_the_draws():
    first = sample_rng([(1, 2)], seed=1).normal(4, 3)
    others = [
        sample_rng([key], seed=seed, stream=stream).normal(4, 3)
        for key, seed, stream in (((0, 2), 1, 0), ((1, 3), 1, 0), ((1, 2), 2, 0), ((1, 2), 1, VALIDATION))
    ]
    assert not any(other.equal(first) for other in others)


def test_shapes_and_dtypes_are_those_that_are_asked_for():
    rng = sample_rng([(0, 0), (0, 1), (0, 2)], seed=0, draws=4)
    assert (len(rng), rng.draws) == (3, 4)
    assert rng.normal(2, 5).shape == (3, 2, 5) and rng.normal().dtype == torch.float32
    assert rng.uniform().shape == (3,) and rng.uniform().dtype == torch.float64


def test_noise_and_time_of_a_flow_policy_are_those_of_recorded_runs():
    # Drawn as every run so far did it: for each row k times, then k chunks of noise, from one generator.
    policy = pi0.build(pi0.SIZES["pi0-tiny"])
    noise, time = policy.draw(sample_rng([(0, 5), (1, 2)], seed=1, draws=2))
    chunk, action_dim = policy.config.chunk, policy.config.action_dim
    assert noise.shape == (2, 2, chunk, action_dim) and time.shape == (2, 2)
    for row, (epoch, index) in enumerate([(0, 5), (1, 2)]):
        generator = np.random.Generator(np.random.Philox(key=[1, index], counter=[0, 0, epoch, 0]))
        times = torch.from_numpy(generator.random(2) ** (1 / 1.5) * 0.999 + 0.001).float()
        # Powers in float64 may differ in their last bit, and so may their rounding to float32: by 2^-23.
        torch.testing.assert_close(time[:, row], times, rtol=2**-23, atol=0.0)
        values = generator.standard_normal((2, chunk, action_dim), np.float32)
        assert noise[:, row].equal(torch.from_numpy(values))


def rollout_noise(key: EpisodeKey, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return rollout_rng([key], seed=seed).normal(*shape)[0]


def test_noise_of_rollouts_is_decided_by_seed_task_episode_and_replan():
    key = EpisodeKey(7, "open", 2)
    first = rollout_noise(key, 0, (4, 5))
    assert first.equal(rollout_noise(key, 0, (4, 5)))
    others = [
        rollout_noise(EpisodeKey(8, "open", 2), 0, (4, 5)),
        rollout_noise(EpisodeKey(7, "close", 2), 0, (4, 5)),
        rollout_noise(EpisodeKey(7, "open", 3), 0, (4, 5)),
        rollout_noise(key, 1, (4, 5)),
    ]
    assert not any(first.equal(other) for other in others)
    many = torch.cat([rollout_noise(EpisodeKey(s, "open", 0), 0, (50, 32)) for s in range(50)])
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_noise_of_rollouts_is_the_same_in_every_process():
    # Written down once; Python's own hash() would differ from process to process.
    written = [1.2458081245422363, 0.3818911015987396, 1.6331292390823364]
    assert rollout_noise(EpisodeKey(7, "open", 2), 0, (1, 3))[0].tolist() == written


def test_two_calls_draw_different_numbers():
    rng: SampleRng = sample_rng([(0, 0)], seed=0)
    assert not rng.normal(4).equal(rng.normal(4))
