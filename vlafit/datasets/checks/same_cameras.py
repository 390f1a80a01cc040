"""Find cameras that show the same video: one camera was recorded twice, under two names."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.clips import Clip
from vlafit.datasets.checks.finding import Finding

NEARLY_ALL = 0.9  # share of the episodes from which on it concerns the dataset
ALIKE = 0.5  # grey levels by which cells of a frame may differ: the same frames in two videos do


def check_same_cameras(clips: Mapping[str, Sequence[Clip]], untested: Untested) -> list[Finding]:
    """Return a finding for each two cameras with the same frames, of all episodes or of one."""
    if len(clips) < 2:
        untested.add("same_cameras", "there is one camera")
    findings = []
    for one, other in combinations(clips, 2):
        pairs = list(zip(clips[one], clips[other], strict=True))
        moving = [(a, b) for a, b in pairs if a.change.any() or b.change.any()]
        if not moving:
            untested.add("same_cameras", "their images never change", f"cameras {one!r} and {other!r}")
        same = [a.episode for a, b in moving if _same(a, b)]
        if moving and len(same) >= NEARLY_ALL * len(moving):
            findings.append(_finding(one, other, "", f"in {len(same)} of {len(pairs)} episodes"))
        else:
            findings += [_finding(one, other, episode, "in every step") for episode in same]
    return findings


def _same(one: Clip, other: Clip) -> bool:
    return bool(np.abs(one.features - other.features).mean() <= ALIKE)


def _finding(one: str, other: str, episode: str, where: str) -> Finding:
    return Finding(
        "error",
        "duplicate_cameras",
        episode,
        None,
        f"cameras {one!r} and {other!r} show the same frames {where}",
        "one view is missing, and the policy takes the other one for it",
        "fetch or record the right video of one of the two, or leave one camera out of the card"
        if not episode
        else "fetch the right video of one of the two, or leave the episode out",
        (one, other),
    )
