"""The scripted expert's motion for a part that turns or slides: a stove's knob, a cabinet's drawer.

The fingers point at what stands out furthest of the part (a handle's bar, a knob's ridge), close across its
narrowest side, and go where the joint takes it.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlafit.envs.libero_control import UP, Aim, Facts, apart, over

LAYER = 0.014  # metres behind its outermost point that belong to a handle's bar, or a knob's ridge
DEPTH = 0.008  # metres that the fingertips reach past the outermost point
INSET = 0.012  # metres from the end of a ridge at which a knob is held
BACK = 0.09  # metres from which the hand approaches, and to which it leaves
THERE, ALIGNED = 0.012, 0.1  # metres and radians from where the approach begins
CLOSING, APPROACH, LEAVING = 14, 40, 12  # most steps for the fingers to close, to come near, and to leave
OPENING = 8  # steps for the fingers to open
AWAY = 0.045  # metres of the hand from the part at which it is lost: contacts of hard shapes come and go
SLIDE, TURN = 0.04, 0.5  # metres, or radians, by which the hand goes ahead of the part
BEYOND = 0.15  # radians past the nearest position that counts, at which a turn ends
SHORT = 0.004  # metres short of the furthest position that counts, at which a slide ends
STUCK = 60  # steps after which a slide past the nearest position that counts ends


@dataclass
class PartProgress:
    """What the expert remembers of a part's motion."""

    phase: str = "reach"
    steps: int = 0
    loose: int = 0  # steps in a row in which the fingers did not touch the part
    point: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))  # of the grasp, at `joint`
    rotation: NDArray[np.float64] | None = None  # of the hand [3, 3], at `joint`
    joint: float = 0.0  # position of the joint as the grasp was planned
    stay: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))  # the hand, as the phase began

    def enter(self, phase: str, hand: NDArray[np.float64]) -> None:
        self.phase, self.steps, self.stay = phase, 0, hand.copy()


def aim_at_part(facts: Facts, progress: PartProgress) -> Aim:
    """Return where the hand is to go at this step, and note progress."""
    progress.steps += 1
    hand, out = facts["hand"], outward(facts)
    progress.loose = 0 if facts["held"][0] else progress.loose + 1
    if progress.rotation is None:
        progress.point, progress.rotation = plan_hold(facts)
        progress.joint, progress.stay = float(facts["joint"][0]), hand.copy()
    point, rotation = _moved(facts, progress, float(facts["joint"][0]))
    if progress.phase == "reach":
        before = point + BACK * out
        near = np.linalg.norm(before - hand) < THERE
        if near and apart(rotation, facts["hand_rotation"]) < ALIGNED:
            progress.enter("approach", hand)
        return Aim(over(hand, before, facts, 0.0, progress.stay), UP[:2], -1, rotation)
    if progress.phase == "approach":
        if (hand - point) @ out < 0.006 or progress.steps > APPROACH:
            progress.enter("close", hand)
        return Aim(point, UP[:2], -1, rotation)
    if progress.phase == "close":
        if progress.steps > CLOSING or (progress.loose == 0 and progress.steps > 6):
            progress.enter("move", hand)
        return Aim(progress.stay, UP[:2], 1, rotation)
    if progress.phase == "move":
        if _arrived(facts, progress.steps):
            progress.enter("release", hand)
        elif np.linalg.norm(hand - point) > AWAY:
            progress.rotation = None
            progress.enter("release", hand)
            return Aim(hand, UP[:2], -1, facts["hand_rotation"])
        ahead = (SLIDE if facts["slides"][0] else TURN) * _sign(facts)
        point, rotation = _moved(facts, progress, float(facts["joint"][0]) + ahead)
        return Aim(point, UP[:2], 1, rotation)
    if progress.phase == "release":
        if progress.steps > OPENING:
            progress.enter("leave", hand)
        return Aim(progress.stay, UP[:2], -1, rotation)
    if progress.steps > LEAVING and not _arrived(facts, STUCK + 1):
        progress.rotation = None
        progress.enter("reach", hand)
        return Aim(hand, UP[:2], -1, rotation)
    return Aim(progress.stay + BACK * out, UP[:2], -1, rotation)


def outward(facts: Facts) -> NDArray[np.float64]:
    """Return the direction [3] in which the part stands out: of its slide, or up along its axis."""
    axis = facts["joint_axis"]
    return axis * (_sign(facts) if facts["slides"][0] else np.sign(axis @ UP))


def plan_hold(facts: Facts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return where the fingertips go [3], and the hand's orientation [3, 3]: the nearest that fits."""
    out, points = outward(facts), facts["part"]
    along = points @ out
    layer = points[along > along.max() - LAYER]
    across = np.cross(out, UP if abs(out @ UP) < 0.9 else np.array([1.0, 0.0, 0.0]))
    across /= np.linalg.norm(across)
    ways = []
    for angle in np.deg2rad(np.arange(0, 180, 15)):
        close = np.cos(angle) * across + np.sin(angle) * np.cross(out, across)
        ways.append((np.ptp(layer @ close), close))
    close = min(ways, key=lambda way: way[0])[1]
    rotation = np.stack([close, np.cross(-out, close), -out], 1)
    other = rotation * [-1, -1, 1]  # the other finger first
    turns = [np.asarray(way, np.float64) for way in (rotation, other)]
    rotation = min(turns, key=lambda way: apart(way, facts["hand_rotation"]))
    middle = (layer @ rotation).max(0) / 2 + (layer @ rotation).min(0) / 2
    middle[2] = -(along.max() - DEPTH)
    if not facts["slides"][0]:  # at the nearer end, which has the longer lever and needs less reach
        ends = (layer @ rotation[:, 1]).min() + INSET, (layer @ rotation[:, 1]).max() - INSET
        middle[1] = min(ends, key=lambda end: abs(end - facts["hand"] @ rotation[:, 1]))
    return rotation @ middle, rotation


def _moved(
    facts: Facts, progress: PartProgress, joint: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the grasp's point [3] and the hand's orientation [3, 3] with the joint at `joint`."""
    assert progress.rotation is not None
    axis, by = facts["joint_axis"], joint - progress.joint
    if facts["slides"][0]:
        return progress.point + axis * by, progress.rotation
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    around = np.eye(3) + np.sin(by) * cross + (1 - np.cos(by)) * cross @ cross  # Rodrigues
    return facts["joint_anchor"] + around @ (
        progress.point - facts["joint_anchor"]
    ), around @ progress.rotation


def _sign(facts: Facts) -> float:
    """Return the direction of the joint's motion towards its furthest position that counts."""
    near, far = facts["joint_goal"]
    return 1.0 if far > near else -1.0


def _arrived(facts: Facts, steps: int) -> bool:
    near, far = (facts["joint"][0] - facts["joint_goal"]) * _sign(facts)
    if not facts["slides"][0]:
        return bool(near > BEYOND)
    return bool(far > -SHORT or (near > 0 and steps > STUCK))
