"""A scripted expert for LIBERO's pick-and-place tasks, from the simulator's own poses of the objects.

It grasps an object across its narrowest side, or a bowl at its rim, lifts it over what is in the way, and
lets it go over, or on, its place. What it makes are scripted demonstrations, not LIBERO's human ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import SimulationError
from vlafit.types import ActionChunk, EpisodeKey, Observation

Facts = Mapping[str, NDArray]

METRES, RADIANS = 0.05, 0.5  # of an action of 1, per step (robosuite's OSC_POSE)
GAIN = 0.6  # of a full step towards the goal, so that the hand does not overshoot
NEAR, SLOW = 0.04, 0.003  # metres from the goal, and metres a step, within which the hand has stopped short
LAG, MOST_LAG = 0.1, 0.02  # share of the error that is then summed each step, and the most metres
WIDEST = 0.074  # metres between the fingers; they open to 0.08
FINGER = 0.055  # metres from the middle of the grasp to a finger's outer side, when open
PALM = 0.04  # metres from the fingertips (robosuite: grip site) to the palm, which stands on taller things
RIM_DEPTH = 0.012  # metres below the top that belong to a rim
OVER = 0.05  # metres between what is carried and what it passes
CLOSING, LOWERING, OPENING = 14, 30, 8  # most steps for the fingers to close, to let down, and to open
LOST = 6  # steps without contact after which an object is lost: contacts of a rim come and go
ANGLES = np.deg2rad(np.arange(0, 360, 15))
UP = np.array([0.0, 0.0, 1.0])


@dataclass
class Grasp:
    """Where the fingertips go: a point, and the direction (cos, sin) in which the fingers close."""

    point: NDArray[np.float64]
    axis: NDArray[np.float64]


@dataclass
class Aim:
    """Where the hand is to go, the direction (cos, sin) in which the fingers close, and their action."""

    point: NDArray[np.float64]
    axis: NDArray[np.float64]
    gripper: float


@dataclass
class _Progress:
    """What the expert remembers of an episode: its phase, and the steps spent in it."""

    phase: str = "reach"
    steps: int = 0
    loose: int = 0  # steps in a row in which the fingers did not touch the object
    grasp: Grasp | None = None
    offset: NDArray[np.float64] | None = None  # of the grasp from the object's position
    stay: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))  # the hand, as the phase began
    lag: NDArray[np.float64] = field(
        default_factory=lambda: np.zeros(3)
    )  # summed error: the hand stops short
    hand: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))  # at the step before

    def enter(self, phase: str, hand: NDArray[np.float64]) -> None:
        self.phase, self.steps, self.stay = phase, 0, hand.copy()


class LiberoExpert:
    """Plays tasks with one object to move, by `Observation.privileged`. A chunk is one action [1, 7]."""

    def __init__(self) -> None:
        self._progress: dict[tuple[str, int], _Progress] = {}

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        """Return one action for each observation, in [-1, 1]."""
        return [self._act(observation, key) for observation, key in zip(observations, keys, strict=True)]

    def _act(self, observation: Observation, key: EpisodeKey) -> ActionChunk:
        facts = observation.privileged
        if "grasped" not in facts:
            raise SimulationError(
                f"task {key.task!r}: the scripted expert only plays tasks with one object to move"
            )
        start = (key.task, key.seed)
        if key.replan == 0 or start not in self._progress:
            self._progress[start] = _Progress(stay=facts["hand"].copy())
        progress = self._progress[start]
        return ActionChunk(_towards(facts, _aim(facts, progress), progress)[None])


def _aim(facts: Facts, progress: _Progress) -> Aim:
    """Return where the hand is to go at this step, and note progress."""
    progress.steps += 1
    hand, points, there = facts["hand"], facts["points"], facts["object"]
    bottom, top = points[:, 2].min(), points[:, 2].max()
    grasped = bool(facts["grasped"][0])
    progress.loose = 0 if grasped else progress.loose + 1
    if progress.phase in ("reach", "descend"):
        if progress.grasp is None or progress.offset is None:
            progress.grasp = plan_grasp(facts)
            progress.offset = progress.grasp.point - there
        grasp = Grasp(there + progress.offset, progress.grasp.axis)
        beside = np.linalg.norm((grasp.point - hand)[:2])
        turned = abs(_turn(facts, grasp.axis))
        if progress.phase == "reach":
            hover = grasp.point + UP * (max(top - grasp.point[2], 0) + 0.05)
            if beside < 0.015 and turned < 0.1 and hand[2] < hover[2] + 0.03:
                progress.enter("descend", hand)
            return Aim(_over(hand, hover, facts, 0.0, progress.stay), grasp.axis, -1)
        low = hand[2] < grasp.point[2] + 0.006
        if low or progress.steps > 40:
            progress.enter("close", grasp.point if low else hand)
        return Aim(grasp.point, grasp.axis, -1)
    assert progress.grasp is not None
    axis = progress.grasp.axis
    if progress.phase == "close":
        if progress.steps > CLOSING or (grasped and progress.steps > 6):
            progress.enter("carry", hand)
        return Aim(progress.stay, axis, 1)
    if progress.phase in ("carry", "lower"):
        if progress.loose > LOST and progress.steps > LOST:
            progress.enter("open", hand)
            return Aim(hand, axis, -1)
        goal = facts["place"] + (hand - there)
        beside = np.linalg.norm((goal - hand)[:2])
        if progress.phase == "carry":
            goal[2] = hand[2] - bottom + facts["rim"][0] + 0.03
            if beside < 0.01:
                progress.enter("lower", hand)
            return Aim(_over(hand, goal, facts, hand[2] - bottom, progress.stay), axis, 1)
        stands = facts["rim"][0] - 0.03 if facts["inside"][0] else facts["place"][2] + 0.008
        goal[2] = hand[2] - bottom + stands
        if bottom < stands + 0.004 or progress.steps > LOWERING:
            progress.enter("open", hand)
        return Aim(goal, axis, 1)
    if progress.steps > OPENING:
        if progress.steps > 2 * OPENING:
            progress.grasp = None
            progress.enter("reach", hand)
        return Aim(hand + 0.1 * UP, axis, -1)
    return Aim(progress.stay, axis, -1)


def plan_grasp(facts: Facts) -> Grasp:
    """Choose where to grasp: across the object if it fits between the fingers, else at its rim.

    Of the ways that fit, the one with the least turn of the hand whose fingers keep clear of other things.
    """
    points, around = facts["points"], facts["around"]
    centre = (points.max(0) + points.min(0)) / 2
    bottom, top = points[:, 2].min(), points[:, 2].max()
    height = max(bottom + 0.012, top - 0.03)
    ways: list[tuple[float, Grasp]] = []
    for angle in ANGLES:
        axis = np.array([np.cos(angle), np.sin(angle)])
        along = (points[:, :2] - centre[:2]) @ axis
        width = along.max() - along.min()
        if angle < np.pi and width < WIDEST:
            middle = centre[:2] + axis * (along.max() + along.min()) / 2
            grasp = Grasp(np.array([*middle, height]), axis)
            ways.append((abs(_turn(facts, axis)) + 8 * width + _crowd(grasp, around), grasp))
    if not ways:
        rim = points[points[:, 2] > top - RIM_DEPTH]
        for angle in ANGLES:
            axis = np.array([np.cos(angle), np.sin(angle)])
            edge = ((rim[:, :2] - centre[:2]) @ axis).max()
            grasp = Grasp(np.array([*(centre[:2] + axis * (edge - 0.006)), top - 0.025]), axis)
            ways.append((abs(_turn(facts, axis)) + _crowd(grasp, around), grasp))
    return min(ways, key=lambda way: way[0])[1]


def _crowd(grasp: Grasp, around: NDArray[np.float64]) -> float:
    """Return a penalty for things where the fingers go down or close to it, or where the palm would be."""
    away = around - grasp.point
    along, across = np.abs(away[:, :2] @ grasp.axis), np.abs(away[:, :2] @ [-grasp.axis[1], grasp.axis[0]])
    high = (away[:, 2] > -0.01) & (along > 0.02)
    fingers = high & (across < 0.014) & (along < FINGER + 0.007)
    beside = high & (across < 0.025) & (along < FINGER + 0.017)
    palm = (away[:, 2] > PALM) & (along < 0.11) & (across < 0.05)
    return 3.0 * bool(fingers.any()) + 1.0 * bool(beside.any()) + 3.0 * bool(palm.any())


def _over(
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


def _turn(facts: Facts, axis: NDArray[np.float64]) -> float:
    """Return the turn in radians around the vertical, at most a quarter, that aligns the fingers."""
    between = (facts["fingers"][1] - facts["fingers"][0])[:2]
    angle = np.arctan2(axis[1], axis[0]) - np.arctan2(between[1], between[0])
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)


def _towards(facts: Facts, aim: Aim, progress: _Progress) -> NDArray[np.float32]:
    """Return the action that moves the hand to `aim`, pointing down.

    An action displaces the hand from where it is, so a small one does not overcome friction and the weight of
    what is carried: the errors of a hand that stands are summed.
    """
    hand = facts["hand"]
    error = aim.point - hand
    stopped = np.abs(hand - progress.hand) < SLOW
    lag = np.clip(progress.lag + LAG * error * stopped, -MOST_LAG, MOST_LAG)
    progress.lag = np.where(np.abs(error) < NEAR, lag, 0.0)
    progress.hand = hand
    shift = (error * GAIN + progress.lag) / METRES
    shift /= max(1.0, np.abs(shift).max())
    pointing = facts["hand_rotation"][:, 2]  # the direction of the fingers
    tilt = np.cross(pointing, -UP)
    turn = (tilt - UP * tilt[2] + UP * _turn(facts, aim.axis)) / RADIANS * 0.5
    turn /= max(1.0, np.abs(turn).max() / 0.5)
    return np.array([*shift, *turn, aim.gripper], np.float32)
