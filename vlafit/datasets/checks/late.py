"""Check that frames belong to the state of their step: predict states from frames, by other episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Finding

GRID = 16  # cells a side into which a frame is averaged
FEATURES = (
    128  # random projections of the cells; with 32 or 64 the shift of a clean episode is off by 3 (LOG.md)
)
FURTHEST = 12  # frames by which a video may be late or early
LEAST = 3  # frames of shift that are reported
FEWEST = 20  # episodes whose states are predicted, each from the others
RELIABLE = 0.8  # correlation of predicted and recorded states below which nothing can be judged
FEWEST_MOTIONS = 4  # episodes whose motion is compared
RELIABLE_MOTION = 0.5  # the same for the image's change and the state's speed
MOTION_GAIN = 0.1  # correlation of change and speed that a shift must add to be believed
AGREEING = 0.75  # share of the episodes that must be near the usual shift
RATIO = 1.5  # times that the unexplained part must be larger at the usual shift than at the episode's own
RIDGE = 1e-3  # times the mean variance of a feature
STILL = 1e-6  # a state dimension that varies less says nothing


@cache
def projection() -> NDArray[np.float32]:
    """Return the matrix [GRID * GRID * 3, FEATURES] that makes features of cells, always the same."""
    size = GRID * GRID * 3
    matrix = (np.random.default_rng(0).normal(size=(size, FEATURES)) / np.sqrt(size)).astype(np.float32)
    matrix.flags.writeable = False
    return matrix


@dataclass(frozen=True)
class Track:
    """Measurements of one camera of one episode, step by step."""

    episode: str
    state: NDArray[np.float32]  # [T, s]
    features: NDArray[np.float32]  # [T, FEATURES]
    change: NDArray[np.float64]  # [T - 1], mean absolute difference of neighbouring frames
    speed: NDArray[np.float64]  # [T - 1], of the state


def check_shift(camera: str, tracks: Sequence[Track], untested: Untested) -> list[Finding]:
    """Return the episodes whose frames are late or early against their states, compared with the others.

    The change of the image is compared with the speed of the state. Where these agree badly (a hand far from
    the camera), a linear map from frames to states is fitted to all other episodes, and its prediction is
    compared with the recorded states at each shift. An episode's best shift only counts if most episodes have
    theirs at the same place: smooth curves correlate strongly somewhere by chance.
    """
    where, total = f"camera {camera!r}", len(tracks)
    tracks = [track for track in tracks if len(track.state) >= 3 * FURTHEST]
    moving = [t for t in tracks if np.ptp(t.speed) > 0 and np.ptp(t.change) > 0]
    reasons = []
    if len(moving) >= FEWEST_MOTIONS:
        curves = np.stack([_motion(track) for track in moving])
        if _agree(curves, RELIABLE_MOTION, 1):
            return _findings(camera, moving, curves, 2, MOTION_GAIN)
        reasons.append(_disagreement("the image's change follows the state's speed", curves, 1))
    else:
        what = "episodes are long enough, and image and state move in them"
        reasons.append(f"{len(moving)} of {total} {what}")
    if len(tracks) >= FEWEST:
        curves = _predicted([t.features for t in tracks], [t.state.astype(np.float64) for t in tracks])
        if _agree(curves, RELIABLE, LEAST - 1):
            return _findings(camera, tracks, curves, LEAST, 0.0)
        reasons.append(_disagreement("frames predict states", curves, LEAST - 1))
    else:
        reasons.append(f"{len(tracks)} episodes are too few to predict states from frames")
    untested.add("video_shift", "; ".join(reasons), where)
    return []


def _disagreement(what: str, curves: NDArray[np.float64], near: int) -> str:
    usual = int(np.median(curves, axis=0).argmax())
    close = int((np.abs(curves.argmax(axis=1) - usual) <= near).sum())
    return (
        f"{what} with a correlation of {float(np.median(curves[:, usual])):.2f} in the median, and at one "
        f"shift in {close} of {len(curves)} episodes"
    )


def _agree(curves: NDArray[np.float64], least: float, near: int) -> bool:
    """Whether the median correlation is high, and most episodes have their peak near the usual shift."""
    usual = int(np.median(curves, axis=0).argmax())
    close = np.abs(curves.argmax(axis=1) - usual) <= near
    return float(np.median(curves[:, usual])) >= least and float(close.mean()) >= AGREEING


def _findings(
    camera: str, tracks: Sequence[Track], curves: NDArray[np.float64], least: int, gain: float
) -> list[Finding]:
    usual = int(np.median(curves, axis=0).argmax())
    usually = float(np.median(curves[:, usual]))
    findings = []
    for track, curve in zip(tracks, curves, strict=True):
        best = int(curve.argmax())
        shift = best - usual
        if (
            abs(shift) < least
            or curve[best] < curve[usual] + gain
            or 1 - curve[usual] < RATIO * (1 - curve[best])
            or curve[best] < 0.8 * usually
        ):
            continue
        findings.append(
            Finding(
                "error",
                "video_shift",
                track.episode,
                None,
                f"camera {camera!r} is {abs(shift)} frames {'late' if shift > 0 else 'early'} against the "
                f"states (which it shows with correlation {curve[best]:.3f} there, {curve[usual]:.3f} "
                f"where the other episodes do best, with {usually:.3f})",
                "images and actions of a step do not belong together",
                "shift the frames, or leave the episode out",
                (camera,),
            )
        )
    return findings


def _motion(track: Track) -> NDArray[np.float64]:
    """Return the correlation of the image's change with the state's speed, for each shift."""
    heights = []
    for shift in range(-FURTHEST, FURTHEST + 1):
        a = track.speed[max(0, -shift) : len(track.speed) - max(0, shift)]
        b = track.change[max(0, shift) : len(track.change) + min(0, shift)]
        heights.append(np.corrcoef(a, b)[0, 1] if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0)
    return np.asarray(heights)


def _inputs(features: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)


def _predicted(features: list[NDArray[np.float32]], states: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the correlation of each episode's states with their prediction, for each shift [n, shifts].

    Of the state dimensions that frames show well in most episodes; 0 if there is none.
    """
    spread = np.concatenate(states).std(axis=0)
    moving = spread > STILL
    targets = [rows[:, moving] / spread[moving] for rows in states]
    gram, product = np.zeros((FEATURES + 1,) * 2), np.zeros((FEATURES + 1, int(moving.sum())))
    for f, y in zip(features, targets, strict=True):
        x = _inputs(f)
        gram, product = gram + x.T @ x, product + x.T @ y
    sums = np.zeros((3, len(features), 2 * FURTHEST + 1, int(moving.sum())))  # of a * b, a * a and b * b
    for n, (f, y) in enumerate(zip(features, targets, strict=True)):
        x = _inputs(f)  # again, because all episodes' would take gigabytes
        others = gram - x.T @ x
        penalty = np.full(len(others), RIDGE * np.trace(others[:-1, :-1]) / FEATURES + 1e-9)
        penalty[-1] = 1e-9  # the constant term is free
        predicted = x @ np.linalg.solve(others + np.diag(penalty), product - x.T @ y)
        for place, shift in enumerate(range(-FURTHEST, FURTHEST + 1)):
            a = y[max(0, -shift) : len(y) - max(0, shift)]
            b = predicted[max(0, shift) : len(y) + min(0, shift)]
            a, b = a - a.mean(axis=0), b - b.mean(axis=0)
            sums[:, n, place] = (a * b).sum(axis=0), (a * a).sum(axis=0), (b * b).sum(axis=0)
    each = sums[0] / np.sqrt(sums[1] * sums[2] + 1e-12)
    shown = np.median(each, axis=0).max(axis=0) >= RELIABLE
    ab, aa, bb = sums[..., shown].sum(axis=-1)
    return ab / np.sqrt(aa * bb + 1e-12)
