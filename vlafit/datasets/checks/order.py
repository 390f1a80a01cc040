"""Find frames that are out of order: neighbours are then as far apart as frames two steps apart."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.clips import Clip
from vlafit.datasets.checks.finding import Finding

FEWEST = 4  # episodes that must agree
WINDOW = 6  # frames
SHORTEST = 4 * WINDOW  # frames of an episode
SMOOTH = (
    1.4  # times that frames two steps apart must differ more than neighbours, in fast motion; 2 is a line
)
ROUGH = 1.25  # the same, below which frames of a window may be out of order
LEAST = 0.65  # of the change in the episode's fastest motion: that of neighbours in such a window
FURTHER = 2.0  # times the same in nine of ten episodes
VISIBLE = 0.1  # distance of features: a hundredth of a grey level in every pixel
FAST = 0.75  # of an episode's windows are slower


def check_order(camera: str, clips: Sequence[Clip], untested: Untested) -> list[Finding]:
    """Return the episodes in which neighbouring frames change much, and frames two steps apart no more."""
    where = f"camera {camera!r}"
    some = [clip for clip in clips if len(clip.features) >= SHORTEST]
    if len(some) < FEWEST:
        reason = f"{len(some)} of {len(clips)} episodes have {SHORTEST} frames or more"
        untested.add("frames_out_of_order", reason, where)
        return []
    measured = [_roughness(clip.features) for clip in some]
    smooth = float(np.median([ratio for _, _, ratio in measured]))
    if smooth < SMOOTH:
        reason = "the image moves no smoother than its noise, or hardly at all"
        untested.add("frames_out_of_order", reason, where)
        return []
    limit = max(LEAST, FURTHER * float(np.quantile([m[0] for m in measured], 0.9, method="lower")))
    return [
        Finding(
            "error",
            "frames_out_of_order",
            clip.episode,
            step,
            f"neighbouring frames of camera {camera!r} differ there by {rough:.0%} of what they do in the "
            "episode's fastest motion, and frames two steps apart by hardly more: no motion is so jerky in "
            f"most episodes ({float(np.median([m[0] for m in measured])):.0%})",
            "the image does not belong to the state and the action of its step",
            "fetch the frames again (files sorted by name?), or leave the episode out",
            (camera,),
            steps=WINDOW,
        )
        for clip, (rough, step, _) in zip(some, measured, strict=True)
        if rough > limit
    ]


def _roughness(features: NDArray) -> tuple[float, int, float]:
    """Return how rough the roughest window is, its first frame, and how smooth fast motion is."""
    rows = np.asarray(features, np.float64)
    near, far = (np.linalg.norm(rows[k:] - rows[:-k], axis=1) for k in (1, 2))
    count = len(rows) - WINDOW + 1
    windows = np.lib.stride_tricks.sliding_window_view
    steps = windows(near, WINDOW - 1)[:count].mean(axis=1)
    ratio = windows(far, WINDOW - 2)[:count].mean(axis=1) / np.maximum(steps, 1e-9)
    floor, fast = np.quantile(near, [0.2, 0.95])
    if fast <= max(floor, VISIBLE):
        return 0.0, 0, 0.0
    rough = np.where(ratio < ROUGH, steps - floor, 0.0) / (fast - floor)
    rough = np.minimum(rough[1:], rough[:-1])  # of two windows, because a cut makes one look rough
    smooth = float(np.median(ratio[steps >= np.quantile(steps, FAST)]))
    return float(rough.max()), int(rough.argmax()), smooth
