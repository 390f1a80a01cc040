"""Blank one input of an observation at a time: a policy whose answer does not change ignores that input."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlafit.requests import Expected
from vlafit.types import Embodiment, Observation

GREY = 128  # of a blanked picture: neither dark nor bright
WORDLESS = "."  # of a blanked instruction; the codec refuses an empty one
INSTRUCTION, STATE, CAMERA = "instruction", "state", "camera "


def inputs_of(robot: Embodiment) -> tuple[str, ...]:
    """Return the inputs that `blank` knows: the instruction, each camera, the state."""
    return (INSTRUCTION, *(CAMERA + camera.name for camera in robot.cameras), STATE)


def read_by(expected: Expected) -> tuple[str, ...]:
    """Return the inputs that an actor reads, in the same order."""
    words = (INSTRUCTION,) * expected.instructed
    return (*words, *(CAMERA + name for name in expected.seen), STATE)


def blank(observation: Observation, name: str, mean_state: NDArray[np.float32]) -> Observation:
    """Return the observation, and its past, without one input.

    A camera shows grey, the state is `mean_state`, the instruction says nothing. Raises ValueError for
    another name.
    """
    past = tuple(blank(earlier, name, mean_state) for earlier in observation.past)
    if name == INSTRUCTION:
        return replace(observation, instruction=WORDLESS, past=past)
    if name == STATE:
        return replace(observation, state=mean_state, past=past)
    camera = name.removeprefix(CAMERA)
    if camera == name:
        raise ValueError(f"there is no input {name!r}")
    images = {
        key: np.full_like(image, GREY) if key == camera else image
        for key, image in observation.images.items()
    }
    return replace(observation, images=images, past=past)
