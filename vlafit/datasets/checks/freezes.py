"""Find frames that repeat while the robot moves by more than what leaves the image unchanged elsewhere."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.clips import Clip
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.checks.motion import Scale

FREEZE = 4  # equal frames in a row
STILL = 0.02  # of the usual change: a frame that repeats the one before
LEAST = 0.02  # of its range: motion of a dimension in so many steps that is reported
FURTHER = (
    3.0  # times the motion in as many steps that leaves the image unchanged in nine of ten other episodes
)
FEWEST = 3  # other episodes that say which dimensions can be seen; with fewer, half of all must move


def usual_change(clips: Sequence[Clip]) -> float:
    """Return the median change of a camera's frames, of those that change."""
    changes = np.concatenate([clip.change for clip in clips])
    return float(np.median(changes[changes > 0])) if (changes > 0).any() else 0.0


def check_freezes(
    camera: str, clips: Sequence[Clip], states: Sequence[NDArray], scale: Scale, untested: Untested
) -> list[Finding]:
    """Return the episodes in which a frame repeats while the state moves.

    A scene that a simulator renders repeats its frames bit for bit when nothing moves, and when something
    moves by less than a pixel, or unseen. So the motion must be more than the state's noise, and more than
    what leaves the image unchanged in the other episodes.
    """
    where, usual = f"camera {camera!r}", usual_change(clips)
    if usual <= 0:
        untested.add("frozen_frames", "its image never changes", where)
        return []
    if not scale.moving.any():
        untested.add("frozen_frames", "the state does not move by more than its noise", where)
        return []
    stretches = [
        _stretches(clip.change <= STILL * usual, state, scale)
        for clip, state in zip(clips, states, strict=True)
    ]
    none = np.zeros((1, int(scale.moving.sum())))
    most = np.stack([np.concatenate([none, *(m for m, *_ in own)]).max(axis=0) for own in stretches])
    findings = []
    for n, (clip, own) in enumerate(zip(clips, stretches, strict=True)):
        others = np.delete(most, n, axis=0)  # [episodes - 1, moving]
        enough = len(others) >= FEWEST
        unseen = np.quantile(others, 0.9, axis=0, method="higher") if enough else none[0]
        fewest = 1 if enough else most.shape[1] / 2
        frozen = [
            (length, first, float(motion.max()))
            for motion, first, length in own
            if ((motion > np.maximum(LEAST, FURTHER * unseen)).sum(axis=1) >= fewest).any()
        ]
        if not frozen:
            continue
        length, first, motion = max(frozen)
        findings.append(
            Finding(
                "error",
                "frozen_frames",
                clip.episode,
                first,
                f"camera {camera!r} repeats one frame for {length + 1} steps while the robot moves: by up to "
                f"{motion:.0%} of a dimension's range in {FREEZE} steps",
                "the image does not belong to the state and the action of its step",
                "leave the episode out, or cut it before the freeze",
                (camera,),
                steps=length + 1,
            )
        )
    return findings


def _stretches(
    still: NDArray[np.bool_], state: NDArray, scale: Scale
) -> list[tuple[NDArray[np.float64], int, int]]:
    """Return the stretches in which the image repeats: first step, number of steps, and the motion meanwhile.

    The motion is that of each FREEZE steps in a row [windows, moving].
    """
    stretches, first = [], 0
    for step, repeats in enumerate([*still.tolist(), False]):
        if repeats:
            continue
        if step - first >= FREEZE:
            windows = range(first, step - FREEZE + 1)
            motion = np.stack([scale.within(state[start : start + FREEZE + 1]) for start in windows])
            stretches.append((motion, first, step - first))
        first = step + 1
    return stretches
