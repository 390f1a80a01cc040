"""Move the hand of LIBERO's robot: an aim becomes an action, and a way over what stands between."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Facts = Mapping[str, NDArray]

METRES, RADIANS = 0.05, 0.5  # of an action of 1, per step (robosuite's OSC_POSE)
GAIN = 0.6  # of a full step towards the goal, so that the hand does not overshoot
NEAR, SLOW = 0.04, 0.003  # metres from the goal, and metres a step, within which the hand has stopped short
LAG, MOST_LAG = 0.1, 0.02  # share of the error that is then summed each step, and the most metres
OVER = 0.05  # metres between what is carried and what it passes
UP = np.array([0.0, 0.0, 1.0])


@dataclass
class Aim:
    """Where the hand is to go, how it is to be turned, and the fingers' action (-1 opens, 1 closes)."""

    point: NDArray[np.float64]
    axis: NDArray[np.float64]
    """The direction in which the fingers close, with the hand pointing down: (cos, sin)."""
    gripper: float
    rotation: NDArray[np.float64] | None = None
    """The hand's whole orientation [3, 3], in place of `axis`: columns are the direction in which the fingers
    close, the one across, and the one in which they point."""


@dataclass
class Hand:
    """What the controller remembers of an episode: where the hand was, and by how much it stops short."""

    lag: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    before: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))


def over(
    hand: NDArray[np.float64],
    goal: NDArray[np.float64],
    facts: Facts,
    hanging: float,
    start: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the next point on the way: up from `start` first, and along only above what stands between.

    `hanging` is how far below the hand the lowest thing hangs.
    """
    way = (goal - hand)[:2]
    length = np.linalg.norm(way)
    if length < 0.02:
        return goal
    away = facts["around"] - hand
    along = away[:, :2] @ (way / length)
    across = np.abs(away[:, :2] @ [-way[1], way[0]]) / length
    between = (along > -0.06) & (along < length + 0.06) & (across < 0.1)
    highest = facts["around"][between, 2].max(initial=-np.inf)
    height = max(goal[2], highest + OVER * 0.6 + hanging + 0.01)
    if hand[2] < height - 0.03:
        below = np.linalg.norm((hand - start)[:2]) < NEAR
        return np.array([*(start if below else hand)[:2], height])
    return np.array([*goal[:2], height])


def apart(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the angle in radians between two orientations [3, 3]."""
    return float(np.arccos(np.clip((np.trace(one.T @ other) - 1) / 2, -1, 1)))


def turn(facts: Facts, axis: NDArray[np.float64]) -> float:
    """Return the turn in radians around the vertical, at most a quarter, that aligns the fingers."""
    between = (facts["fingers"][1] - facts["fingers"][0])[:2]
    angle = np.arctan2(axis[1], axis[0]) - np.arctan2(between[1], between[0])
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)


def turns(facts: Facts, aim: Aim) -> NDArray[np.float64]:
    """Return the turn [3] in radians, an axis times (nearly) an angle, to the hand's orientation."""
    rotation = facts["hand_rotation"]
    if aim.rotation is not None:
        return sum((np.cross(rotation[:, i], aim.rotation[:, i]) for i in range(3)), np.zeros(3)) / 2
    tilt = np.cross(rotation[:, 2], -UP)
    return tilt - UP * tilt[2] + UP * turn(facts, aim.axis)


def towards(facts: Facts, aim: Aim, memory: Hand) -> NDArray[np.float32]:
    """Return the action [7] that moves the hand to `aim`.

    An action displaces the hand from where it is, so a small one does not overcome friction and the weight of
    what is carried: the errors of a hand that stands are summed.
    """
    hand = facts["hand"]
    error = aim.point - hand
    stopped = np.abs(hand - memory.before) < SLOW
    lag = np.clip(memory.lag + LAG * error * stopped, -MOST_LAG, MOST_LAG)
    memory.lag = np.where(np.abs(error) < NEAR, lag, 0.0)
    memory.before = hand
    shift = (error * GAIN + memory.lag) / METRES
    shift /= max(1.0, np.abs(shift).max())
    angles = turns(facts, aim) / RADIANS * 0.5
    angles /= max(1.0, np.abs(angles).max() / 0.5)
    return np.array([*shift, *angles, aim.gripper], np.float32)
