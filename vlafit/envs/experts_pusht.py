"""An expert for PushT that plans straight pushes in a copy of the simulation, and walks around the block.

It chooses where on the block's edge to push, in which direction and how far, so that the block's corners come
nearest to those of the outline. Its demonstrations are called planned ones: no human moved the disc.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pymunk
from gym_pusht.envs.pusht import PushTEnv
from numpy.typing import NDArray
from shapely.geometry import LineString, MultiPolygon, Point, Polygon
from shapely.ops import unary_union

from vlafit.errors import SimulationError
from vlafit.types import ActionChunk, EpisodeKey, Observation

Pose = tuple[float, float, float]
"""x, y and angle of the block."""

GOAL: Pose = (256.0, 256.0, math.pi / 4)  # gym-pusht's outline: x, y, angle
BAR = ((-60.0, 0.0), (60.0, 0.0), (60.0, 30.0), (-60.0, 30.0))  # gym-pusht's T in its own frame
STEM = ((-15.0, 30.0), (15.0, 30.0), (15.0, 120.0), (-15.0, 120.0))
CORNERS = np.array([*BAR, *STEM[2:]])
RADIUS = 15.0  # of the disc
GAP = 2.0  # between disc and block before a push
CLEARANCE = 12.0  # between disc and block on the way
LOW, HIGH = 22.0, 490.0  # the disc's centre stays off the walls
REACH = 60.0  # the next target's distance on the way: the disc moves about a quarter of it in a step
PASSED, ARRIVED = 8.0, 1.0  # from a place on the way, and from the beginning of a push
OFF = 4.0  # mean distance of the block's corners from the plan's at which a push is given up
SPACING = 8.0  # between the points of the edge where a push may begin
ANGLES = tuple(math.radians(degrees) for degrees in (-35, -15, 0, 15, 35))  # from the edge's normal
LONGEST = 12  # steps of a push
UNCOUNTED = 1  # a collision type without a handler; gym-pusht's is 0
SECOND = 6  # best first pushes after which a second is tried, when none improves much


@dataclass(frozen=True)
class Push:
    """A straight push: where the disc's centre begins, its move in a step, and for how many steps."""

    begin: NDArray[np.float64]
    move: NDArray[np.float64]
    steps: int
    cost: float
    poses: tuple[Pose, ...]
    """The block's pose before it, and after each of its steps."""


@dataclass
class Motion:
    """What is left to do until the next plan: places to pass on the way to a push, then its targets."""

    route: list[NDArray[np.float64]]
    targets: list[NDArray[np.float64]]
    poses: list[Pose]
    """The block's pose before each target."""

    def next(self, agent: NDArray[np.float64], block: Pose) -> NDArray[np.float64] | None:
        """Return the disc's next target, or None where a new plan is due: at its end, or off it."""
        while self.route:
            away = self.route[0] - agent
            distance = float(np.linalg.norm(away))
            if distance > (PASSED if len(self.route) > 1 else ARRIVED):
                return agent + away * min(1.0, REACH / distance)
            self.route.pop(0)
        if not self.targets or apart(self.poses.pop(0), block) > OFF:
            return None
        return self.targets.pop(0)


class PushTExpert:
    """Plans in `privileged["full_state"]`; a chunk is one action [1, 2]."""

    def __init__(self) -> None:
        self._copy = Copy()
        self._motions: dict[tuple[str, int], Motion] = {}

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        """Return one action for each observation."""
        return [self._act(observation, key) for observation, key in zip(observations, keys, strict=True)]

    def _act(self, observation: Observation, key: EpisodeKey) -> ActionChunk:
        if "full_state" not in observation.privileged:
            raise SimulationError(f"task {key.task!r}: the expert needs the simulator's full state")
        episode, state = (key.task, key.seed), observation.privileged["full_state"]
        if key.replan == 0:
            self._motions.pop(episode, None)
        agent, block = state[:2], (float(state[2]), float(state[3]), float(state[4]))
        motion = self._motions.get(episode)
        target = motion.next(agent, block) if motion else None
        if target is None:
            motion = plan(self._copy, agent, block)
            self._motions[episode] = motion
            target = motion.next(agent, block)
        assert target is not None  # a push has targets
        return ActionChunk(np.clip(target, 0, 512).astype(np.float32)[None])


