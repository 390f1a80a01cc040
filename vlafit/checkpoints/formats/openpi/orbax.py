"""Read Orbax checkpoints with tensorstore only: their arrays, and the contents piece by piece.

For what the arrays mean see `vlafit.checkpoints.formats.openpi.jax`.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlafit import heap
from vlafit.errors import WeightsError, brief
from vlafit.files import irregular, parse_object, plain_text
from vlafit.links import is_inside

METADATA = "_METADATA"
OCDBT = "manifest.ocdbt"
SIGNS = (METADATA, OCDBT)
INDEX_BYTES = 1 << 24  # room in the cache beside an array: for OCDBT's own tree
MOST_NUMBERS = 1 << 40  # in one array; the largest of pi0 has 2**30
LARGE = 1 << 24  # bytes of an array after which the heap is asked to return what is free
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class Leaf:
    """One stored array, not read yet. `chunk` is the shape of the pieces that it is stored in."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    spec: dict[str, Any]

    def meta(self) -> Tensor:
        """Return a tensor of this shape and dtype without storage; one that torch lacks is an integer's."""
        return torch.empty(self.shape, dtype=DTYPES.get(self.dtype, torch.int64), device="meta")

    def slices(self) -> Iterator[Tensor]:
        """Read the array, one index of its first axis at a time, all into one buffer: copy what is to stay.

        The stored pieces may span several indices. They are then kept until the last one is read, so that
        each is unpacked once; a copy of the whole array is never made beside them. The buffer is one, because
        the heap would keep the holes that many leave between the parameters made of them.
        """
        import tensorstore

        shared = bool(self.chunk) and self.chunk[0] > 1
        size = int(np.prod(self.shape)) * 4 + INDEX_BYTES if shared else 0
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": size}})
        try:
            store = tensorstore.open(self.spec, context=context, read=True, open=True).result()
            buffer = np.empty(self.shape[1:], store.dtype.numpy_dtype)
            target = tensorstore.array(buffer)
            for i in range(self.shape[0]):
                target.write(store[i]).result()
                yield _tensor(buffer)
            del store, context
            self._give_back()
        except (ValueError, OSError) as error:
            raise self._unreadable(error) from error

    def read(self) -> Tensor:
        """Read the whole array."""
        import tensorstore

        try:
            whole = tensorstore.open(self.spec, read=True, open=True).result().read().result()
            self._give_back()
            return _tensor(whole)
        except (ValueError, OSError) as error:
            raise self._unreadable(error) from error

    def _give_back(self) -> None:
        """Have the heap return what a large array took to be unpacked, in many pieces that it would keep."""
        if np.prod(self.shape) * 4 >= LARGE:
            heap.trim()

    def _unreadable(self, error: BaseException) -> WeightsError:
        return WeightsError(f"array {self.name}: {_first_line(error)}; copy or download it again")


def find_params(path: Path) -> Path | None:
    """Return the folder of the weights in `path`: itself, its `params`, or those of its only training step.

    Returns None where there is no Orbax checkpoint. Raises WeightsError when there are several steps.
    """
    for folder in (path / "params", path):
        if any((folder / sign).is_file() for sign in SIGNS):
            return folder
    if not path.is_dir():
        return None
    steps = sorted((p for p in path.iterdir() if p.name.isdecimal() and (p / "params").is_dir()), key=_step)
    if len(steps) > 1:
        listed = ", ".join(p.name for p in steps)
        raise WeightsError(f"{path}: holds the checkpoints of several steps ({listed}); name one of them")
    return find_params(steps[0] / "params") if steps else None


