"""Policies, layouts and formats that others offer: entry points of installed packages, and plain modules."""

import hashlib
import importlib
import re
import sys
import traceback
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from vlafit.errors import ConfigError, VlafitError, brief

_OUTSIDE: dict[str, str] = {}
"""Modules outside vlafit that were imported by their name -> what they are, such as a layout."""


def offered(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of `group`, sorted by name.

    Reading the metadata of every installed package takes some 50 ms, so the answer is kept for as long as
    `sys.path` stays the same: a package installed while the program runs is seen at its next start.
    """
    return _read(group, tuple(sys.path))


@lru_cache(maxsize=32)
def _read(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    del path  # only part of the key
    return tuple(sorted(entry_points(group=group), key=lambda point: point.name))


def is_module(name: str) -> bool:
    """Return whether `name` is a module on Python's path; only packages that it is in are imported."""
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return name in sys.modules or find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that it would be in
        return False


def note_outside(module: str, what: str) -> None:
    """Remember that code of `module` runs as `what`, so that `blame` can name it."""
    if module.partition(".")[0] != "vlafit":
        _OUTSIDE[module] = what


def import_outside(path: str, what: str) -> ModuleType:
    """Import a module that a name stands for. Raises ConfigError if its code fails, ImportError as usual."""
    note_outside(path, what)
    try:
        return importlib.import_module(path)
    except (ImportError, VlafitError):
        raise
    except Exception as error:  # whatever the code of somebody else raises
        raise ConfigError(f"{what}: importing {path} fails: {brief(error)}; fix the module") from error


def outside_hashes() -> dict[str, str]:
    """Return the hash of the file of each module outside vlafit that was imported by its name; "" without."""
    hashes = {}
    for name in sorted(_OUTSIDE):
        file = getattr(sys.modules.get(name), "__file__", None)
        kept = file is not None and Path(file).is_file()  # it may have been removed since
        hashes[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and kept else ""
    return hashes


def blame(error: BaseException) -> str:
    """Return where in code from outside vlafit an error arose, and as what it ran; "" if it did nowhere."""
    places: list[tuple[str, str, int | None, str]] = []  # module, file, line, function
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
        places.append((name, frame.f_code.co_filename, line, frame.f_code.co_name))
    modules = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    for file, line, function in _FRAME.findall(str(error)):  # of a dataloader's process
        places.append((modules.get(file, ""), file, int(line), function))
    for name, file, line, function in reversed(places):
        if what := _what(name):
            return f"{what} failed in {function}, {file}, line {line}"
    return ""


def _what(module: str) -> str:
    """Return what a module is, or one that was imported from its package; "" for code of vlafit."""
    packages = {name.rpartition(".")[0] or name: what for name, what in _OUTSIDE.items()}
    below = (what for package, what in packages.items() if f"{module}.".startswith(f"{package}."))
    return _OUTSIDE.get(module) or next(below, "")


_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)')