class Copy:
    """A PushT of its own, in which pushes are tried."""

    def __init__(self) -> None:
        self._env = PushTEnv(obs_type="state")
        self._env.reset(seed=0)
        for shape in self._env.space.shapes:  # else contacts are counted in Python: a quarter of the time
            shape.collision_type = UNCOUNTED

    def push(
        self,
        begin: NDArray[np.float64],
        block: Pose,
        move: NDArray[np.float64],
        steps: int,
    ) -> Iterator[Pose]:
        """Yield the block's pose after each step of a push from rest."""
        agent, body, space = self._env.agent, self._env.block, self._env.space
        agent.position, agent.velocity = (float(begin[0]), float(begin[1])), (0.0, 0.0)
        body.velocity, body.angular_velocity = (0.0, 0.0), 0.0
        body.angle = block[2]  # before the position: it turns about the centre of gravity
        body.position = block[:2]
        space.reindex_shapes_for_body(body)
        space.reindex_shapes_for_body(agent)
        for step in range(1, steps + 1):
            target = pymunk.Vec2d(*(begin + step * move).tolist())
            for _ in range(10):  # gym-pusht: 10 steps of physics in one of control
                velocity = pymunk.Vec2d(*agent.velocity)
                agent.velocity = velocity + (100 * (target - agent.position) - 20 * velocity) * 0.01
                space.step(0.01)
            x, y = body.position
            yield x, y, body.angle


def plan(copy: Copy, agent: NDArray[np.float64], block: Pose) -> Motion:
    """Return the way to the next push, and the push."""
    push = best_push(copy, agent, block)
    if push is None:
        raise SimulationError(f"PushT: no push begins within the walls, of a block at {block}")
    targets = [push.begin + step * push.move for step in range(1, push.steps + 1)]
    return Motion(way(agent, push.begin, block), targets, list(push.poses[:-1]))


def best_push(copy: Copy, agent: NDArray[np.float64], block: Pose) -> Push | None:
    """Return the push after which the block is nearest to its outline, or that makes way for such a push."""
    before = cost(block)
    pushes = sorted(every_push(copy, block, speed(before)), key=lambda push: push.cost)
    if not pushes:
        return None
    if pushes[0].cost < 0.7 * before or before < 2.0:
        return pushes[0]
    ahead = []
    for first in pushes[:SECOND]:
        second = min(
            (p.cost for p in every_push(copy, first.poses[-1], speed(first.cost))), default=first.cost
        )
        ahead.append((min(first.cost, second), first.cost, first))
    return min(ahead, key=lambda one: one[:2])[2]


def speed(distance: float) -> float:
    """Return the pixels of a push in a step: fewer near the outline, where its end must be exact."""
    return 8.0 if distance > 25 else 4.0 if distance > 8 else 2.0


def every_push(copy: Copy, block: Pose, stride: float) -> Iterator[Push]:
    """Yield the best length of each push that begins within the walls."""
    for point, normal in edge_points(block):
        begin = point - (RADIUS + GAP) * normal
        if not (LOW <= begin[0] <= HIGH and LOW <= begin[1] <= HIGH):
            continue
        if outline(block).distance(Point(begin)) < RADIUS + 0.5 * GAP:
            continue  # in the corner between bar and stem
        for angle in ANGLES:
            c, s = math.cos(angle), math.sin(angle)
            move = stride * np.array([c * normal[0] - s * normal[1], s * normal[0] + c * normal[1]])
            poses = (block, *copy.push(begin, block, move, LONGEST))
            costs = [cost(pose) for pose in poses[1:]]
            steps = 1 + costs.index(min(costs))
            yield Push(begin, move, steps, costs[steps - 1], poses[: steps + 1])


