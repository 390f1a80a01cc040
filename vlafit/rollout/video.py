"""Write an mp4 and a film strip of each filmed episode, and a contact sheet of all strips.

Frames are small, so they are enlarged by repeating pixels, never smoothed: they show what the policy saw.
"""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.files import write_atomic

Frames = Sequence[NDArray[np.uint8]]
Colour = tuple[int, int, int]

VIDEO_PIXELS = 256  # side of a video, at least
STRIP_PIXELS = 96  # side of a picture in a strip, at least
STRIP_FRAMES = 8
BORDER, LABEL = 4, 16  # pixels
SUCCESS, FAILURE, ERROR = (46, 160, 67), (207, 34, 46), (191, 135, 0)
FASTEST_FPS = 25  # robots with a higher rate are shown in slow motion


def enlarge(frame: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Repeat the pixels of a frame [h, w, 3] until its longer side is at least `pixels`."""
    times = max(1, -(-pixels // max(frame.shape[:2])))
    return frame.repeat(times, 0).repeat(times, 1)


def write_mp4(path: Path, frames: Frames, hz: float) -> None:
    """Write frames, uint8 [h, w, 3] each, as H.264, at the robot's rate or FASTEST_FPS."""
    import av

    large = [enlarge(frame, VIDEO_PIXELS) for frame in frames]
    height, width = (side - side % 2 for side in large[0].shape[:2])  # H.264 needs even sides
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(min(hz, FASTEST_FPS)).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
        stream.pix_fmt = "yuv420p"
        stream.width, stream.height = width, height
        stream.thread_count = 1
        for frame in large:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    write_atomic(path, buffer.getvalue())


def strip(frames: Frames, colour: Colour, label: str) -> NDArray[np.uint8]:
    """Return a film strip: a line of text, then STRIP_FRAMES pictures, first to last, framed in `colour`."""
    from PIL import Image, ImageDraw

    chosen = np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int)
    pictures = np.concatenate([enlarge(frames[i], STRIP_PIXELS) for i in chosen], axis=1)
    height, width = pictures.shape[:2]
    sheet = Image.new("RGB", (width + 2 * BORDER, height + 2 * BORDER + LABEL), (255, 255, 255))
    sheet.paste(colour, (0, LABEL, width + 2 * BORDER, height + 2 * BORDER + LABEL))
    sheet.paste(Image.fromarray(pictures), (BORDER, LABEL + BORDER))
    ImageDraw.Draw(sheet).text((BORDER, 2), label, fill=(0, 0, 0))
    return np.asarray(sheet)


def colour_of(success: bool | None) -> Colour:
    """Return green for a success, red for a failure, amber for an error."""
    return {True: SUCCESS, False: FAILURE, None: ERROR}[success]


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write uint8 [h, w, 3] as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())


def write_sheet(path: Path, strips: Sequence[Path]) -> None:
    """Write the contact sheet: all strips (PNG files), one below the other."""
    from PIL import Image

    pictures = []
    for strip_file in strips:
        with Image.open(strip_file) as picture:
            pictures.append(picture.convert("RGB"))
    width, height = max(p.width for p in pictures), sum(p.height + BORDER for p in pictures)
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + BORDER
    write_png(path, np.asarray(sheet))
