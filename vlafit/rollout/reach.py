"""Refuse a policy whose gripper cannot do what the robot's does, because it was learned in other units."""

from typing import Protocol as Structure
from typing import runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import EmbodimentError
from vlafit.types import Actor, Embodiment

NEAR = 1e-3  # of the ends of a gripper's range


@runtime_checkable
class RangedActor(Actor, Structure):
    """An actor that says between which values the actions of its training data lay."""

    action_range: tuple[NDArray, NDArray]
    """Least and greatest value of each dimension, in the robot's units; NaN where that is not known."""


def require_reach(actor: Actor | None, robot: Embodiment, robot_is: str) -> None:
    """Raise EmbodimentError where a dimension was learned from 0 to 1 and the robot's is from -1 to 1.

    So are the grippers of OpenVLA's data, 0 closed and 1 open: sent as they are to a robot that opens at -1,
    they would never open it. Robots that declare no range are not compared.
    """
    if not isinstance(actor, RangedActor) or not robot.action.low or not robot.action.high:
        return
    least, most = actor.action_range
    for number, (low, high) in enumerate(zip(robot.action.low, robot.action.high, strict=True)):
        learned = np.array([least[number], most[number]])
        if (low, high) == (-1, 1) and np.allclose(learned, (0, 1), rtol=0, atol=NEAR):
            name = robot.action.labels[number] if robot.action.labels else f"dimension {number}"
            raise EmbodimentError(
                f"the policy's action {name} was learned from 0 to 1, and that of {robot_is} is from -1 to "
                "1: sent as it is, it would never reach the other end. OpenVLA's data have 0 for a closed "
                "gripper and 1 for an open one; say what the robot takes for both, closed first: --config "
                "'openvla.gripper=[1, -1]' of eval and serve (LIBERO's)"
            )
