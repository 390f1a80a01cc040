"""Record one episode of the expert, optionally with random pushes on the hand; labels stay unperturbed."""

import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlafit import envs
from vlafit.datasets.card import RecordSpec
from vlafit.errors import ConfigError, nearest
from vlafit.types import Env, EpisodeKey, Observation

BURST_CHANCE = 0.06  # probability that a push starts at a step without one
BURST_STEPS = (4, 13)  # length of a push in steps: from 4 to 12
PUSH_STREAM = 0x9E3779B9  # separates these random numbers from those of rollouts with the same seed


@dataclass(eq=False)
class Episode:
    """An episode of t steps: state [t, s], actions [t, a], success so far [t], images [t, h, w, 3]."""

    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    success: NDArray[np.bool_]
    images: dict[str, NDArray[np.uint8]]
    kept: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Values of the simulator [t, ...], by the dataset that keeps them."""


def is_perturbed(spec: RecordSpec, seed: int) -> bool:
    """Return whether the episode of `seed` is perturbed: a share `spec.perturbed`, evenly spread."""
    index = seed - spec.first_seed
    return int((index + 1) * spec.perturbed + 1e-9) > int(index * spec.perturbed + 1e-9)


def pushes(spec: RecordSpec, task: str, seed: int, steps: int) -> NDArray[np.float32]:
    """Return the offsets added to x, y, z of the executed actions, [steps, 3]; labels stay unperturbed.

    A push is one normal draw (std `spec.noise`) held for a few steps, so that the hand leaves the expert's
    path and the recording shows the expert's recovery. All zeros for episodes that are not perturbed.
    """
    offsets = np.zeros((steps, 3), np.float32)
    if not is_perturbed(spec, seed):
        return offsets
    rng = np.random.default_rng([seed, zlib.crc32(task.encode()), PUSH_STREAM])
    step = 0
    while step < steps:
        if rng.random() < BURST_CHANCE:
            until = min(step + int(rng.integers(*BURST_STEPS)), steps)
            offsets[step:until] = rng.normal(0, spec.noise, 3)
            step = until
        step += 1
    return offsets


def disturbed(
    actions: NDArray[np.float32], offsets: NDArray[np.float32], control: str
) -> NDArray[np.float32]:
    """Return the actions [t, a] as executed: with offsets [t, 3] added to their position, as far as it goes.

    Displacements stay within [-1, 1]; the simulation keeps absolute positions within its board.
    """
    executed = actions.copy()
    positions = min(3, actions.shape[1])
    executed[:, :positions] += offsets[:, :positions]
    if control != "absolute_position":
        executed[:, :3] = np.clip(executed[:, :3], -1, 1)
    return executed


def play(env: Env, spec: RecordSpec, task: str, seed: int) -> Episode | None:
    """Run one episode of the expert; None if it does not succeed within `spec.horizon` steps."""
    expert = envs.expert(spec.env)
    max_steps = spec.horizon + spec.hold_steps
    offsets = pushes(spec, task, seed, max_steps)
    observation = env.reset(task, seed)
    states, actions, successes = [], [], []
    images: dict[str, list[NDArray[np.uint8]]] = {camera.name: [] for camera in env.embodiment.cameras}
    kept: dict[str, list[NDArray]] = {dataset: [] for dataset in spec.keep}
    end = spec.horizon  # steps; extended at the first success
    succeeded = False
    for step in range(max_steps):
        label = expert.act([observation], [EpisodeKey(seed, task, step)])[0].actions[0]
        states.append(observation.state)
        actions.append(label)
        for name, frames in images.items():
            frames.append(observation.images[name])
        for dataset, values in kept.items():
            values.append(_privileged(observation, spec.keep[dataset]))
        executed = disturbed(label[None], offsets[step][None], env.embodiment.control)[0]
        before = succeeded
        observation, succeeded, _ = env.step(executed, render=not (succeeded and step + 1 >= end))
        successes.append(succeeded)
        if succeeded and not before:
            end = step + 1 + spec.hold_steps
        if step + 1 >= end:
            break
    if not succeeded:
        return None
    return Episode(
        np.stack(states),
        np.stack(actions),
        np.array(successes),
        {name: np.stack(frames) for name, frames in images.items()},
        {dataset: np.stack(values) for dataset, values in kept.items()},
    )


def _privileged(observation: Observation, name: str) -> NDArray:
    """Return a value of the simulator, or raise ConfigError naming those that it has."""
    if name not in observation.privileged:
        listed = ", ".join(observation.privileged) or "none"
        near = nearest(name, observation.privileged)
        raise ConfigError(f"record.keep: the simulator reports no value {name!r}{near}; it has: {listed}")
    return np.array(observation.privileged[name])
