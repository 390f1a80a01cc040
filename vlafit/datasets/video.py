"""Exact frames of video files by PyAV, on one thread; a few decoders are kept open."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.lru import LruCache
from vlafit.errors import DataError
from vlafit.files import require_regular

if TYPE_CHECKING:
    import av

NEAR_S = 1.0  # a wanted frame this little ahead is reached by decoding on, where the rate is unknown
SEEK_ON = 1.5  # ticks of the file's clock beyond the wanted time, which is rounded


class VideoFile:
    """One open video. Times are in seconds from its first frame."""

    def __init__(self, path: Path) -> None:
        """Raises DataError if the file is no video that can be decoded."""
        import av
        from av.video.reformatter import VideoReformatter

        self.path = path
        try:
            require_regular(path)
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (IndexError, *_faults()) as error:
            raise DataError(f"{path}: cannot be opened as a video ({error}); fetch it again") from error
        self._stream.codec_context.thread_count = 1
        base = self._stream.time_base
        if base is None:
            raise DataError(f"{path}: the video has no time base")
        self._base, self._ticks = float(base), av.time_base
        self._first = self._stream.start_time or 0
        self._reformatter = VideoReformatter()  # one a stream: a new one each frame costs a fifth of the time
        self._frames: Iterator[av.VideoFrame] | None = None
        self._at_s = -np.inf  # of the last decoded frame
        self._key_s = np.inf  # of the last decoded key frame
        rate = self._stream.average_rate
        self._ahead_s = 1.5 / float(rate) if rate else NEAR_S  # the next frame, and as far as groups reach
        self.decoded = 0
        """Frames decoded so far, wanted or on the way to a wanted one."""

    @property
    def duration_s(self) -> float:
        """How long the file says that its frames last together, infinite where it does not say."""
        if self._stream.duration is not None:
            return self._stream.duration * self._base
        whole = self._container.duration
        return float("inf") if whole is None else whole / self._ticks

    @property
    def count(self) -> int:
        """How many frames the file says that it has, 0 where it does not say."""
        return self._stream.frames

    def read(self, times_s: Sequence[float], tolerance_s: float) -> list[NDArray[np.uint8]]:
        """Return the RGB frames [h, w, 3] at ascending times, each within `tolerance_s`.

        Raises DataError naming the time for which there is no frame, or the damage.
        """
        frames: list[NDArray[np.uint8]] = []
        try:
            for wanted in times_s:
                frame = self._reach(wanted, tolerance_s)
                picture = np.asarray(self._reformatter.reformat(frame, format="rgb24").to_ndarray(), np.uint8)
                picture.flags.writeable = False
                frames.append(picture)
        except _faults() as error:
            self._frames = None
            raise DataError(f"{self.path}: is damaged near {times_s[len(frames)]:.3f} s ({error})") from error
        return frames

    def times(self) -> list[float]:
        """Return the presentation time of every frame, ascending, without decoding."""
        import av

        try:
            require_regular(self.path)
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                stamps = sorted(p.pts for p in container.demux(stream) if p.pts is not None)
        except _faults() as error:
            raise DataError(f"{self.path}: is damaged ({error})") from error
        return [(stamp - self._first) * self._base for stamp in stamps]

    def close(self) -> None:
        """Close the file."""
        self._frames = None
        self._container.close()

    def _reach(self, wanted: float, tolerance_s: float) -> "av.VideoFrame":
        if self._frames is not None and self._at_s < wanted - tolerance_s <= self._at_s + self._ahead_s:
            starts = []  # farther ahead a key frame is nearer, as the groups decoded so far tell
        else:  # a wanted key frame is itself the start: from the one before, a short group is decoded as well
            starts = [wanted + SEEK_ON * self._base, wanted - tolerance_s]
        while True:
            if starts:
                self._seek(starts.pop(0))
            frame, passed = self._next(wanted - tolerance_s)
            if frame is not None and self._at_s <= wanted + tolerance_s:
                return frame
            self._frames = None  # the frame before may be wanted next
            if frame is None or passed or not starts:
                raise DataError(f"{self.path}: has no frame at {wanted:.4f} s (within {tolerance_s:.4f} s)")

    def _seek(self, to_s: float) -> None:
        """Go to the last key frame that is shown at `to_s` or before."""
        self._container.seek(max(0, int(to_s / self._base)) + self._first, stream=self._stream)
        self._frames = self._container.decode(self._stream)

    def _next(self, from_s: float) -> "tuple[av.VideoFrame | None, int]":
        """Return the next frame shown at `from_s` or later (None at the end), and how many came before."""
        passed = 0
        for frame in self._frames or ():
            self.decoded += 1
            if frame.pts is None:
                continue
            self._at_s = (frame.pts - self._first) * self._base
            if frame.key_frame:
                self._key_s = self._at_s
            self._ahead_s = max(self._ahead_s, self._at_s - self._key_s)
            if self._at_s >= from_s:
                return frame, passed
            passed += 1
        return None, passed


def _faults() -> tuple[type[Exception], ...]:
    """Return what opening and decoding a damaged file raises."""
    from av.error import FFmpegError

    return (OSError, ValueError, FFmpegError)


class VideoFiles:
    """Open videos of a process, the oldest closed beyond `most`."""

    def __init__(self, most: int) -> None:
        self._open: LruCache[Path, VideoFile] = LruCache(most, drop=lambda _, video: video.close())

    def __len__(self) -> int:
        return len(self._open)

    def get(self, path: Path) -> VideoFile:
        """Return the open video at `path`."""
        return self._open.get(path, lambda: VideoFile(path))

    def close(self) -> None:
        """Close all."""
        self._open.clear()