def cost(block: Pose) -> float:
    """Return the mean distance of the block's corners from the outline's, in pixels."""
    return apart(block, GOAL)


def apart(first: Pose, second: Pose) -> float:
    """Return the mean distance of the block's corners between two poses, in pixels."""
    return float(np.linalg.norm(world(CORNERS, first) - world(CORNERS, second), axis=1).mean())


def world(points: NDArray[np.float64], pose: Pose) -> NDArray[np.float64]:
    """Return points of the block's frame on the board, [n, 2]."""
    c, s = math.cos(pose[2]), math.sin(pose[2])
    return points @ np.array([[c, s], [-s, c]]) + np.array(pose[:2])


def outline(block: Pose) -> Polygon:
    """Return the block as a polygon."""
    parts = [Polygon(world(np.array(part), block)) for part in (BAR, STEM)]
    whole = unary_union([part.buffer(0.01) for part in parts])
    assert isinstance(whole, Polygon)  # bar and stem touch
    return whole


def edge_points(block: Pose) -> Iterator[tuple[NDArray, NDArray]]:
    """Yield points on the block's edge, and there the normal that points inwards."""
    tee = np.array([BAR[0], BAR[1], BAR[2], STEM[1], STEM[2], STEM[3], STEM[0], BAR[3]])
    corners = world(tee, block)
    for first, second in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = second - first
        length = float(np.linalg.norm(along))
        normal = np.array([-along[1], along[0]]) / length  # the corners run counter-clockwise
        for i in range(int(length // SPACING)):
            yield first + along * (i + 0.5) / (length // SPACING), normal


def way(agent: NDArray[np.float64], to: NDArray[np.float64], block: Pose) -> list[NDArray[np.float64]]:
    """Return the places to pass around the block, the end too."""
    shape = outline(block)
    near = shape.buffer(RADIUS + 0.6 * CLEARANCE)
    ends = []
    for end in (np.asarray(agent, np.float64), np.asarray(to, np.float64)):
        if near.contains(Point(end)):  # leave or reach the block straight
            ring = shape.buffer(RADIUS + CLEARANCE).exterior
            place = ring.interpolate(ring.project(Point(end)))
            ends.append(np.array([place.x, place.y]))
        else:
            ends.append(end)
    return [*shortest(ends[0], ends[1], shape, near), np.asarray(to, np.float64)]


def shortest(
    begin: NDArray[np.float64], end: NDArray[np.float64], shape: Polygon, near: Polygon | MultiPolygon
) -> list[NDArray[np.float64]]:
    """Return the corners of the shortest way that keeps off the block; the straight line if there is none."""
    around = shape.buffer(RADIUS + CLEARANCE, join_style="mitre").simplify(1.0)
    assert isinstance(around, Polygon)
    ring = around.exterior
    nodes = [begin, end, *(np.array(p) for p in ring.coords[:-1])]
    nodes = [p for i, p in enumerate(nodes) if i < 2 or (LOW <= p[0] <= HIGH and LOW <= p[1] <= HIGH)]
    distances = {0: 0.0}
    before: dict[int, int] = {}
    queue = [(0.0, 0)]
    while queue:
        distance, i = heapq.heappop(queue)
        if i == 1:
            passed = [1]
            while passed[-1]:
                passed.append(before[passed[-1]])
            return [nodes[j] for j in reversed(passed)]
        for j in range(1, len(nodes)):
            length = distance + float(np.linalg.norm(nodes[j] - nodes[i]))
            if (
                length < distances.get(j, math.inf)
                and LineString([nodes[i], nodes[j]]).intersection(near).length < 1
            ):
                distances[j], before[j] = length, i
                heapq.heappush(queue, (length, j))
    return [begin, end]
