"""Compare the colours of frames with those of a video beside the files that shows them once more."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.pictures import CLEARER, colour_distances
from vlafit.datasets.store import EpisodeStore
from vlafit.datasets.video import VideoFile
from vlafit.errors import DataError

SHOWN = 4  # frames that are compared


def check_beside(store: EpisodeStore, untested: Untested) -> list[Finding]:
    """Return a finding for each camera whose red and blue the video of the first episode exchanges."""
    findings = []
    for declared in store.card.robot.cameras if store.episodes else ():
        path = store.film_beside(0, declared.name)
        if path is None:
            untested.add("channel_order_beside", "there is none", f"camera {declared.name!r}")
            continue
        steps = np.unique(np.linspace(0, store.episodes[0].length - 1, SHOWN).round().astype(int)).tolist()
        try:
            frames = store.images(0, steps, declared.name)
            shown = replace(declared, channels="").upright(_frames(path, steps))
        except DataError as error:
            untested.add("channel_order_beside", str(error), f"camera {declared.name!r}")
            continue
        if shown.shape != frames.shape:
            untested.add(
                "channel_order_beside", "the video has another size or length", f"camera {declared.name!r}"
            )
            continue
        away, exchanged = colour_distances(frames, shown)
        if exchanged < CLEARER * away:
            findings.append(
                Finding(
                    "error",
                    "channel_order",
                    "",
                    None,
                    f"camera {declared.name!r} has red and blue exchanged: its frames are {away:.1f} grey "
                    f"levels away from those of {path}, and {exchanged:.1f} the other way round",
                    "the policy learns colours that its robot will not show it",
                    f'set channels of camera {declared.name!r} in the card to the other of "rgb" and "bgr"; '
                    "the recorder's other cameras have the same order",
                    (declared.name,),
                )
            )
    return findings


def _frames(path: Path, steps: list[int]) -> NDArray[np.uint8]:
    video = VideoFile(path)
    try:
        times = video.times()
        return np.stack(video.read([times[step] for step in steps if step < len(times)], 1e-3))
    finally:
        video.close()
