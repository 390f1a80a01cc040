"""Check what goes into a simulation and what comes out: seeds, actions, observations, flags."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import SimulationError
from vlafit.types import Embodiment, Env, Observation


def check_action(action: NDArray, size: int, where: str) -> NDArray[np.float32]:
    """Return `action` as float32 [size]. Raises SimulationError for a wrong shape or non-finite values."""
    array = np.asarray(action)
    if array.shape != (size,) or array.dtype.kind not in "fiu":
        raise SimulationError(
            f"{where}: an action must be {size} numbers, got shape {array.shape} of {array.dtype}; "
            "pass one step, not a chunk, in the robot's units"
        )
    if not np.isfinite(array).all():
        raise SimulationError(f"{where}: the action {array.tolist()} is not finite; the policy has diverged")
    return array.astype(np.float32)


def check_observation(observation: object, robot: Embodiment, where: str, *, images: bool) -> Observation:
    """Return the observation with its state as float32, or raise SimulationError with all that is wrong.

    `images`: every camera of the robot must have an image; without it, those that are there are checked.
    """
    if not isinstance(observation, Observation):
        raise SimulationError(
            f"{where}: the environment returned {type(observation).__name__} instead of an Observation"
        )
    problems = []
    state = np.asarray(observation.state)
    if state.dtype.kind not in "fiu":
        problems.append(f"state: must be float32 {list(robot.state.shape)}, is {state.dtype}")
    elif state.shape != robot.state.shape:
        problems.append(f"state: has shape {state.shape}, the robot's is {robot.state.shape}")
    elif not np.isfinite(state := state.astype(np.float32)).all():
        problems.append(f"state: not finite: {state.tolist()}")
    cameras = {camera.name: camera.shape for camera in robot.cameras}
    for name, picture in observation.images.items():
        if name not in cameras:
            problems.append(f"camera {name!r}: the robot has none of this name")
        elif not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
            kind = picture.dtype if isinstance(picture, np.ndarray) else type(picture).__name__
            problems.append(f"camera {name!r}: must be uint8, is {kind}")
        elif picture.shape != cameras[name]:
            problems.append(f"camera {name!r}: has shape {picture.shape}, the robot's is {cameras[name]}")
    missing = [name for name in cameras if name not in observation.images] if images else []
    problems += [f"camera {name!r}: its image is missing" for name in missing]
    if problems:
        listed = "; ".join(problems)
        raise SimulationError(
            f"{where}: the environment's observation is not one of its robot {robot.name!r}: {listed}"
        )
    return replace(observation, state=state)


def missing_start(env: Env, task: str, seeds: range) -> str:
    """Return why one of the seeds is no start of a task; "" if all are.

    A simulation with a limited number of starts says so by a method of this name and these arguments, which
    begins no episode; one without it has a start for every seed.
    """
    said = getattr(env, "missing_start", None)
    reason = said(task, seeds) if callable(said) else ""
    if not isinstance(reason, str):
        raise SimulationError(
            f'missing_start({task!r}, {seeds}) must return a sentence or "", not {reason!r}'
        )
    return reason


def check_flag(value: object, name: str, where: str) -> bool:
    """Return what an environment reports as `name`. Raises SimulationError unless it is a bool."""
    if not isinstance(value, bool | np.bool_):
        raise SimulationError(f"{where}: the environment reports {name} = {value!r}, which is not a bool")
    return bool(value)
