"""Baselines for a policy: holding still, and the mean chunk of the training episodes.

To hold still is to command the present position again. That needs actions which are absolute positions of the
same joints as the state; where actions are differences it is the action 0. Forces and torques have none.
Where the dataset does not tell which, states and actions of the same names are compared, and without evidence
there is no such baseline.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.agreement.columns import plain_label
from vlafit.datasets import EpisodeStore
from vlafit.types import Embodiment, Feature

STILL = 1e-6  # a dimension whose standard deviation is below this, relative to its size, does not move
FOLLOWS = (
    0.5  # |action - state| below this share of the action's own deviation: it is a position near the state
)
DIFFERENCES = ("delta", "relative", "velocity", "speed", "difference")  # words of a control mode
POSITIONS = ("position", "pose", "absolute", "angle", "target", "joint_pos")
FORCES = ("torque", "effort", "force", "voltage", "pwm")  # neither 0 nor the state holds still


@dataclass(frozen=True)
class HoldStill:
    """How to hold still: the state dimension that each action dimension repeats, or the action 0."""

    columns: tuple[int, ...] | None
    """None: the action is 0 in every dimension."""
    why: str

    def action(self, states: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
        """Return the action that holds still in each of `states` [n, s], float32 [n, a]."""
        if self.columns is None:
            return np.zeros((len(states), dimensions), np.float32)
        return states[:, list(self.columns)]


def hold_still(
    store: EpisodeStore, episodes: Sequence[str], deviation: NDArray[np.float64]
) -> HoldStill | str:
    """Return how this robot holds still, or a sentence that says why nobody knows.

    `deviation` [a] is the actions' standard deviation; `episodes` are looked at where the control mode says
    nothing.
    """
    robot = store.embodiment
    control = robot.control.lower()
    if any(word in control for word in FORCES):
        return f"not applicable: actions of the control mode {robot.control!r} are no positions"
    if any(word in control for word in DIFFERENCES):
        return HoldStill(None, f"the action 0, because the control mode is {robot.control!r}")
    columns = matching_columns(robot)
    if columns is None:
        return (
            "not applicable: actions and states have no common names, so it is unknown what repeats the state"
        )
    if any(word in control for word in POSITIONS):
        return HoldStill(
            columns, f"the present state as the action, as the control mode is {robot.control!r}"
        )
    distance = np.zeros(len(columns))
    frames = 0
    for identity in episodes:
        number = store.index(identity)
        actions, states = store.actions(number), store.state(number)
        distance += np.abs(actions - states[:, list(columns)]).sum(axis=0)
        frames += len(actions)
    moving = deviation > STILL
    near = (distance / max(frames, 1))[moving] < FOLLOWS * deviation[moving]
    if moving.any() and near.mean() > 0.5:
        share = f"{int(near.sum())} of {int(moving.sum())}"
        return HoldStill(
            columns,
            "the present state as the action; the dataset states no control mode that tells, but actions "
            f"have the names of the state and {share} moving ones stay near it",
        )
    return (
        "not applicable: the dataset states no control mode that tells, and its actions do not stay near the "
        "state"
    )


def matching_columns(robot: Embodiment) -> tuple[int, ...] | None:
    """Return the state dimension of the same name for each action dimension; None where one has none.

    Without names on either side, equal numbers of dimensions match in order.
    """
    state, action = robot.state, robot.action
    if not state.labels and not action.labels:
        return tuple(range(action.shape[0])) if state.shape == action.shape else None
    place = {plain_label(label): number for number, label in enumerate(state.labels)}
    columns = [place.get(plain_label(label)) for label in action.labels]
    known = [column for column in columns if column is not None]
    return tuple(known) if known and len(known) == action.shape[0] else None


def spread_of_actions(blocks: Iterable[NDArray[np.float32]], feature: Feature) -> NDArray[np.float64]:
    """Return each action dimension's standard deviation [a]; 0 where it does not move."""
    count, mean, squares = 0, np.zeros(feature.shape), np.zeros(feature.shape)
    for block in blocks:  # Chan's update, so that large offsets cost no digits
        rows = np.asarray(block, np.float64)
        own, size = rows.mean(axis=0), len(rows)
        delta = own - mean
        squares += ((rows - own) ** 2).sum(axis=0) + delta**2 * count * size / (count + size)
        mean += delta * size / (count + size)
        count += size
    deviation = np.sqrt(squares / max(count, 1))
    return np.where(deviation > STILL * np.maximum(1.0, np.abs(mean)), deviation, 0.0)


class MeanChunk:
    """The mean of all chunks that begin in some episodes; for one of these, of all others."""

    def __init__(self, store: EpisodeStore, episodes: Sequence[str]) -> None:
        self._store, self._episodes = store, tuple(episodes)
        self._whole: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def without(self, episode: str, chunk: int) -> NDArray[np.float32]:
        """Return the mean chunk [t, a] of all episodes but this one; NaN if there is no other.

        Past an episode's end there is nothing to average; a step that no chunk reaches repeats the one
        before.
        """
        if chunk not in self._whole:
            every = [self._sums(identity, chunk) for identity in self._episodes]
            width = self._store.embodiment.action.shape[0]
            empty = np.zeros((chunk, width)), np.zeros((chunk, 1))
            self._whole[chunk] = sum((s for s, _ in every), empty[0]), sum((c for _, c in every), empty[1])
        sums, counts = self._whole[chunk]
        if episode in self._episodes:
            own = self._sums(episode, chunk)
            sums, counts = sums - own[0], counts - own[1]
        if not counts[0, 0]:
            return np.full(sums.shape, np.nan, np.float32)
        mean = sums / np.maximum(counts, 1)
        for step in range(1, chunk):
            if not counts[step, 0]:
                mean[step] = mean[step - 1]
        return mean.astype(np.float32)

    def _sums(self, episode: str, chunk: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the sum [t, a] of an episode's chunks, and how many reach each step [t, 1]."""
        actions = self._store.actions(self._store.index(episode)).astype(np.float64)
        later = np.concatenate([np.cumsum(actions[::-1], axis=0)[::-1], np.zeros((1, actions.shape[1]))])
        first = np.minimum(np.arange(chunk), len(actions))
        return later[first], (len(actions) - first)[:, None].astype(np.float64)
