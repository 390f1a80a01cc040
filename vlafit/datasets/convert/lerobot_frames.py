"""Encode frames as LeRobot v3.0 has them: PNG, or video files of several episodes."""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import DataError


@dataclass(frozen=True)
class VideoCodec:
    """An encoder of FFmpeg and its options."""

    encoder: str
    options: Mapping[str, str]


VIDEO_CODECS: Mapping[str, VideoCodec] = {
    "av1": VideoCodec("libsvtav1", {"g": "2", "crf": "30"}),  # LeRobot's default
    "h264": VideoCodec("libx264", {"g": "2", "crf": "18", "bf": "0"}),  # FFmpeg: 18 looks lossless
}
"""A key frame every second frame, as LeRobot has it, so that any frame is decoded after at most one other."""


@dataclass(frozen=True)
class Place:
    """Where an episode begins among the video files of a camera."""

    chunk: int
    file: int
    first_frame: int


def png(frame: NDArray[np.uint8]) -> bytes:
    """Return a frame [h, w, 3] as PNG, which loses nothing."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


class FilmWriter:
    """Writes the frames of one camera, episode after episode, into video files of about `most_mb`."""

    def __init__(self, folder: Path, codec: str, fps: int, most_mb: int, chunk_files: int) -> None:
        self.folder, self.codec, self.fps = folder, codec, fps
        self.most, self.chunk_files = most_mb * 2**20, chunk_files
        self._number, self._frames, self._bytes = -1, 0, 0
        self._path = folder
        self._container: Any = None
        self._stream: Any = None

    def begin(self) -> Place:
        """Begin an episode, in a new file if the present one is large enough; return where."""
        if self._container is None or self._bytes > self.most:
            self.close()
            self._number, self._frames, self._bytes = self._number + 1, 0, 0
        chunk, file = divmod(self._number, self.chunk_files)
        self._path = self.folder / f"chunk-{chunk:03d}" / f"file-{file:03d}.mp4"
        return Place(chunk, file, self._frames)

    def add(self, frames: NDArray[np.uint8], where: str) -> None:
        """Encode frames [n, h, w, 3]. Raises DataError if the codec cannot hold their size."""
        import av
        from av.error import FFmpegError

        try:
            if self._container is None:
                self._open(frames.shape[1], frames.shape[2], where)
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                picture.pts = self._frames
                self._mux(self._stream.encode(picture))
                self._frames += 1
        except FFmpegError as error:
            height, width = frames.shape[1:3]
            raise DataError(
                f"{where}: {self.codec} cannot encode frames of {height}x{width} ({error}); take another "
                "codec, or none (PNG)"
            ) from error

    def close(self) -> None:
        """Finish the present file."""
        if self._container is not None:
            self._mux(self._stream.encode())
            self._container.close()
        self._container = None

    def _mux(self, packets: Sequence[Any]) -> None:
        self._container.mux(packets)
        self._bytes += sum(packet.size for packet in packets)

    def _open(self, height: int, width: int, where: str) -> None:
        import av

        if height % 2 or width % 2:
            raise DataError(
                f"{where}: frames are {height}x{width}, and {self.codec} holds even sides only; convert "
                "without video (PNG)"
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        codec = VIDEO_CODECS[self.codec]
        self._container = av.open(str(self._path), "w")
        self._stream = self._container.add_stream(codec.encoder, rate=self.fps, options=dict(codec.options))
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._stream.time_base = Fraction(1, self.fps)
        self._stream.thread_count = 1
        with _quiet_svt():
            self._stream.codec_context.open()


@contextmanager
def _quiet_svt() -> Iterator[None]:
    """Keep SVT-AV1's report of its settings off stderr; it listens to this variable only."""
    before = os.environ.get("SVT_LOG")
    os.environ["SVT_LOG"] = "1"  # errors
    try:
        yield
    finally:
        del os.environ["SVT_LOG"]
        if before is not None:
            os.environ["SVT_LOG"] = before
