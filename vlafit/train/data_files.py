"""Notice data files that changed while a run was stopped; `datasets.stamps` does while it trains.

States, actions and instructions are compared by their hash. Frames are too many to be read, so that number,
size and time of their files are compared.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vlafit.datasets.stamps import stamp
from vlafit.errors import TrainingError
from vlafit.files import read_json_object, require_readable
from vlafit.train.data import Data

DELETE = "delete the file to continue"


@dataclass(frozen=True)
class DataFiles:
    """The files of one dataset."""

    files: int
    bytes: int
    newest_ns: int
    """When the newest of them was written."""


def facts(data: Data) -> dict[str, dict[str, int]]:
    """Return the facts about each dataset's files for run.json, by the card's name."""
    totals = {}
    for store in data.stores:
        stamps = [stamp(path) for path in store.files()]
        sizes, times = [size for size, _ in stamps], [time for _, time in stamps]
        totals[store.card.name] = asdict(DataFiles(len(stamps), sum(sizes), max(times, default=0)))
    return totals


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


def _recorded(out: Path) -> dict[str, dict[str, int]]:
    path = out / "run.json"
    if not path.is_file():
        return {}
    require_readable(path)
    content = read_json_object(path, TrainingError, DELETE)
    try:
        return {
            str(name): asdict(DataFiles(**value)) for name, value in content.get("data_files", {}).items()
        }
    except (TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: data_files is damaged ({error!r}); {DELETE}") from error


def _text(totals: Mapping[str, int]) -> str:
    return f"{totals['files']} files of {totals['bytes']:,} bytes"
