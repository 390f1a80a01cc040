"""Dataset layouts: how the files of a recorded dataset are arranged, one module each.

A layout is named by its module here, by the name of an entry point in the group `vlafit.layouts`, or by the
path of a module elsewhere. The module offers

- `Section`: a frozen dataclass, the layout's own table in a card (the table has the module's name);
- `INSTRUCTIONS`: the values of `instruction.source` that the layout can read, its default first ("": none);
- `recognise(path) -> bool`: whether the file or folder at `path` has this layout, by its content;
- `open(card) -> EpisodeStore`: the dataset of a card, or DataError saying where the files differ from it;
- `describe(path) -> Draft` (optional): a card drafted from the files, what was guessed and what is missing;
- `open_in_place(card, files)` (optional): the dataset of a card whose path is the URL of a folder with
  meta/info.json, of which each file is copied when it is read. Of other layouts all files are copied first.
"""

import pkgutil
from itertools import islice
from pathlib import Path
from types import ModuleType

from vlafit.entry_points import import_outside, is_module, offered
from vlafit.errors import ConfigError, DataError, did_you_mean

GROUP = "vlafit.layouts"
MOST_FOLDERS = 1000  # looked into two levels below a folder that no layout recognises
REQUIRED = ("Section", "INSTRUCTIONS", "recognise", "open")


def names() -> list[str]:
    """Return the layouts that ship."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def installed() -> dict[str, str]:
    """Return the layouts that other installed packages offer: name -> module."""
    return {point.name: point.value for point in offered(GROUP)}


def load(name: str) -> ModuleType:
    """Import the module of a layout. Raises ConfigError if it is missing or incomplete."""
    others = installed()
    if name in names():
        path = f"{__name__}.{name}"
    elif name in others:
        path = others[name]
    elif "." in name or is_module(name):
        path = name
    else:
        known = [*names(), *others]
        hint = did_you_mean(name, known, listed=False) or f"; there are {', '.join(known)}"
        raise ConfigError(
            f"there is no layout {name!r}{hint}, or the path of a module of yours (my_lab.my_layout)"
        )
    try:
        module = import_outside(path, f"layout {name!r}")
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
    try:
        refuse_others(path)
        matches = [name for name in [*names(), *installed()] if load(name).recognise(path)]
    except OSError as error:
        raise DataError(
            f"{path}: cannot be looked through ({error}); name the dataset's own folder, which you may read"
        ) from error
    if len(matches) > 1 and "generic" in matches:
        matches.remove("generic")  # it takes any HDF5 file
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise DataError(f"{path}: could be {' or '.join(matches)}; write a card that names its layout")
    refuse_others(path, deeper=True)
    raise DataError(
        f"{path}: no layout recognises it (tried {', '.join([*names(), *installed()])}); "
        "name it in a card (layout = ...). A layout of your own (docs/extending.md) is named by its module's "
        "path, in a card or as --layout my_lab.my_layout of vlafit data card and inspect, or tried like ours "
        "once a package offers it by an entry point of the group vlafit.layouts"
    )


def refuse_others(path: Path, *, deeper: bool = False) -> None:
    """Raise DataError naming a converter if the dataset is RLDS or zarr, which no layout here reads.

    `deeper`: also if there is one two folders below, or a zipped one in a folder, where no layout is there.
    """
    inside = [path, *_folders(path)]
    if deeper:
        inside += list(islice((below for folder in inside[1:] for below in _folders(folder)), MOST_FOLDERS))
        inside += [file for folder in inside for file in sorted(folder.glob("*.zarr.zip"))[:1]]
    for folder in inside:
        if folder.suffix == ".zarr" or any(
            (folder / n).exists() for n in (".zgroup", ".zarray", "zarr.json")
        ):
            kind, converter = "zarr", "https://github.com/34328/umi2lerobot (UMI and diffusion policy)"
        elif folder.name.endswith(".zarr.zip"):
            kind, converter = "zarr", "unzip it, then https://github.com/34328/umi2lerobot"
        elif folder.is_dir() and any(folder.glob("*.tfrecord*")):
            described = any((folder / name).is_file() for name in ("dataset_info.json", "features.json"))
            kind = "RLDS" if described else "tfrecord"
            converter = "https://github.com/Tavish9/any4lerobot (openx2lerobot)"
        elif folder.is_file() and ".tfrecord" in folder.name:
            kind, converter = "RLDS", "https://github.com/Tavish9/any4lerobot (openx2lerobot)"
        else:
            continue
        raise DataError(
            f"{folder if deeper else path}: is a {kind} dataset, which vlafit does not read; convert it to "
            f"LeRobot, for example with {converter}"
        )


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
