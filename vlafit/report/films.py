"""Embed film strips and videos of episodes in a page, up to a total size."""

import base64
import html
import io
import logging
from pathlib import Path

from PIL import Image

from vlafit.files import plain_bytes
from vlafit.report.facts import Evaluation
from vlafit.report.markup import Raw, muted, tag
from vlafit.rollout.records import Record
from vlafit.rollout.video import BORDER, LABEL, STRIP_FRAMES

BUDGET = 24_000_000  # bytes of pictures and videos in one page, which mail and code hosts still accept
log = logging.getLogger(__name__)

GAP = 4  # transparent pixels between the pictures of a strip


class Films:
    """Embeds films until the budget is used up, and counts those that did not fit."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._left = budget
        self._skipped = 0

    def strip(self, evaluation: Evaluation, record: Record) -> Raw:
        """Return the film strip of an episode."""
        path = evaluation.strip(record)
        try:
            picture = separated(path)
        except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
            log.warning("%s: a damaged film strip, left out of the page (%s)", path, error)
            self._skipped += 1
            return Raw("")
        data = self._data(picture, "image/png")
        label = html.escape(f"film strip of {record.task}, start {record.seed}, {evaluation.name}")
        return Raw(f'<img class="strip" alt="{label}" src="{data}">' if data else "")

    def video(self, evaluation: Evaluation, record: Record, caption: str) -> Raw:
        """Return the video of an episode with a caption."""
        path = evaluation.folder / (record.video or "")
        if not record.video or not path.is_file():
            return Raw("")
        data = self._data(plain_bytes(path), "video/mp4")
        if not data:
            return Raw("")
        video = Raw(f'<video controls muted loop playsinline preload="metadata" src="{data}"></video>')
        return tag("figure", video, tag("figcaption", muted(caption)))

    def left_out(self) -> str:
        """Return a sentence about films that did not fit; "" if all did."""
        if not self._skipped:
            return ""
        return f"{self._skipped} films did not fit into this page; see the run's folders eval/*/videos."

    def _data(self, content: bytes, kind: str) -> str:
        if len(content) > self._left:
            self._skipped += 1
            return ""
        self._left -= len(content)
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def separated(path: Path) -> bytes:
    """Return a film strip as PNG with gaps between its pictures, without label and border."""
    with Image.open(path) as picture:
        strip = picture.convert("RGB").crop(
            (BORDER, LABEL + BORDER, picture.width - BORDER, picture.height - BORDER)
        )
    side = strip.width // STRIP_FRAMES
    spaced = Image.new("RGBA", (strip.width + GAP * (STRIP_FRAMES - 1), strip.height), (0, 0, 0, 0))
    for i in range(STRIP_FRAMES):
        spaced.paste(strip.crop((i * side, 0, (i + 1) * side, strip.height)), (i * (side + GAP), 0))
    buffer = io.BytesIO()
    spaced.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
