"""Whether the places that the metadata gives an episode, in its videos and among all rows, can be its own.

A video of one episode must have as many frames as rows. A window in a video of several must be apart from
those of others, as long as its rows, and inside the file. LeRobot writes windows one after the other, also
when it merges, splits or deletes episodes; there may be frames between them that belong to none.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.lerobot.meta import Entry, Meta
from vlafit.datasets.video import VideoFile
from vlafit.errors import DataError

ROUNDING = 0.5  # of a frame: LeRobot, too, reads the frame nearest to a time
SURPLUS = "[lerobot] surplus_frames = true"
FIX = "correct meta/episodes, or leave the episode out (skip in the card)"


class Places:
    """The places of the episodes of a dataset, as its metadata has them."""

    def __init__(
        self,
        meta: Meta,
        keys: Sequence[str],
        tolerance_s: float,
        left_out: Collection[int] = (),
        *,
        surplus: bool = False,
    ) -> None:
        """`keys` are of the cameras that are used; episodes that are `left_out` are compared with none.

        `tolerance_s` is how much the time between two rows may differ from 1 / fps. With `surplus` an episode
        may have more frames than rows.
        """
        self._fps, self._keys, self._tolerance_s, self._surplus = meta.fps, keys, tolerance_s, surplus
        self._one_each = meta.version != "v3.0"
        ends = np.cumsum([entry.length for entry in meta.episodes])
        self._starts = {e.index: int(end) - e.length for e, end in zip(meta.episodes, ends, strict=True)}
        self._faults: dict[int, str] = {}
        for key in keys:
            for path, entries in _by_file(meta.episodes, key).items():
                some = [entry for entry in entries if entry.index not in left_out]
                self._compare(path, key, some)

    def look_into_videos(self, entries: Iterable[Entry]) -> None:
        """Compare the places of `entries` with what their video files say of their frames.

        What is no video is left to those who read it.
        """
        entries = list(entries)
        for key in self._keys:
            for path, some in _by_file(entries, key).items():
                try:
                    video = VideoFile(path)
                except DataError:
                    continue
                for entry in some:
                    if fault := self._misfit(entry, key, video):
                        self._faults.setdefault(entry.index, fault)
                video.close()

    def require_fit(self, entry: Entry, key: str, video: VideoFile) -> None:
        """Raise DataError where a video file has other frames of a camera than an episode has rows."""
        if fault := self._misfit(entry, key, video):
            raise DataError(fault)

    def faults(self, entries: Iterable[Entry]) -> list[str]:
        """Return what is wrong with the places of `entries` so far."""
        return list(dict.fromkeys(self._faults[e.index] for e in entries if e.index in self._faults))

    def require(
        self, entry: Entry, times_s: NDArray[np.float64] | None, first_index: Callable[[], int | None]
    ) -> None:
        """Raise DataError where an episode's places contradict others, its videos or its rows.

        `times_s` are the timestamps of its rows unless they are frame_index / fps. `first_index` reads what
        the column "index" has in its first row.
        """
        for fault in self.faults([entry]):
            raise DataError(fault)
        self._require_length(entry, times_s)
        if entry.rows is None:
            return
        first, end = entry.rows
        where = f"{entry.data}: episode {entry.index}"
        if end - first != entry.length:
            raise DataError(
                f"{where} has {entry.length} rows, but dataset_from_index {first} and dataset_to_index {end} "
                f"in meta/episodes, which are {end - first}; {FIX}"
            )
        if first != self._starts[entry.index] and first != (index := first_index()):
            at = "" if index is None else f", and its first row has index {index}"
            raise DataError(
                f"{where} has dataset_from_index {first} in meta/episodes, but the episodes before it have "
                f"{self._starts[entry.index]} rows{at}; {FIX}"
            )

    def _misfit(self, entry: Entry, key: str, video: VideoFile) -> str:
        """Return what is wrong with the frames of a camera; "" if nothing is."""
        stated = entry.videos[key]
        if self._one_each:
            if video.count in (0, entry.length) or (self._surplus and video.count > entry.length):
                return ""
            many = video.count > entry.length
            cause = (
                "is it another episode's? Correct"
                if many
                else "the download was cut short, or a camera failed: correct"
            )
            way = f", or set {SURPLUS} if the first frames belong to the rows" if many else ""
            return (
                f"{video.path}: has {video.count} frames, episode {entry.index} has {entry.length} rows "
                f"({key}); {cause} the video, or leave the episode out (skip in the card){way}"
            )
        end, lasts = stated.start_s + entry.length / self._fps, video.duration_s
        if end <= lasts + ROUNDING / self._fps:
            return ""
        return (
            f"{video.path}: lasts {lasts:.4f} s, and meta/episodes has {_window(entry, key)} in it ({key}); "
            f"fetch the file again, {FIX}"
        )

    def _compare(self, path: Path, key: str, entries: Sequence[Entry]) -> None:
        """Note which windows of one file have more than half a frame in common."""
        placed = sorted(entries, key=lambda entry: entry.videos[key].start_s)
        latest, end = None, -np.inf
        for entry in placed:
            video = entry.videos[key]
            if latest is not None and video.start_s < end - ROUNDING / self._fps:
                fault = (
                    f"{path}: meta/episodes has {_window(latest, key)} and {_window(entry, key)} in it "
                    f"({key}), which overlap: one of them would show the other's frames; {FIX}"
                )
                self._faults.setdefault(latest.index, fault)
                self._faults.setdefault(entry.index, fault)
            by_rows = video.start_s + entry.length / self._fps
            own = by_rows if video.end_s is None else min(by_rows, video.end_s)
            if own > end:
                latest, end = entry, own

    def _require_length(self, entry: Entry, times_s: NDArray[np.float64] | None) -> None:
        for key in self._keys:
            video = entry.videos.get(key)
            if video is None or video.end_s is None:
                continue
            long, rows_s = video.end_s - video.start_s, entry.length / self._fps
            far = abs(long - rows_s)
            if self._surplus and long > rows_s:
                continue
            if times_s is not None:  # then frames may be shown as the rows were taken
                far = min(far, abs(long - (times_s[-1] - times_s[0] + 1 / self._fps)) - self._tolerance_s)
            if far > ROUNDING / self._fps:
                way = f", or set {SURPLUS} if the first frames belong to the rows" if long > rows_s else ""
                raise DataError(
                    f"{video.path}: meta/episodes has {_window(entry, key)} to {video.end_s:.4f} s in it "
                    f"({key}), which are {long * self._fps:.4g} frames at fps {self._fps:g}: these may be "
                    f"another episode's; {FIX}{way}"
                )


def _by_file(entries: Iterable[Entry], key: str) -> dict[Path, list[Entry]]:
    """Return the episodes that have a camera, by the file of its frames."""
    found: dict[Path, list[Entry]] = defaultdict(list)
    for entry in entries:
        if key in entry.videos:
            found[entry.videos[key].path].append(entry)
    return found


def _window(entry: Entry, key: str) -> str:
    return f"episode {entry.index} ({entry.length} rows) from {entry.videos[key].start_s:.4f} s"
