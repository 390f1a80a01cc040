"""Notice data files that changed while a run was stopped; `datasets.stamps` does while it trains.

States, actions and instructions are compared by their hash. Frames are too many to be read, so that number,
size and time of their files are compared, and what the cards say about cameras.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlafit.datasets.framing import NOT_STATED, reading
from vlafit.errors import TrainingError, brief
from vlafit.files import read_json_object, require_readable
from vlafit.train.data import Data

YOUNGER = (" unit", " names", " conversion")  # points that the records of older runs lack
DELETE = "delete the file to continue"


@dataclass(frozen=True)
class DataFiles:
    """The files of one dataset."""

    files: int
    bytes: int
    newest_ns: int
    """When the newest of them was written."""


def facts(data: Data) -> dict[str, dict[str, int]]:
    """Return the facts about each dataset's files for run.json, by the name of the card or set."""
    stamps = {store.card.name: [at for _, at in store.stamps()] for store in data.stores}
    stamps |= {one.name: one.stamps() for one in data.vision_language}
    return {
        name: asdict(DataFiles(len(own), sum(size for size, _ in own), max((t for _, t in own), default=0)))
        for name, own in stamps.items()
    }


def readings(data: Data) -> dict[str, dict[str, str]]:
    """Return how each card reads cameras and relative actions for run.json, by the card's name."""
    return {card.name: reading(card) for card in data.cards}


def require_same_readings(out: Path, now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Compare with what run.json in `out` says of the run's last session, and return warnings.

    Raises TrainingError for a card that says something else about a camera, relative actions, a unit or the
    names of dimensions; where it said nothing before, that is a warning, as the values are the same. A run
    that is older than such a record has none, or none of units or names.
    """
    warnings = []
    recorded = _content(out).get("data_read", {})
    if not isinstance(recorded, dict) or not all(isinstance(stated, dict) for stated in recorded.values()):
        raise TrainingError(f"{out / 'run.json'}: data_read is damaged; {DELETE}")
    for name, then in recorded.items():
        current = now.get(name, then)
        changed = [
            f"{point} was {then.get(point, 'not there')!r}, is now {current.get(point, 'not there')!r}"
            for point in dict.fromkeys([*then, *current])
            if then.get(point) != current.get(point)
            and then.get(point) != NOT_STATED
            and not (point.endswith(YOUNGER) and point not in then)
        ]
        warnings += [
            f"card {name!r} says since the run began what it did not state before: {point}: "
            f"{current.get(point)!r}; the run's checkpoints do not state it, and its values are taken "
            "as before"
            for point, stated in then.items()
            if stated == NOT_STATED != current.get(point, NOT_STATED)
        ]
        if changed:
            raise TrainingError(
                f"{out}: card {name!r} changed since the run began: {'; '.join(changed)}. Restore the card, "
                "or start a new run with --out"
            )
    return warnings


def changes(out: Path, now: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Compare with what run.json in `out` says of the run's last session, and return warnings.

    Raises TrainingError for another number of files or bytes. Copied files have another time, too, so that a
    time is only a warning. A run that is older than such facts has none.
    """
    warnings = []
    for name, then in _recorded(out).items():
        current = now.get(name)
        if current is None or current == then:
            continue
        if (current["files"], current["bytes"]) != (then["files"], then["bytes"]):
            raise TrainingError(
                f"{out}: the data changed since the run began: dataset {name!r} had {_text(then)}, and now"
                f" has {_text(current)}; restore them, or start a new run with --out"
            )
        warnings.append(
            f"files of dataset {name!r} were written while the run was stopped, with the same size: unless"
            " they were only copied, the run was trained on both"
        )
    return warnings


def _content(out: Path) -> dict[str, Any]:
    path = out / "run.json"
    if not path.is_file():
        return {}
    require_readable(path)
    return read_json_object(path, TrainingError, DELETE)


def _recorded(out: Path) -> dict[str, dict[str, int]]:
    recorded = _content(out).get("data_files", {})
    try:
        return {str(name): asdict(DataFiles(**value)) for name, value in recorded.items()}
    except (TypeError, AttributeError) as error:
        raise TrainingError(
            f"{out / 'run.json'}: data_files is damaged ({brief(error)}); {DELETE}"
        ) from error


def _text(totals: Mapping[str, int]) -> str:
    return f"{totals['files']} files of {totals['bytes']:,} bytes"
