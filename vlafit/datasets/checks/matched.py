"""Find frames of another episode: they change as its states move, and not as those of their own episode do.

The image changes as the state moves (see `curves.motions`). How it does is learnt from the other episodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks import curves
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.checks.motion import scale_of

NEAR = 1  # frames by which a shift may differ from the usual one
LIKE = 0.9  # share of the usual correlation that the other episode's states must reach
CLEARLY = 4.0  # times that less must be unexplained by these than by the episode's own
EXCHANGED = 2.0  # the same for two episodes that show each other's states
COMPARED = 200  # episodes that frames are compared with


@dataclass(frozen=True)
class _Match:
    """How the frames of an episode follow its own states, and those that they follow best."""

    own: float
    best: float
    other: int

    @property
    def clearer(self) -> float:
        """How many times less is unexplained by the other episode's states."""
        return (1 - self.own) / (1 - self.best + 1e-9)


def check_matches(
    camera: str, tracks: Sequence[curves.Track], doubtful: Sequence[str], usual: int, usually: float
) -> list[Finding]:
    """Return which of the `doubtful` episodes show the states of another one.

    `usual` is the place of the usual shift in the curves, `usually` the median correlation there.
    """
    suspects = [n for n, track in enumerate(tracks) if track.episode in set(doubtful)]
    others = [n for n in range(len(tracks)) if n not in set(suspects)]
    if len(others) < 2 or not suspects:
        return []
    shift = curves.SHIFTS[usual]
    scale = scale_of([track.state for track in tracks])
    speeds = [scale.each(track.state) for track in tracks]
    weights = curves.weights([speeds[n] for n in others], [tracks[n].change for n in others], shift)
    moved = [speed @ weights for speed in speeds]
    matches: dict[int, _Match] = {}
    for n in suspects:
        rest = [m for m in [*suspects, *others[:COMPARED]] if m != n]
        heights = [_height(moved[m], tracks[n].change, shift) for m in rest]
        best = int(np.argmax(heights))
        matches[n] = _Match(_height(moved[n], tracks[n].change, shift), heights[best], rest[best])
    return [
        _finding(camera, tracks[n].episode, tracks[match.other].episode, match, usually)
        for n, match in matches.items()
        if match.best >= LIKE * usually and match.clearer >= _needed(n, matches)
    ]


def _needed(number: int, matches: dict[int, _Match]) -> float:
    """Return how much clearer an episode must show another one's states: less if that shows its own."""
    back = matches.get(matches[number].other)
    return EXCHANGED if back and back.other == number and back.clearer >= EXCHANGED else CLEARLY


def _height(moved: NDArray[np.float64], change: NDArray[np.float64], shift: int) -> float:
    """Return the correlation of an image's change with how states move, near a shift."""
    length = min(len(moved), len(change))
    return max(
        curves.correlation(*curves.overlap(moved[:length], change[:length], at))
        for at in range(shift - NEAR, shift + NEAR + 1)
    )


def _finding(camera: str, episode: str, other: str, match: _Match, usually: float) -> Finding:
    return Finding(
        "warning",
        "video_mismatch",
        episode,
        None,
        f"camera {camera!r} changes as the states of episode {other} move (correlation {match.best:.2f}), "
        f"and not as its own do ({match.own:.2f}, in most episodes {usually:.2f}): is it that one's video?",
        "images and actions of a step do not belong together",
        "look at both (vlafit data view); exchange the videos, or leave the episode out",
        (camera,),
        other=other,
    )
