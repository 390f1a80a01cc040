"""One recorded episode: the expert plays, something may push the hand, and the labels stay clean."""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit import envs
from vlafit.datasets.card import RecordSpec
from vlafit.types import Env, EpisodeKey

BURST_CHANCE = 0.06  # a step's chance that a push begins, when none lasts
BURST_STEPS = (4, 13)  # a push lasts this many steps: from, to below
PUSH_STREAM = 0x9E3779B9  # sets these draws apart from those of rollouts with the same seed


@dataclass(eq=False)
class Episode:
    """An episode of t steps: state [t, s], actions [t, a], success so far [t], images [t, h, w, 3]."""

    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    success: NDArray[np.bool_]
    images: dict[str, NDArray[np.uint8]]


def is_perturbed(spec: RecordSpec, seed: int) -> bool:
    """Return whether the episode of `seed` is disturbed: evenly spread, `spec.perturbed` of all."""
    at = seed - spec.first_seed
    return int((at + 1) * spec.perturbed + 1e-9) > int(at * spec.perturbed + 1e-9)


def pushes(spec: RecordSpec, task: str, seed: int, steps: int) -> NDArray[np.float32]:
    """Return what is added to the x, y, z of the executed actions, [steps, 3]; the labels stay clean.

    A push is one normal draw (std `spec.noise`) that lasts a few steps, so that the hand really leaves the
    expert's path and the expert is seen to come back. Episodes that are not perturbed have none.
    """
    added = np.zeros((steps, 3), np.float32)
    if not is_perturbed(spec, seed):
        return added
    rng = np.random.default_rng([seed, zlib.crc32(task.encode()), PUSH_STREAM])
    step = 0
    while step < steps:
        if rng.random() < BURST_CHANCE:
            until = min(step + int(rng.integers(*BURST_STEPS)), steps)
            added[step:until] = rng.normal(0, spec.noise, 3)
            step = until
        step += 1
    return added


def play(env: Env, spec: RecordSpec, task: str, seed: int) -> Episode | None:
    """Let the expert play one episode; None when it does not succeed within `spec.horizon` steps."""
    expert = envs.expert(spec.env)
    most = spec.horizon + spec.hold_steps
    added = pushes(spec, task, seed, most)
    observation = env.reset(task, seed)
    states, actions, successes = [], [], []
    images: dict[str, list[NDArray[np.uint8]]] = {camera.name: [] for camera in env.embodiment.cameras}
    end = spec.horizon  # steps; success moves it
    succeeded = False
    for step in range(most):
        label = expert.act([observation], [EpisodeKey(seed, task, step)])[0].actions[0]
        states.append(observation.state)
        actions.append(label)
        for name, frames in images.items():
            frames.append(observation.images[name])
        executed = label.copy()
        executed[:3] = np.clip(executed[:3] + added[step], -1, 1)
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
    )
