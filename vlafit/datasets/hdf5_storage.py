"""Find the files that hold an HDF5 dataset's bytes; refuse bytes from elsewhere, or that were never written.

A dataset may be virtual (put together from others, which may be virtual or links themselves) or lie in files
of raw bytes. What was allocated and not written reads as zeros, without an error.
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

from vlafit.datasets.hdf5_files import HDF5_ERRORS, ORIGIN, RAW_PREFIX, VIRTUAL_PREFIX, item_at, reading
from vlafit.errors import DataError
from vlafit.links import is_inside

DEEPEST = 16  # virtual datasets of virtual datasets
FILTERS = {
    32001: "Blosc",
    32004: "LZ4",
    32008: "bitshuffle",
    32013: "ZFP",
    32015: "Zstandard",
    32026: "Blosc2",
}


def require_readable(dataset: h5py.Dataset, roots: Sequence[Path], where: str) -> set[Path]:
    """Return the files that hold the bytes of a dataset.

    Raises DataError unless all of them can be read, lie below `roots`, and hold every row.
    """
    return _sources(dataset, Path(dataset.file.filename), roots, where, DEEPEST)


def _sources(dataset: h5py.Dataset, opened: Path, roots: Sequence[Path], where: str, depth: int) -> set[Path]:
    """Return the files of a dataset; `opened` is the path by which HDF5 opens its file."""
    file = opened.resolve()
    sources = {file}
    require_inside(file, roots, where)
    _require_filters(dataset, where)
    if dataset.is_virtual:
        if depth == 0:
            raise DataError(f"{where}: more than {DEEPEST} virtual datasets in a row; write the data out")
        sources |= _virtual_sources(dataset, opened, roots, where, depth)
    elif dataset.external:
        if depth < DEEPEST and not all(os.path.isabs(name) for name, *_ in dataset.external):
            raise DataError(
                f"{where}: a virtual dataset of values in a raw file that {file} names by a relative path "
                f"({dataset.external[0][0]}); HDF5 would read it from the current folder. Write the data out"
            )
        sources |= _raw_files(dataset, opened, roots, where)
    else:
        _require_written(dataset, where)
    return sources


def _raw_files(dataset: h5py.Dataset, opened: Path, roots: Sequence[Path], where: str) -> set[Path]:
    """Return the files of raw bytes of a dataset; together they must hold all of it."""
    sources, held = set(), 0
    for name, offset, size in dataset.external or ():
        raw = _beside(opened, name, where, RAW_PREFIX)
        require_inside(raw, roots, where)
        if not raw.is_file():
            raise DataError(f"{where}: its bytes are in {raw}, which is missing")
        length = raw.stat().st_size
        if size == h5py.h5f.UNLIMITED:
            size = max(0, length - offset)
        if length < offset + size:
            raise DataError(f"{where}: {raw} has {length} bytes of {offset + size}; fetch it again")
        held += size
        sources.add(raw.resolve())
    wanted = math.prod(dataset.shape) * dataset.id.get_type().get_size()
    if held < wanted:
        names = ", ".join(map(str, sorted(sources)))
        raise DataError(
            f"{where}: its shape {dataset.shape} needs {wanted} bytes, and {names} hold {held}; the others "
            "would be read as zeros. Fetch or record it again"
        )
    return sources


def _beside(opened: Path, name: str, where: str, variable: str) -> Path:
    """Return the file that HDF5 reads for a name in the file that it opens as `opened`.

    Raises DataError where HDF5 would look in another folder than that of the file: the environment variable
    comes first, and a link to the file is opened in the folder of the link here and in its own there.
    """
    if os.path.isabs(name):
        return Path(name)
    prefix = os.environ.get(variable, "")
    if prefix not in ("", ORIGIN):
        raise DataError(
            f"{where}: is stored in {name}, which HDF5 would look for below {variable} = {prefix!r}, "
            f"not beside {opened}; unset {variable}"
        )
    folder = opened.absolute().parent
    if opened.resolve().parent != folder.resolve():
        raise DataError(
            f"{where}: is stored in {name}, which may lie beside {opened} or beside {opened.resolve()}, to "
            "which it is a link; put the file itself there"
        )
    return folder / name


def _virtual_sources(
    dataset: h5py.Dataset, opened: Path, roots: Sequence[Path], where: str, depth: int
) -> set[Path]:
    """Return the files of a virtual dataset's sources; all of it must come from one of them."""
    sources: set[Path] = set()
    mapped = 0
    for source in dataset.virtual_sources():
        if "%" in source.file_name:
            raise DataError(f"{where}: a virtual dataset with a pattern of files; write its frames out")
        inside = source.file_name == "."
        file = opened if inside else _beside(opened, source.file_name, where, VIRTUAL_PREFIX)
        require_inside(file, roots, where)
        if not file.is_file():
            raise DataError(
                f"{where}: a virtual dataset whose source {file} is missing; its frames would be black"
            )
        with reading(file) as handle:
            try:
                below = item_at(handle, source.dset_name)
            except HDF5_ERRORS as error:
                raise DataError(f"{where}: {source.dset_name} of its source {file}: {error}") from error
            if not isinstance(below, h5py.Dataset):
                raise DataError(f"{where}: a virtual dataset whose source {file} has no {source.dset_name}")
            linked = below.file.filename != handle.filename
            through = Path(below.file.filename) if linked else file
            sources |= {file.resolve()} | _sources(below, through, roots, where, depth - 1)
            if not _holds(below, source):
                raise DataError(
                    f"{where}: a virtual dataset of rows that its source {file}: {source.dset_name} has not "
                    f"(its shape is {below.shape}); they would be black. Record it again"
                )
        mapped += source.vspace.get_select_npoints()
    wanted = math.prod(dataset.shape)
    if mapped != wanted:
        raise DataError(
            f"{where}: a virtual dataset whose sources give {mapped} of its {wanted} values; the others "
            "would be black. Record it again, or write it out as an ordinary dataset"
        )
    return sources


