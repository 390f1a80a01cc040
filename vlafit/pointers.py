"""Find the checkpoint that a run's folder, or one of its pointers (last, best), leads to."""

from pathlib import Path

from vlafit.errors import ConfigError
from vlafit.files import parse_json


def in_run(path: Path) -> Path | None:
    """Return the checkpoint's folder for a run's folder (its last), ``RUN/checkpoints/best`` or ``last``.

    None where `path` is neither. Raises ConfigError where a pointer is damaged or leads nowhere.
    """
    for pointer in (path / "checkpoints" / "last.json", path.parent / f"{path.name}.json"):
        if pointer.is_file() and pointer.parent.name == "checkpoints":
            return _follow(pointer)
    return None


def _follow(pointer: Path) -> Path:
    try:
        folder = pointer.parent / parse_json(pointer.read_text(encoding="utf-8"))["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{pointer}: damaged ({error!r}); name the checkpoint's own folder") from error
    if not (folder / "policy.json").is_file():
        raise ConfigError(f"{pointer} points to {folder}, which is no checkpoint; name another one")
    return folder
