"""Policies, layouts and formats that others offer: entry points of installed packages, and plain modules."""

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec


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
