"""Read the numbers of an offline evaluation, held against the saved samples that they are computed from."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlafit.errors import ConfigError, brief
from vlafit.offline.folder import RESULT, SAMPLES, load_parts, read_result
from vlafit.offline.numbers import NOT_SHOWN, Measured, summarise
from vlafit.types import Feature

TOLERANCE = 1e-6  # relative: sums in another order, of another version of numpy


def read_checked(folder: Path) -> dict[str, Any]:
    """Return result.json as `read_result` does, once every number of it was computed again from samples/.

    Raises ConfigError naming the first that differs. A copy without samples/ is returned as it is.
    """
    folder = Path(folder)
    result = read_result(folder)
    if not (folder / SAMPLES).is_dir():
        return result
    try:
        if len(result["episodes"]) == 1:  # an earlier version called the better of two means the verdict
            for compared in filter(None, result["compared"].values()):
                compared["verdict"] = NOT_SHOWN
        joints = result["joints"]
        feature = Feature(
            "action",
            (len(joints),),
            labels=tuple(str(j["name"]) for j in joints),
            unit=str(joints[0]["unit"]),
        )
        measured = Measured(
            {str(name): load_parts(folder, str(name)) for name in result["episodes"]},
            np.asarray(result["deviation"], np.float64),
            feature,
            tuple(map(str, result["inputs"])),
        )
        found = next(_differences("", result, summarise(measured)), "")
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{folder / RESULT}: damaged ({brief(error)}); remove it, and evaluate again with --resume"
        ) from error
    if found:
        raise ConfigError(
            f"{folder / RESULT}: {found}; one of the two was changed: put it back, or remove {RESULT} and "
            "evaluate again with --resume, which keeps the samples"
        )
    return result


def _differences(where: str, stated: object, found: object) -> Iterator[str]:
    """Yield each value of `found`, at any depth, that is stated otherwise."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            known = stated[key] if isinstance(stated, Mapping) and key in stated else None
            yield from _differences(f"{where}.{key}" if where else str(key), known, value)
    elif isinstance(found, Sequence) and not isinstance(found, str):
        values = list(stated) if isinstance(stated, Sequence) and not isinstance(stated, str) else []
        if len(values) != len(found):
            yield f"{where} has {len(values)} values, but by {SAMPLES}/ it has {len(found)}"
            return
        for number, (one, other) in enumerate(zip(values, found, strict=True)):
            yield from _differences(f"{where}[{number}]", one, other)
    elif not _equal(stated, found):
        yield f"{where} is {stated}, but by {SAMPLES}/ it is {found}"


def _equal(stated: object, found: object) -> bool:
    numbers = (int, float)
    if isinstance(found, numbers) and not isinstance(found, bool):
        if not isinstance(stated, numbers) or isinstance(stated, bool):
            return False
        return math.isclose(stated, found, rel_tol=TOLERANCE, abs_tol=1e-9)
    return stated == found