def open_leaves(folder: Path) -> dict[str, Leaf]:
    """Return the arrays of an Orbax folder by name (``a/b/c``), from its metadata alone.

    Raises WeightsError where the folder is damaged: its own list of arrays and the stored ones must agree.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise WeightsError(
            f"{folder}: an Orbax checkpoint is read with tensorstore: pip install tensorstore"
        ) from error
    links = [path for path in folder.rglob("*") if path.is_symlink() and not is_inside(folder, path)]
    if links:
        raise WeightsError(
            f"{links[0]}: is a link to {links[0].resolve()}; a checkpoint may only read files in its own "
            "folder: put the file itself there"
        )
    for path in sorted(folder.rglob("*")):  # tensorstore would wait for a pipe
        if not path.is_dir() and (kind := irregular(path)):
            raise WeightsError(f"{path}: not a regular file but {kind}; copy or download it again")
    written, filled = _listed(folder)
    # Mapped, the packed bytes of an array are not a second copy of it in memory.
    mapped = {"file_io_mode": {"mode": "memmap"}}
    base: dict[str, Any] = {"driver": "file", "path": f"{folder.resolve()}/", **mapped}
    root = {"driver": "ocdbt", "base": base} if (folder / OCDBT).is_file() else base
    try:
        keys = [key.decode() for key in tensorstore.KvStore.open(root).result().list().result()]
        specs = {}
        for key in keys:
            stem, _, file = key.rpartition("/")
            if file in (".zarray", "zarr.json") and stem:
                driver = "zarr" if file == ".zarray" else "zarr3"
                inside = f"{base['path']}{stem}/" if root is base else f"{stem}/"
                store = {**root, "path": inside}
                spec: dict[str, Any] = {"driver": driver, "kvstore": store, "recheck_cached_data": "open"}
                if filled:
                    spec["fill_missing_data_reads"] = False
                specs[stem.replace(".", "/")] = spec
        opened = {name: tensorstore.open(s, read=True, open=True) for name, s in specs.items()}
        leaves = {}
        for name, future in opened.items():
            store = future.result()
            pieces = store.chunk_layout.read_chunk.shape or store.shape
            chunk = tuple(size or whole for size, whole in zip(pieces, store.shape, strict=True))
            leaves[name] = Leaf(name, tuple(store.shape), store.dtype.name, chunk, specs[name])
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"{folder}: not a whole Orbax folder ({_first_line(error)}); copy or download it again"
        ) from error
    for name, leaf in leaves.items():  # before tensorstore takes memory, which it does not survive to lack
        if math.prod(leaf.shape) > MOST_NUMBERS or any(map(operator.gt, leaf.chunk, leaf.shape)):
            raise WeightsError(
                f"{folder}: array {name}: {leaf.shape} in pieces of {leaf.chunk}, which no program writes; "
                "copy or download the folder again"
            )
    missing, surplus = sorted(set(written) - set(leaves)), sorted(set(leaves) - set(written))
    # A piece that one process wrote is never larger than the array that it is a piece of.
    cut = [
        f"{name} is {leaf.shape}, {METADATA} has {tuple(piece)}"
        for name, leaf in leaves.items()
        if (piece := written.get(name)) is not None
        and (len(piece) != len(leaf.shape) or any(p > n for p, n in zip(piece, leaf.shape, strict=True)))
    ]
    if missing or surplus or cut:
        raise WeightsError(
            f"{folder}: {METADATA} and the stored arrays differ: missing {missing or 'none'}, not listed"
            f" {surplus or 'none'}, cut {cut or 'none'}; copy or download the folder again"
        )
    return leaves


def _listed(folder: Path) -> tuple[dict[str, list[int] | None], bool]:
    """Return the arrays that the folder's metadata lists, with the shape of the pieces that a process wrote.

    The second is whether every number is stored, zeros too. Raises WeightsError where there is no such list:
    without it nobody can tell an array or a piece that was lost from one that never was.
    """
    path = folder / METADATA
    if not path.is_file():
        raise WeightsError(
            f"{folder}: {METADATA}, Orbax's list of arrays, is missing: nothing tells whether all of them are"
            " there; copy or download the folder again"
        )
    try:
        content = parse_object(plain_text(path))
        entries = content["tree_metadata"].values()
        stored = [e for e in entries if e["value_metadata"]["value_type"] != "None"]
        pieces = {
            "/".join(str(k["key"]) for k in entry["key_metadata"]): entry["value_metadata"].get("write_shape")
            for entry in stored
        }
        return pieces, bool(content.get("store_array_data_equal_to_fill_value"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not Orbax's list of arrays ({brief(error)}); copy it again") from error


def _tensor(array: Any) -> Tensor:
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def _step(path: Path) -> int:
    return int(path.name)


def _first_line(error: BaseException) -> str:
    text = str(error).split("\n")[0]
    return text if len(text) < 200 else f"{text[:200]}..."
