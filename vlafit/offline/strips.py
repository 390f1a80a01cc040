"""Film strips of evaluated episodes: pictures of the first camera, first to last."""

import io
from pathlib import Path

import numpy as np

from vlafit import files
from vlafit.datasets import EpisodeStore
from vlafit.offline.folder import file_name

PICTURES, HEIGHT, GAP = 8, 96, 4  # pictures of a strip, their height and the gap between them in pixels


def strip_file(folder: Path, episode: str) -> Path:
    """Return the path of an episode's film strip in the folder of an evaluation."""
    return folder / "strips" / f"{file_name(episode)}.png"


def write_strip(folder: Path, store: EpisodeStore, episode: str) -> None:
    """Write the film strip of an episode, unless it is there."""
    path = strip_file(folder, episode)
    if path.is_file() or not store.embodiment.cameras:
        return
    from PIL import Image

    number = store.index(episode)
    steps = np.linspace(0, store.episodes[number].length - 1, PICTURES).round().astype(int).tolist()
    frames = store.images(number, steps, store.embodiment.cameras[0].name)
    height, width = frames.shape[1:3]
    size = max(1, round(width * HEIGHT / height)), HEIGHT
    kind = Image.Resampling.NEAREST if height < HEIGHT else Image.Resampling.BILINEAR
    strip = Image.new("RGBA", (PICTURES * (size[0] + GAP) - GAP, HEIGHT), (0, 0, 0, 0))
    for place, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize(size, kind), (place * (size[0] + GAP), 0))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG", optimize=True)
    files.write_atomic(path, buffer.getvalue())
