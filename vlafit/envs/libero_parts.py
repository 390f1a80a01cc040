"""Tell a scripted expert of a LIBERO task: the part of a fixture to move, by its joint.

Positions are in metres in the world, and the joint's in metres or radians. All is read from the model: the
joint's axis, the shapes of the part it moves, and the positions in which LIBERO says open, or on.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type information)

from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from vlafit.envs.libero_scene import COARSE, FINE, FINGERS, collision_points, geom_ids, thinned, touches

KINDS = {"open": "default_open_ranges", "turnon": "default_turnon_ranges"}  # LIBERO's predicate -> its range
UPRIGHT = 0.9  # of a joint's axis, along the vertical


class Part:
    """Facts about a drawer, or a knob, that a task's goal moves, as `Observation.privileged` takes them."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain  # LIBERO's environment below its wrapper
        model = domain.sim.model._model
        relation, name = domain.parsed_problem["goal_state"][0]
        joints, fixture = _joints(domain, name)
        self._joint = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, joints[0])
        self._slides = model.jnt_type[self._joint] == mujoco.mjtJoint.mjJNT_SLIDE
        body = model.jnt_bodyid[self._joint]
        names = domain.get_object(fixture).contact_geoms
        self._names = [geom for geom in names if model.geom_bodyid[geom_ids(model, [geom])[0]] == body]
        self._geoms = geom_ids(model, self._names)
        self._fingers = [geom_ids(model, finger) for finger in FINGERS]
        wanted = domain.get_object(fixture).object_properties["articulation"][KINDS[relation]]
        self._goal = sorted(wanted, key=lambda value: abs(value - self._position()))  # the nearer end first
        limits = model.jnt_range[self._joint]
        self._goal = [float(np.clip(value, *limits)) for value in self._goal]

    def facts(self) -> Mapping[str, NDArray[np.float64]]:
        """Return the facts at this step.

        `part` [n, 3]: collision shapes of the part; `around` [m, 3]: those of all else; `joint` [1]: its
        position; `joint_goal` [2]: the nearest and the furthest position that count; `joint_axis` [3] and
        `joint_anchor` [3]: of its motion; `slides` [1]: 1 if along the axis, 0 if around it; `held` [1]: 1 if
        both fingers touch the part; `hand` [3], `hand_rotation` [3, 3] and `fingers` [2, 3] as of a task with
        an object.
        """
        domain, data = self._domain, self._domain.sim.data._data
        model = domain.sim.model._model
        site = domain.robots[0].gripper.important_sites["grip_site"]
        others = {**domain.objects_dict, **domain.fixtures_dict}
        rest = [geom for body in others.values() for geom in body.contact_geoms if geom not in self._names]
        values = {
            "part": thinned(collision_points(model, data, self._names), FINE),
            "around": thinned(collision_points(model, data, rest), COARSE),
            "joint": [self._position()],
            "joint_goal": self._goal,
            "joint_axis": data.xaxis[self._joint],
            "joint_anchor": data.xanchor[self._joint],
            "slides": [self._slides],
            "held": [all(touches(data, finger, self._geoms) for finger in self._fingers)],
            "hand": domain.sim.data.get_site_xpos(site),
            "hand_rotation": domain.sim.data.get_site_xmat(site),
            "fingers": data.geom_xpos[[pad for pad, _ in self._fingers]],
        }
        return {key: np.array(value, np.float64) for key, value in values.items()}

    def _position(self) -> float:
        sim = self._domain.sim
        return float(sim.data._data.qpos[sim.model._model.jnt_qposadr[self._joint]])


def is_part(domain: Any) -> bool:
    """Whether the goal of a task is one part: a drawer that is open, or a knob on top that is turned on."""
    goal = domain.parsed_problem["goal_state"]
    if len(goal) != 1 or goal[0][0] not in KINDS:
        return False
    joints, _ = _joints(domain, goal[0][1])
    model, data = domain.sim.model._model, domain.sim.data._data
    if len(joints) != 1:
        return False
    joint = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, joints[0])
    slides = model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE
    upright = bool(abs(data.xaxis[joint][2]) > UPRIGHT)
    return slides and not upright if goal[0][0] == "open" else upright and not slides


def _joints(domain: Any, name: str) -> tuple[list[str], str]:
    """Return the joints that move `name`, a region of a fixture or a fixture, and the fixture's name."""
    if name in domain.object_sites_dict:
        site = domain.object_sites_dict[name]
        return site.joints or [], site.parent_name
    return domain.get_object(name).joints, name
