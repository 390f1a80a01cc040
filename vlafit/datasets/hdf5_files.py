"""Open HDF5 files and find what is in them; errors name file, key and remedy."""

import errno
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from vlafit import files
from vlafit.errors import DataError, VlafitError, did_you_mean

SUFFIXES = (".hdf5", ".h5")
DEEPEST = 3  # folders below the one that is named
ORIGIN = "${ORIGIN}"
"""How HDF5 names the folder of the file that is read, in a prefix of file names."""
RAW_PREFIX, VIRTUAL_PREFIX = PREFIXES = ("HDF5_EXTFILE_PREFIX", "HDF5_VDS_PREFIX")
"""Environment variables by which HDF5 looks for raw files, and for sources of virtual datasets, elsewhere."""
HDF5_ERRORS = (KeyError, OSError, RuntimeError, TypeError, ValueError)
"""Errors that h5py raises for damage inside a file."""


def shared_folder(paths: Sequence[Path]) -> Path:
    """Return the folder that all files share."""
    folders = [path.parent.parts for path in paths]
    shared = 0
    while all(len(f) > shared for f in folders) and len({f[shared] for f in folders}) == 1:
        shared += 1
    return Path(*folders[0][:shared])


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which demo_2 comes before demo_10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    ]


def names_of(paths: Sequence[Path], root: Path) -> list[str]:
    """Name each file by its path below `root`, without suffix."""
    return [path.relative_to(root).with_suffix("").as_posix() for path in paths]


def open_file(path: Path) -> h5py.File:
    """Open a file to read. Raises DataError with the remedy that fits.

    Without a chunk cache: a frame is a chunk, so a cache of 8 MiB for each dataset only costs memory. By its
    true path, because HDF5 looks for what a file names beside the path by which it was opened.
    """
    files.require_readable(path)
    try:
        return h5py.File(path.resolve(), "r", rdcc_nbytes=0)
    except OSError as error:
        raise DataError(f"{path}: {_remedy(str(error))}") from None


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """Open a file to read and close it; errors of h5py until then are a DataError that names the file."""
    with damage_named(str(path)), open_file(path) as file:
        yield file


@contextmanager
def damage_named(where: str) -> Iterator[None]:
    """Raise the errors that h5py raises in this block as a DataError; errors of other code pass."""
    try:
        yield
    except HDF5_ERRORS as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        if "h5py" not in Path(innermost).parts and not isinstance(error, OSError | RuntimeError):
            raise
        raise DataError(f"{where}: is damaged ({_text(error)}); fetch or record it again") from error


