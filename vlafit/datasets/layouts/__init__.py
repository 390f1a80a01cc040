"""Dataset layouts: how the files of a recorded dataset are arranged, one module each.

A layout is named by its module here, by the name of an entry point in the group `vlafit.layouts`, or by the
dotted path of a module elsewhere. The module offers

- `Section`: a frozen dataclass, the layout's own table in a card (the table has the module's name);
- `INSTRUCTIONS`: the values of `instruction.source` that the layout can read, its default first;
- `recognise(path) -> bool`: whether the file or folder at `path` has this layout, by its content;
- `open(card) -> EpisodeStore`: the dataset of a card, or DataError saying where the files differ from it;
- `describe(path) -> Draft` (optional): a card drafted from the files, with what was guessed in it.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from vlafit.errors import ConfigError, DataError, did_you_mean

GROUP = "vlafit.layouts"
REQUIRED = ("Section", "INSTRUCTIONS", "recognise", "open")


def names() -> list[str]:
    """Return the layouts that ship."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def installed() -> dict[str, str]:
    """Return the layouts that other installed packages offer: name -> module."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


def load(name: str) -> ModuleType:
    """Import the module of a layout. Raises ConfigError if it is missing or incomplete."""
    others = installed()
    if name in names():
        path = f"{__name__}.{name}"
    elif name in others:
        path = others[name]
    elif "." in name:
        path = name
    else:
        known = [*names(), *others]
        hint = did_you_mean(name, known, listed=False) or f"; there are {', '.join(known)}"
        raise ConfigError(f"there is no layout {name!r}{hint}, or the dotted path of a module of yours")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise ConfigError(f"layout {name!r}: cannot import {path}: {error}") from error
    missing = [part for part in REQUIRED if part not in vars(module)]
    if missing:
        raise ConfigError(f"layout {name!r}: module {path} does not define {', '.join(missing)}")
    return module


def section_name(name: str) -> str:
    """Return the name of the layout's own table in a card: the last part of a dotted path."""
    return name.rsplit(".", 1)[-1]


def recognise(path: Path) -> str:
    """Return the layout of the file or folder at `path`; those that ship are tried before installed ones.

    Raises DataError if no layout, or more than one, recognises it.
    """
    if not path.exists():
        raise DataError(f"{path}: nothing is there")
    matches = [name for name in [*names(), *installed()] if load(name).recognise(path)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise DataError(f"{path}: could be {' or '.join(matches)}; write a card that names its layout")
    raise DataError(
        f"{path}: no layout recognises it (tried {', '.join([*names(), *installed()])}); write a card that "
        "names its layout, or a layout of your own (docs/extending.md)"
    )