def _holds(below: h5py.Dataset, source: Any) -> bool:
    """Whether a dataset still holds all values that a virtual one takes from it."""
    space = source.src_space
    if space.get_select_type() == h5py.h5s.SEL_ALL:  # without a shape of its own
        return below.size == source.vspace.get_select_npoints()
    last = space.get_select_bounds()[1]
    return len(last) == below.ndim and all(i < n for i, n in zip(last, below.shape, strict=True))


def require_inside(file: Path, roots: Sequence[Path], where: str) -> None:
    """Raise DataError for a file that lies in none of `roots`, of which the dataset's folder is the first."""
    if not any(is_inside(root, file) for root in roots):
        path = file.resolve()
        raise DataError(
            f"{where}: is stored in {path}, outside the dataset's folder {roots[0]}; if that is meant, "
            f'add to the layout\'s table of the card: linked = ["{path.parent}"]'
        )


def _require_written(dataset: h5py.Dataset, where: str) -> None:
    """Raise DataError for rows that no program wrote, as far as the file's structure shows it.

    A compact dataset lies in the file's header, which holds zeros whether a program wrote them or not.
    """
    if not dataset.size or dataset.dtype.hasobject:  # rows of variable length are found when they are read
        return
    properties = dataset.id.get_create_plist()
    layout = properties.get_layout()
    advice = "and would be read as zeros; fetch or record it again, or leave the episode out"
    if not dataset.id.get_storage_size():
        raise DataError(f"{where} was allocated but never written, {advice}")
    if layout == h5py.h5d.CHUNKED and dataset.chunks is not None:
        wanted = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        written = dataset.id.get_num_chunks()
        if written < wanted:
            raise DataError(
                f"{where}: {wanted - written} of its {wanted} chunks were never written, {advice}"
            )
    if properties.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY and dataset.ndim == 4:  # frames
        length = dataset.shape[0]
        if all((dataset[row] == dataset.fillvalue).all() for row in {0, length // 2, length - 1}):
            raise DataError(
                f"{where} was allocated when it was made, and its first, middle and last frames were never "
                f"written, {advice}"
            )


def _require_filters(dataset: h5py.Dataset, where: str) -> None:
    filters = dataset.id.get_create_plist()
    for number in range(filters.get_nfilters()):
        code = filters.get_filter(number)[0]
        if not h5py.h5z.filter_avail(code) and not _plugin(code):
            raise DataError(
                f"{where}: is compressed by filter {code} ({FILTERS.get(code, 'unknown')}), which h5py "
                "lacks: pip install hdf5plugin"
            )


def _plugin(code: int) -> bool:
    if importlib.util.find_spec("hdf5plugin") is None:
        return False
    importlib.import_module("hdf5plugin")  # registers its filters
    return h5py.h5z.filter_avail(code)
