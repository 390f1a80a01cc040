"""The scripted expert's motion for a dish to push over the table: open fingers in it push its rim.

From behind there may be no room: a cabinet's handles stand there, and the palm is wider than the fingers. The
fingers stand side by side across the way, because one point of the rim would tip the dish.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlafit.envs.libero_control import UP, Aim, Facts, apart, over

TIP = 0.015  # metres of the fingers' pads over the dish's floor; their tips are 9 mm lower
FLOOR = 0.006  # metres above an object's lowest point within which its floor is
ABOVE = 0.05  # metres over the rim from which the fingers go down, and to which they leave
SHIFTED = 0.2  # of the floor's radius: where the fingers go down, towards the goal
BESIDE, ALIGNED, LOW = (
    0.012,
    0.15,
    0.004,
)  # metres, radians and metres of height from a phase's aim, at its end
LEAD = 0.03  # metres ahead of there that the fingers aim at: further, they would climb the rim
THERE = 0.012  # metres from a corner of its way, or the place, within which the object is there
CLEAR, AVOID = 0.004, 8.0  # metres to keep from other things, and metres of detour for one nearer to them
TURNING = 0.05  # metres of detour that a corner costs, as the fingers go up and down again
REACH = 0.735  # metres from the robot's base to the object: further, the arm would be straight
STILL, STOPPED = 0.0005, 12  # metres a step, and steps, after which an object that is pushed is stuck
WRIST = np.array([-1.0, 1.0])  # direction in which the fingers close, with the Panda's last joint half-way
DOWN, RISING = 30, 8  # most steps of phases


@dataclass
class PushProgress:
    """What the expert remembers of a push."""

    phase: str = "reach"
    steps: int = 0
    still: int = 0  # steps in a row in which the object hardly moved
    stay: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))  # the hand, as the phase began
    before: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))  # the object, a step before
    route: list[NDArray[np.float64]] = field(default_factory=list)  # corners [2] that are left, and the place

    def enter(self, phase: str, hand: NDArray[np.float64]) -> None:
        self.phase, self.steps, self.still, self.stay = phase, 0, 0, hand.copy()


def aim_of_push(facts: Facts, progress: PushProgress) -> Aim:
    """Return where the hand is to go at this step, and note progress."""
    progress.steps += 1
    hand, points, there = facts["hand"], facts["points"], facts["object"]
    progress.still = progress.still + 1 if np.linalg.norm(there - progress.before) < STILL else 0
    progress.before = there
    if not progress.route:
        progress.route, progress.stay = plan_route(facts), hand.copy()
    if len(progress.route) > 1 and np.linalg.norm(progress.route[0] - there[:2]) < THERE:
        progress.route.pop(0)
    way = progress.route[0] - there[:2]
    length = np.linalg.norm(way)
    rotation = downward(way / max(length, 1e-9))
    centre, top = (points.max(0) + points.min(0)) / 2, points[:, 2].max()
    low = points[points[:, 2] < points[:, 2].min() + FLOOR]
    floor = low[:, 2].max() + TIP
    ahead = np.linalg.norm((low - centre)[:, :2], axis=1).max() * SHIFTED * way / max(length, 1e-9)
    inside = np.array([*(centre[:2] + ahead), floor])
    if progress.phase == "reach":
        above = np.array([*inside[:2], top + TIP + ABOVE])
        near = np.linalg.norm((above - hand)[:2]) < BESIDE and hand[2] < above[2] + 0.03
        if near and apart(rotation, facts["hand_rotation"]) < ALIGNED:
            progress.enter("descend", hand)
        return Aim(over(hand, above, facts, TIP, progress.stay), UP[:2], -1, rotation)
    if progress.phase == "descend":
        if hand[2] < floor + LOW or progress.steps > DOWN:
            progress.enter("push", hand)
        return Aim(inside, UP[:2], -1, rotation)
    if progress.phase == "push":
        radius = np.linalg.norm((points - centre)[:, :2], axis=1).max()
        lost = np.linalg.norm((hand - centre)[:2]) > radius or progress.still > STOPPED
        if lost or length < THERE:
            progress.enter("rise", hand)
        lead = way * min(1.0, LEAD / max(length, 1e-9))
        return Aim(np.array([*(inside[:2] + lead), floor]), UP[:2], -1, rotation)
    if progress.steps > RISING and (len(progress.route) > 1 or length > 2 * THERE):
        progress.route = []
        progress.enter("reach", hand)
    return Aim(np.array([*progress.stay[:2], top + TIP + ABOVE]), UP[:2], -1, rotation)


def downward(way: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the orientation [3, 3] of a hand pointing down, its fingers side by side across `way` [2]."""
    close = np.array([-way[1], way[0], 0.0])
    close *= 1.0 if close[:2] @ WRIST >= 0 else -1.0
    return np.stack([close, np.cross(-UP, close), -UP], 1)


def plan_route(facts: Facts) -> list[NDArray[np.float64]]:
    """Return the corner [2] of the object's way, if it needs one, and its place: clear and in reach."""
    points, start, place = facts["points"], facts["object"][:2], facts["place"][:2]
    radius = np.linalg.norm(points[:, :2] - start, axis=1).max() + CLEAR
    low = facts["around"][facts["around"][:, 2] < points[:, 2].max() + CLEAR]
    things = np.asarray(np.unique(np.round(low[:, :2], 2), axis=0), np.float64)
    places = place + _grid(np.linspace(-1, 1, 5)) * np.maximum(facts["room"] - THERE, 0)  # [p, 2]
    corners = np.concatenate(
        [start[None], (start + place) / 2 + _grid(np.arange(-0.24, 0.25, 0.03))]
    )  # [c, 2]
    length = np.linalg.norm(corners - start, axis=1)[:, None] + np.linalg.norm(
        corners[:, None] - places, axis=-1
    )
    length += np.linalg.norm(places - place, axis=1) + TURNING * (np.arange(len(corners)) > 0)[:, None]
    short = np.maximum(
        _short(start[None], corners, things, radius).T, _short(corners, places, things, radius)
    )
    far = np.linalg.norm(corners - facts["base"][:2], axis=1) - REACH
    cost = length + AVOID * (short + np.maximum(far, 0)[:, None])
    corner, end = np.unravel_index(int(np.argmin(cost)), cost.shape)
    return [places[end]] if corner == 0 else [corners[corner], places[end]]


def _grid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack(np.meshgrid(values, values), -1).reshape(-1, 2)


def _short(
    begins: NDArray[np.float64], ends: NDArray[np.float64], things: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """Return by how many metres the nearest thing is within `radius` of each straight way [b, e], or 0."""
    way = ends - begins[:, None]  # [b, e, 2]
    squared = np.maximum((way**2).sum(-1), 1e-12)
    nearest = np.full(squared.shape, np.inf)
    for thing in things:
        away = thing - begins[:, None]  # [b, 1, 2]
        share = np.clip((away * way).sum(-1) / squared, 0, 1)
        nearest = np.minimum(nearest, np.linalg.norm(away - share[..., None] * way, axis=-1))
    return np.maximum(radius - nearest, 0)
