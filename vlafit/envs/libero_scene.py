"""Tell a scripted expert of a LIBERO task: the object to move, the place for it, and what is in the way.

Positions are in metres in the world. Only tasks with the single goal of one object on, or in, something else
have these facts (`libero_parts` has those of drawers and knobs); a policy never gets them.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type information)

from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

FINGERS = tuple(
    (f"gripper0_finger{number}_pad_collision", f"gripper0_finger{number}_collision") for number in (1, 2)
)  # a pad and the finger that holds it: a rim is often held by the latter
FINE, COARSE = 0.004, 0.01  # metres between points that are kept of the object, and of all else
SPACING, MOST_POINTS = 0.015, 40  # metres between points of a box, and most of them along a side


class PickAndPlace:
    """Facts about the one object that a task's goal moves, as `Observation.privileged` takes them."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain  # LIBERO's environment below its wrapper
        relation, moved, place = domain.parsed_problem["goal_state"][0]
        self._inside = relation == "in"
        self._body = domain.obj_body_id[moved]
        geoms = domain.objects_dict[moved].contact_geoms
        data, model = domain.sim.data._data, domain.sim.model._model
        self._geoms, self._fingers = geom_ids(model, geoms), [geom_ids(model, finger) for finger in FINGERS]
        rotation = data.xmat[self._body].reshape(3, 3)
        self._points = (
            thinned(collision_points(model, data, geoms), FINE) - data.xpos[self._body]
        ) @ rotation
        self._site = place if place in domain.object_sites_dict else ""
        parent = domain.object_sites_dict[place].parent_name if self._site else place
        self._room = domain.object_sites_dict[place].size[:2] if self._site else np.zeros(2)
        self._place = -1 if self._site else domain.obj_body_id[place]
        others = {**domain.objects_dict, **domain.fixtures_dict}
        shapes = others[parent].contact_geoms if parent in others else ()  # regions of a table have no parent
        around = [
            collision_points(model, data, body.contact_geoms)
            for name, body in others.items()
            if name != moved
        ]
        self._around = thinned(np.concatenate(around), COARSE)
        top = collision_points(model, data, shapes)[:, 2].max(initial=-np.inf)
        self._top = float(top if len(shapes) else self._position()[2])

    def facts(self) -> dict[str, NDArray[np.float64]]:
        """Return the facts at this step.

        `points` [n, 3]: the object's collision shapes; `object` [3]: its position; `place` [3]: where it is
        to be; `room` [2]: half the lengths of a region there, else 0; `inside` [1]: 1 if in a container,
        whose rim is at the height `rim` [1]; `around` [m, 3]: collision shapes of all else at the
        start; `base` [3]: of the robot; `hand` [3] and `hand_rotation` [3, 3]; `fingers` [2, 3]: their pads;
        `grasped` [1]: 1 if both touch the object.
        """
        domain, data = self._domain, self._domain.sim.data._data
        site = domain.robots[0].gripper.important_sites["grip_site"]
        rotation, position = data.xmat[self._body].reshape(3, 3), data.xpos[self._body]
        values = {
            "points": self._points @ rotation.T + position,
            "object": position,
            "place": self._position(),
            "inside": [self._inside],
            "rim": [self._top],
            "room": self._room,
            "around": self._around,
            "base": domain.robots[0].base_pos,
            "hand": domain.sim.data.get_site_xpos(site),
            "hand_rotation": domain.sim.data.get_site_xmat(site),
            "fingers": data.geom_xpos[[pad for pad, _ in self._fingers]],
            "grasped": [all(touches(data, finger, self._geoms) for finger in self._fingers)],
        }
        return {name: np.array(value, np.float64) for name, value in values.items()}

    def _position(self) -> NDArray[np.float64]:
        """Return where the object is to be."""
        data = self._domain.sim.data
        return data.get_site_xpos(self._site) if self._site else data._data.xpos[self._place]


def is_pick_and_place(domain: Any) -> bool:
    """Whether the goal of a task is one movable object on something, or in something that is open."""
    goal = domain.parsed_problem["goal_state"]
    if len(goal) != 1 or goal[0][0] not in ("on", "in") or goal[0][1] not in domain.objects_dict:
        return False
    site = domain.object_sites_dict.get(goal[0][2])
    shut = site is not None and site.joints and not domain.object_states_dict[goal[0][2]].is_open()
    return not (goal[0][0] == "in" and shut)


def touches(data: mujoco.MjData, finger: Sequence[int], geoms: Sequence[int]) -> bool:
    """Return whether one of a finger's geoms is in contact with one of `geoms`."""
    pairs = data.contact.geom  # [contacts, 2]
    other = pairs[:, ::-1][np.isin(pairs, finger)]
    return bool(np.isin(other, geoms).any())


def geom_ids(model: mujoco.MjModel, geoms: Sequence[str]) -> list[int]:
    return [mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, name) for name in geoms]


def collision_points(model: mujoco.MjModel, data: mujoco.MjData, geoms: Sequence[str]) -> NDArray[np.float64]:
    """Return points [n, 3] on the boxes around some geoms, as they stand now."""
    parts = [np.empty((0, 3))]
    for geom in geom_ids(model, geoms):
        centre, half = model.geom_aabb[geom].reshape(2, 3)
        counts = np.clip(np.ceil(2 * half / SPACING).astype(int) + 1, 4, MOST_POINTS)
        sides = (np.linspace(-1, 1, count) for count in counts)
        grid = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 3)
        surface = grid[np.abs(grid).max(1) == 1] * half + centre
        parts.append(surface @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(parts)


def thinned(points: NDArray[np.float64], spacing: float) -> NDArray[np.float64]:
    """Return one of the points in each cube of a grid."""
    _, chosen = np.unique(np.round(points / spacing).astype(np.int64), axis=0, return_index=True)
    return points[np.sort(chosen)]