def _text(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _remedy(message: str) -> str:
    reason = message.split("(", 1)[-1].rstrip(")")
    if "already open for write" in message or "consistency flags" in message:
        return (
            "was not closed by the program that wrote it, or is still being written; if no program "
            "has it open, h5clear -s FILE clears the mark (work on a copy)"
        )
    if "unable to lock" in message or any(
        f"errno = {code}" in message for code in (errno.EAGAIN, errno.ENOLCK)
    ):
        return (
            f"cannot be locked ({reason}): another program has it open to write, or the file system knows no "
            "locks; then set HDF5_USE_FILE_LOCKING=FALSE"
        )
    return (
        f"cannot be read as HDF5 ({reason}); a download or recording that was cut short? Fetch or record it "
        "again"
    )


def item_at(group: h5py.Group, key: str) -> object:
    """Return what is at `key`; None if nothing is, or a link leads nowhere.

    Raw files that a dataset names by relative paths are those beside its file, where HDF5 would otherwise
    read from the current folder. If it is damaged, an error of h5py is raised, which h5py's `get` hides.
    """
    try:
        item = group.get(key)
        if item is None and key in group and isinstance(group.get(key, getlink=True), h5py.HardLink):
            item = group[key]
    except HDF5_ERRORS as error:
        if "external file prefix" not in str(error):
            raise
        return _with_raw_files_beside(group, key)  # it is open already, in another store
    if not isinstance(item, h5py.Dataset) or all(os.path.isabs(name) for name, *_ in item.external or ()):
        return item
    file, name = item.file, str(item.name)
    del item  # HDF5 opens no dataset with two prefixes at once
    return _with_raw_files_beside(file, name)


def _with_raw_files_beside(group: h5py.Group, key: str) -> h5py.Dataset:
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_efile_prefix(ORIGIN.encode())
    return h5py.Dataset(h5py.h5d.open(group.id, key.encode(), access))


def own_values(group: h5py.Group, key: str, where: str) -> Any:
    """Return the values of a small dataset of labels. Raises DataError if other files hold them."""
    dataset = item_at(group, key)
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{where}: {key} is no dataset")
    if dataset.external or dataset.is_virtual:
        raise DataError(
            f"{where}: {key} is stored in other files; write its values into {dataset.file.filename}"
        )
    return dataset[()]


def find(
    group: h5py.Group, key: str, where: str, fits: Callable[[h5py.Dataset], bool] = lambda _: True
) -> h5py.Dataset:
    """Return the dataset at `key`. Raises DataError, naming the nearest that `fits`, if there is none."""
    try:
        dataset = item_at(group, key)
    except HDF5_ERRORS as error:
        raise DataError(
            f"{where}: {key} cannot be opened ({_text(error)}); if it is damaged, fetch or record it again"
        ) from error
    if isinstance(dataset, h5py.Dataset):
        return dataset
    link = group.get(key, getlink=True) if key in group.keys() else None  # noqa: SIM118
    if isinstance(link, h5py.ExternalLink):
        raise DataError(f"{where}: {key} is a link to {link.filename}:{link.path}, which is not there")
    near = [name for name, dataset in datasets_below(group).items() if fits(dataset)]
    raise DataError(f"{where}: no dataset {key!r}{did_you_mean(key, near)}")


def datasets_below(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """Return the datasets of a group and of its groups, by path; without links to other files."""
    datasets: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            datasets[name] = item

    group.visititems(visit)
    return datasets


def first_file(path: Path) -> Path | None:
    """Return the HDF5 file at `path`, or the first in or below a folder that opens; None if there is none.

    Raises DataError naming each if none of several opens.
    """
    if not path.is_dir():
        return path if path.suffix in SUFFIXES else None
    closed = []
    for file in _files_below(path):
        faults = unreadable([file])
        if not faults:
            return file
        closed += faults
    if len(closed) == 1:
        return next(_files_below(path))  # it says what is wrong when it is opened
    if closed:
        raise DataError(f"{path}: none of its {len(closed)} HDF5 files can be opened: {'; '.join(closed)}")
    return None


def all_files(path: Path) -> list[Path]:
    """Return the HDF5 file at `path`, or those in and below a folder."""
    return list(_files_below(path)) if path.is_dir() else [path]


def unreadable(paths: Iterable[Path]) -> list[str]:
    """Return a sentence for each file that cannot be opened."""
    faults = []
    for path in paths:
        try:
            open_file(path).close()
        except VlafitError as error:
            faults.append(str(error))
    return faults


def _files_below(path: Path) -> Iterator[Path]:
    folders = [str(path)]
    for _ in range(DEEPEST + 1):
        below: list[str] = []
        for folder in folders:  # os.scandir: a LeRobot dataset has tens of thousands of other files
            with os.scandir(folder) as listing:
                entries = [e for e in listing if e.name.endswith(SUFFIXES) or "." not in e.name]
            for entry in sorted(entries, key=lambda e: e.name):
                if "." not in entry.name and entry.is_dir():
                    below.append(entry.path)
                elif "." in entry.name[1:] and not entry.name.startswith("."):
                    yield Path(entry.path)
        folders = below


def first_demo(data: h5py.Group) -> str:
    """Return the name of the first group of /data in natural order; empty if there is none."""
    names = sorted((str(n) for n in data if data.get(n, getclass=True) is h5py.Group), key=natural)
    whole = (n for n in names if f"{n}/obs" in data or f"{n}/actions" in data)
    return next(whole, names[0] if names else "")


def observations(data: h5py.Group) -> list[str]:
    """Return the names below `obs` of the first demonstration of /data."""
    groups = (item for item in data.values() if isinstance(item, h5py.Group))
    obs = next((group["obs"] for group in groups if "obs" in group), None)
    return list(obs) if isinstance(obs, h5py.Group) else []
