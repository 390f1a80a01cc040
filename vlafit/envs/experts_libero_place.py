"""The scripted expert's motion for an object to pick up and place.

It grasps an object across its narrowest side, or a bowl at its rim, lifts it over what is in the way, and
lets it go over, or on, its place.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlafit.envs.libero_control import UP, Aim, Facts, over, turn

WIDEST = 0.074  # metres between the fingers; they open to 0.08
FINGER = 0.055  # metres from the middle of the grasp to a finger's outer side, when open
PALM = 0.04  # metres from the fingertips (robosuite: grip site) to the palm, which stands on taller things
RIM_DEPTH = 0.012  # metres below the top that belong to a rim
CLOSING, LOWERING, OPENING = 14, 30, 8  # most steps for the fingers to close, to let down, and to open
LOST = 6  # steps without contact after which an object is lost: contacts of a rim come and go
ANGLES = np.deg2rad(np.arange(0, 360, 15))


@dataclass
class Grasp:
    """Where the fingertips go: a point, and the direction (cos, sin) in which the fingers close."""

    point: NDArray[np.float64]
    axis: NDArray[np.float64]


@dataclass
class PlaceProgress:
    """What the expert remembers of an object's motion: its phase, and the steps spent in it."""

    phase: str = "reach"
    steps: int = 0
    loose: int = 0  # steps in a row in which the fingers did not touch the object
    grasp: Grasp | None = None
    offset: NDArray[np.float64] | None = None  # of the grasp from the object's position
    stay: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))  # the hand, as the phase began

    def enter(self, phase: str, hand: NDArray[np.float64]) -> None:
        self.phase, self.steps, self.stay = phase, 0, hand.copy()


def aim_of_place(facts: Facts, progress: PlaceProgress) -> Aim:
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
        turned = abs(turn(facts, grasp.axis))
        if progress.phase == "reach":
            hover = grasp.point + UP * (max(top - grasp.point[2], 0) + 0.05)
            if beside < 0.015 and turned < 0.1 and hand[2] < hover[2] + 0.03:
                progress.enter("descend", hand)
            return Aim(over(hand, hover, facts, 0.0, progress.stay), grasp.axis, -1)
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
            return Aim(over(hand, goal, facts, hand[2] - bottom, progress.stay), axis, 1)
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
            ways.append((abs(turn(facts, axis)) + 8 * width + _crowd(grasp, around), grasp))
    if not ways:
        rim = points[points[:, 2] > top - RIM_DEPTH]
        for angle in ANGLES:
            axis = np.array([np.cos(angle), np.sin(angle)])
            edge = ((rim[:, :2] - centre[:2]) @ axis).max()
            grasp = Grasp(np.array([*(centre[:2] + axis * (edge - 0.006)), top - 0.025]), axis)
            ways.append((abs(turn(facts, axis)) + _crowd(grasp, around), grasp))
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
