"""Write an opened dataset in another layout: LeRobot v3.0, or HDF5 as LIBERO has it.

States, actions and sentences are written as the store returns them: cut, scaled and aligned, frames upright.
A card in the new folder (`card.toml`) says what its layout cannot: units, limits, control mode, license.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlafit import files, locks
from vlafit.datasets.convert.hdf5 import write_libero
from vlafit.datasets.convert.lerobot import VIDEO_CODECS, write_lerobot
from vlafit.datasets.convert.written import Written
from vlafit.datasets.load import open_dataset
from vlafit.datasets.store import EpisodeStore
from vlafit.datasets.write import card_text
from vlafit.errors import DataError, did_you_mean, nearest

__all__ = ["CARD", "TARGETS", "VIDEO_CODECS", "convert"]

CARD = "card.toml"
TARGETS = ("lerobot", "libero")


def convert(
    store: EpisodeStore,
    out: Path,
    to: str,
    *,
    video: str = "",
    progress: Callable[[int], None] = lambda frames: None,
) -> tuple[str, ...]:
    """Write all episodes of `store` into the new folder `out`; return what the new layout does not keep.

    The folder appears when it is complete and has been read back, so an interrupted conversion leaves nothing
    that opens, and starts anew. `video` is a codec for LeRobot's frames (a key of VIDEO_CODECS), which is
    lossy; empty: PNG. `progress` is called with the frames written so far, of all cameras. Raises DataError
    for an `out` that exists or is among the dataset's own files, and for what the layout cannot hold.
    """
    if to not in TARGETS:
        raise DataError(f"cannot convert to {to!r}; there are {', '.join(TARGETS)}{nearest(to, TARGETS)}")
    if video and to != "lerobot":
        raise DataError(f"video {video!r}: layout {to!r} holds frames without loss; leave it out")
    if video and video not in VIDEO_CODECS:
        known = ", ".join(VIDEO_CODECS)
        raise DataError(f"video {video!r} is none of {known}{did_you_mean(video, VIDEO_CODECS)}")
    out = files.expand_user(out).resolve()
    _require_new(store, out)
    _require_names(store)
    with locks.creating(out, "vlafit data convert"):
        _require_new(store, out)  # another process may just have created it
        with files.new_folder(out, new=True) as partial:
            if to == "lerobot":
                written = write_lerobot(store, partial, video, progress)
            else:
                written = write_libero(store, partial, progress)
            text = f"# What the files beside it do not say.\n{card_text(written.card)}"
            files.write_atomic(partial / CARD, text)
            _require_same(store, written, partial, lossless=not video)
    return written.lost


def _require_new(store: EpisodeStore, out: Path) -> None:
    if out.exists() and (not out.is_dir() or not files.is_empty(out)):
        raise DataError(f"{out}: already exists; name a new folder, or delete it")
    if store.card.location().is_file():  # what is beside it is not the dataset's
        return
    for folder in sorted({path.resolve().parent for path in store.files()}):
        if out == folder or folder in out.parents or out in folder.parents:
            raise DataError(
                f"{out}: overlaps with {folder}, which holds files of dataset {store.card.name!r}; a dataset "
                "is never changed in place, so name a folder elsewhere"
            )


def _require_names(store: EpisodeStore) -> None:
    for camera in store.embodiment.cameras:
        if set(camera.name) & set("/\\ \n"):
            raise DataError(
                f"dataset {store.card.name!r}: the name of camera {camera.name!r} holds a slash or a space, "
                "which no key can; give it another name in a card"
            )


def _require_same(store: EpisodeStore, written: Written, folder: Path, *, lossless: bool) -> None:
    """Raise DataError unless what was written is read as `store` is: all columns, and the outer frames."""
    again = open_dataset(folder / CARD)
    try:
        if len(again.episodes) != len(written.order):
            raise DataError(
                f"{folder}: {len(written.order)} episodes were written, {len(again.episodes)} read"
            )
        for number, source in enumerate(written.order):
            old, new = store.episodes[source], again.episodes[number]
            same = old.instruction == new.instruction and old.length == new.length
            same = same and np.array_equal(store.state(source), again.state(number))
            same = same and np.array_equal(store.actions(source), again.actions(number))
            for camera in store.embodiment.cameras:
                for step in (0, old.length - 1):
                    frame = again.image(number, step, camera.name)
                    same = same and (
                        not lossless or np.array_equal(frame, store.image(source, step, camera.name))
                    )
            if not same:
                raise DataError(
                    f"{folder}: episode {new.id} is read back other than {old.id} was written; convert "
                    "again, and check the disk if that repeats"
                )
    finally:
        again.close()
