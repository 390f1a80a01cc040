"""Make observations of plain values, or name everything in which they are not those of the robot.

Lists, tensors and other dtypes are accepted where only one thing can be meant: numbers of any kind for the
state, whole numbers from 0 to 255 for pixels. Nothing is resized, transposed, reordered or filled in. Local
actors, clients, servers and the control loop all check here.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import EmbodimentError, brief, did_you_mean, quoted
from vlafit.types import Embodiment, Feature, Observation

# unknown names in an error, and characters of each: whoever sends thousands reads few
LISTED, LONGEST = 8, 80
LONGEST_INSTRUCTION = 100_000  # characters; no policy takes so many tokens
IMPLICIT_BATCH = "remove the axis of length 1 in front"


def observation(
    images: Any,
    state: Any,
    instruction: Any,
    embodiment: Embodiment,
    *,
    required: Collection[str] = (),
    instructed: bool = True,
) -> Observation:
    """Return the observation, or raise EmbodimentError naming every difference from `embodiment`.

    `images` maps camera names to pixels; None says that a camera is missing at this moment. `required` are
    the cameras that must be named. A policy that is not `instructed` may be told nothing.
    """
    problems: list[str] = []
    pictures: dict[str, NDArray[np.uint8]] = {}
    cameras = {camera.name: camera for camera in embodiment.cameras}
    if not isinstance(images, Mapping):
        problems.append(f"images: must be a map of cameras to pixels, not {short(images)}")
        images = dict.fromkeys(required)
    unknown = [str(name) for name in images if name not in cameras]
    problems += listed_unknown("camera", "the robot has none of this name", unknown, cameras)
    for name, pixels in images.items():
        if name in cameras and pixels is not None:
            picture = _picture(cameras[name], pixels, problems)
            if picture is not None:
                pictures[name] = picture
    for name in required:
        if name not in images:
            height, width = cameras[name].shape[:2]
            problems.append(
                f"camera {name!r}: missing; send uint8 [{height}, {width}, 3], or None while it is out"
            )
    numbers = _numbers(embodiment.state, state, problems)
    if instruction is None and not instructed:
        instruction = ""
    problems += instruction_problems(instruction, instructed)
    if problems or numbers is None:
        listed = "\n  ".join(problems)
        raise EmbodimentError(f"the observation is not one of the robot {embodiment.name!r}:\n  {listed}")
    return Observation(pictures, numbers, str(instruction))


def instruction_problems(instruction: Any, instructed: bool = True) -> list[str]:
    """Return what is wrong with an instruction, at most one line."""
    if not isinstance(instruction, str) or (instructed and not instruction.strip()):
        return [f"instruction: must be a sentence, not {short(instruction)}"]
    if len(instruction) > LONGEST_INSTRUCTION:
        return [f"instruction: has {len(instruction)} characters; at most {LONGEST_INSTRUCTION} are read"]
    if not is_unicode(instruction):
        return [f"instruction: {short(instruction)} holds characters that are not valid Unicode"]
    return []


def is_unicode(text: str) -> bool:
    """Return whether the text can be written as UTF-8: half a pair of surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def listed_unknown(
    what: str, problem: str, names: Sequence[str], known: Iterable[str], otherwise: str = ""
) -> list[str]:
    """Return a line for each unknown name with the nearest one that is known; a handful stand for many."""
    lines = []
    for name in names[:LISTED]:
        near = did_you_mean(name[:LONGEST].rpartition("/")[2], known, listed=False) or otherwise
        lines.append(f"{what} {name[:LONGEST]!r}: {problem}{near}")
    if len(names) > LISTED:
        lines.append(f"and {len(names) - LISTED} more of the kind")
    return lines


def _picture(camera: Feature, pixels: Any, problems: list[str]) -> NDArray[np.uint8] | None:
    where = f"camera {camera.name!r}"
    array = as_numbers(f"{where}: pixels", pixels, problems)
    if array is None:
        return None
    wrong = _shape_problem(array.shape, camera.shape)
    if array.shape == (camera.shape[2], *camera.shape[:2]):
        wrong = f"has shape {array.shape}, channels first; send {camera.shape}, channels last"
    elif wrong and array.shape[2:] == camera.shape[2:] and min(array.shape):
        have, wanted = array.shape, camera.shape
        if have[0] * wanted[1] == have[1] * wanted[0]:
            wrong += (
                "; scale it to that size (`vlafit serve --resize` does, for openpi's and vla-eval's clients)"
            )
    if wrong:
        problems.append(f"{where}: {wrong}")
        return None
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f":
        problems.append(
            f"{where}: pixels are {array.dtype}, whose range nobody can tell; send uint8 from 0 to 255"
        )
        return None
    if array.min(initial=0) < 0 or array.max(initial=0) > 255:
        problems.append(
            f"{where}: pixels reach from {array.min()} to {array.max()}; send uint8 from 0 to 255"
        )
        return None
    return array.astype(np.uint8)


def _numbers(column: Feature, values: Any, problems: list[str]) -> NDArray[np.float32] | None:
    if values is None:
        problems.append(f"state: missing; send float32 {list(column.shape)}{_labels(column)}")
        return None
    array = as_numbers("state:", values, problems)
    if array is None:
        return None
    wrong = _shape_problem(array.shape, column.shape)
    if wrong:
        problems.append(f"state: {wrong}{_labels(column)}")
        return None
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, and is refused
        narrow = array.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(narrow))[:8]
    if len(bad):
        which = ", ".join(column.labels[i] if column.labels else str(i) for i in bad)
        what = "beyond float32" if np.isfinite(array[bad]).all() else "not finite"
        problems.append(f"state: {what} in dimension {which}: {array[bad].tolist()}")
        return None
    return narrow


def _shape_problem(have: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if have == wanted:
        return ""
    advice = f"; {IMPLICIT_BATCH}" if have == (1, *wanted) else ""
    return f"has shape {have}, the robot's is {wanted}{advice}"


def _labels(column: Feature) -> str:
    return f" ({', '.join(column.labels)})" if column.labels else ""


def as_numbers(where: str, values: Any, problems: list[str]) -> NDArray | None:
    """Return integers or floats as an array. None, and a line more in `problems`, for anything else."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal lengths
        problems.append(f"{where} must be numbers, not {short(values)} of unequal lengths")
        return None
    except Exception as error:  # of the class of `values`: a tensor with gradients or on a GPU, say
        problems.append(f"{where} must be numbers; {short(values)} is no array: {brief(error)}")
        return None
    if array.dtype.kind not in "iuf":
        is_array = isinstance(values, list | tuple)
        kind = f"{array.dtype} {array.shape}" if is_array and array.dtype != object else short(values)
        problems.append(f"{where} must be numbers, not {kind}")
        return None
    if np.ma.is_masked(values):
        problems.append(f"{where} must be numbers, and some are masked")
        return None
    return array


def short(value: Any) -> str:
    """Return what a value is, in a few words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return quoted(value, 60) if isinstance(value, str | int | float | bool | None) else type(value).__name__
