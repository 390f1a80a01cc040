"""Check that frames belong to the state of their step: predict states from frames, by other episodes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
AGREEING = 0.75  # share of the episodes that must be near the usual shift, and in which a shift must show
MANY = 100  # episodes from which on one more or less changes no fit
RIDGES = (1e-3, 1e-4)  # times the mean variance of a feature; few episodes need less, or more
STILL = 1e-6  # a state dimension that varies less says nothing


@dataclass(frozen=True)
class Rule:
    """When a correlation at another shift than the usual one counts."""

    fewest: int
    """Episodes."""
    reliable: float
    """Median correlation at the usual shift."""
    near: int
    """Frames by which most episodes' own shifts may differ from the usual one."""
    least: int
    """Frames of shift that are reported."""
    gain: float
    """Correlation that the episode's own shift must add."""
    ratio: float
    """Times that the unexplained part must be larger at the usual shift than at the episode's own."""
    height: float
    """Share of the usual correlation that the episode's own shift must reach."""
    times: float
    """Times that the unexplained part at the usual shift must be larger than in most episodes."""


MOTION = Rule(fewest=4, reliable=0.5, near=1, least=2, gain=0.1, ratio=1.5, height=0.8, times=1.0)
COARSE_MOTION = replace(MOTION, near=3, least=6)  # where peaks are broad
PREDICTION = Rule(fewest=6, reliable=0.8, near=2, least=3, gain=0.0, ratio=2.0, height=0.9, times=3.0)


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


@dataclass(frozen=True)
class Seen:
    """The correlation of an episode's frames with its states at each shift, by one method."""

    curve: NDArray[np.float64]  # [2 * FURTHEST + 1]
    usual: int
    """The usual shift's position in the curve."""
    usually: float
    """The median correlation of all episodes there."""

    @property
    def shift(self) -> int:
        """The episode's own shift."""
        return int(self.curve.argmax()) - self.usual

    @property
    def ratio(self) -> float:
        """How many times less is unexplained at the episode's own shift than at the usual one."""
        return self.against(0)

    def against(self, shift: int) -> float:
        """Return how many times less is unexplained at the episode's own shift than at another."""
        place = min(max(self.usual + shift, 0), len(self.curve) - 1)
        return float((1 - self.curve[place]) / (1 - self.curve.max() + 1e-9))


def check_shift(camera: str, tracks: Sequence[Track], untested: Untested) -> list[Finding]:
    """Return the episodes whose frames are late or early against their states, compared with the others.

    The change of the image is compared with the speed of the state. Where these agree badly (a hand far from
    the camera, a steady speed), a linear map from frames to states is fitted to all other episodes, and its
    prediction is compared with the recorded states at each shift. An episode's best shift only counts if most
    episodes have theirs at the same place: smooth curves correlate strongly somewhere by chance.
    """
    where, total = f"camera {camera!r}", len(tracks)
    tracks = [track for track in tracks if len(track.state) >= 3 * FURTHEST]
    moving = [t for t in tracks if np.ptp(t.speed) > 0 and np.ptp(t.change) > 0]
    methods: list[tuple[str, Rule, list[Track], Callable[[Sequence[Track]], NDArray[np.float64]]]] = [
        ("the image changes as the state moves", MOTION, moving, _motions),
        ("frames predict states", PREDICTION, tracks, _predictions),
        ("the image changes as the state moves", COARSE_MOTION, moving, _motions),
    ]
    reasons, chosen, least = [], None, FURTHEST + 1
    seen: dict[Rule, dict[str, Seen]] = {}  # by each method that works here, of episodes that it sees well
    for what, rule, some, curves_of in methods:
        if len(some) < rule.fewest:
            reasons.append(f"{what}: {len(some)} of {total} episodes are long enough and move")
            continue
        curves = curves_of(some)
        shows = _least_shown(curves, rule)
        if not _agree(curves, rule):
            reasons.append(f"{what}: {_disagreement(curves, rule)}")
            continue
        usual, usually = _usual(curves), float(np.median(curves[:, _usual(curves)]))
        pairs = zip(some, curves, strict=True)
        seen[rule] = {
            t.episode: Seen(curve, usual, usually)
            for t, curve in pairs
            if curve.max() >= rule.height * usually
        }
        if shows is None:
            reasons.append(f"{what}: a shift would show in too few episodes")
        elif shows < least:
            chosen, least = (rule, some, curves_of), shows
    if chosen is None:
        untested.add("video_shift", "; ".join(reasons[:2]), where)
        return []
    if least > PREDICTION.least:
        untested.add("video_shift", f"fewer than {least} frames would not be found", where)
    others = [found for rule, found in seen.items() if rule != chosen[0]]
    return _found(camera, *chosen, others)


def _usual(curves: NDArray[np.float64]) -> int:
    return int(np.median(curves, axis=0).argmax())


def _agree(curves: NDArray[np.float64], rule: Rule) -> bool:
    """Whether the median correlation is high, and most episodes have their peak near the usual shift."""
    usual = _usual(curves)
    close = np.abs(curves.argmax(axis=1) - usual) <= rule.near
    return float(np.median(curves[:, usual])) >= rule.reliable and float(close.mean()) >= AGREEING


def _disagreement(curves: NDArray[np.float64], rule: Rule) -> str:
    usual = _usual(curves)
    close = int((np.abs(curves.argmax(axis=1) - usual) <= rule.near).sum())
    height = float(np.median(curves[:, usual]))
    return f"correlation {height:.2f} in the median, at one shift in {close} of {len(curves)} episodes"


def _counts(
    best: NDArray[np.float64], usual: NDArray[np.float64], usually: float, rule: Rule
) -> NDArray[np.bool_]:
    """Whether a correlation `best` at another shift counts against `usual`, that at the usual shift."""
    return (
        (best >= usual + rule.gain)
        & (1 - usual >= rule.ratio * (1 - best))
        & (best >= rule.height * usually)
        & (1 - usual >= rule.times * (1 - usually))
    )


def _least_shown(curves: NDArray[np.float64], rule: Rule) -> int | None:
    """Return the least shift that would be found in most episodes, None if there is none.

    A shift moves an episode's own curve.
    """
    usual = _usual(curves)
    usually, best = float(np.median(curves[:, usual])), curves.max(axis=1)
    for shift in range(rule.least, FURTHEST + 1):
        places = [place for place in (usual - shift, usual + shift) if 0 <= place < curves.shape[1]]
        if places and np.mean([_counts(best, curves[:, p], usually, rule) for p in places]) >= AGREEING:
            return shift
    return None


def _found(
    camera: str,
    rule: Rule,
    tracks: Sequence[Track],
    curves_of: Callable[[Sequence[Track]], NDArray[np.float64]],
    others: Sequence[Mapping[str, Seen]],
) -> list[Finding]:
    """Return the findings, the clearest first, each without the episodes found before it.

    `others` is what other methods that work here see: none may say more clearly that there is no shift.
    """
    findings, left = [], list(tracks)
    while len(left) >= rule.fewest and len(findings) <= len(tracks) * (1 - AGREEING):
        curves = curves_of(left)
        usual, own = _usual(curves), curves.argmax(axis=1)
        usually, best = float(np.median(curves[:, usual])), curves.max(axis=1)
        late = (np.abs(own - usual) >= rule.least) & _counts(best, curves[:, usual], usually, rule)
        clearest: list[tuple[int, Seen]] = []
        for n in np.flatnonzero(late).tolist():
            episode = left[n].episode
            views = [other[episode] for other in others if episode in other]
            view = _clearest(Seen(curves[n], usual, usually), views)
            if view is not None:
                clearest.append((n, view))
        clearest.sort(key=lambda pair: -pair[1].ratio)
        chosen = clearest if len(left) > MANY else clearest[:1]
        findings += [_shifted(camera, left[n].episode, view) for n, view in chosen]
        if not chosen or len(left) > MANY:
            break
        left.pop(chosen[0][0])
    return findings


def _clearest(own: Seen, others: Sequence[Seen]) -> Seen | None:
    """Return what says most clearly how far an episode is shifted; None if something says it is not."""
    for other in others:
        if 2 * abs(other.shift) < abs(own.shift) and other.against(own.shift) > own.ratio:
            return None
    return max([own, *(other for other in others if 2 * abs(other.shift) >= abs(own.shift))], key=_ratio)


def _ratio(seen: Seen) -> float:
    return seen.ratio


def _shifted(camera: str, episode: str, seen: Seen) -> Finding:
    shift, best, usual = seen.shift, float(seen.curve.max()), float(seen.curve[seen.usual])
    return Finding(
        "error",
        "video_shift",
        episode,
        None,
        f"camera {camera!r} is {abs(shift)} frames {'late' if shift > 0 else 'early'} against the "
        f"states (which it shows with correlation {best:.3f} there, {usual:.3f} "
        f"where the other episodes do best, with {seen.usually:.3f})",
        "images and actions of a step do not belong together",
        "shift the frames, or leave the episode out",
        (camera,),
    )


def _motions(tracks: Sequence[Track]) -> NDArray[np.float64]:
    return np.stack([_motion(track) for track in tracks])


def _predictions(tracks: Sequence[Track]) -> NDArray[np.float64]:
    """Return the curves of the map that predicts best."""
    features, states = [t.features for t in tracks], [t.state.astype(np.float64) for t in tracks]
    ridges = RIDGES[:1] if len(tracks) > MANY else RIDGES
    made = [_predicted(features, states, ridge) for ridge in ridges]
    return max(made, key=lambda curves: float(np.median(curves[:, _usual(curves)])))


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


def _predicted(
    features: list[NDArray[np.float32]], states: list[NDArray[np.float64]], ridge: float
) -> NDArray[np.float64]:
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
        penalty = np.full(len(others), ridge * np.trace(others[:-1, :-1]) / FEATURES + 1e-9)
        penalty[-1] = 1e-9  # the constant term is free
        predicted = x @ np.linalg.solve(others + np.diag(penalty), product - x.T @ y)
        for place, shift in enumerate(range(-FURTHEST, FURTHEST + 1)):
            a = y[max(0, -shift) : len(y) - max(0, shift)]
            b = predicted[max(0, shift) : len(y) + min(0, shift)]
            a, b = a - a.mean(axis=0), b - b.mean(axis=0)
            sums[:, n, place] = (a * b).sum(axis=0), (a * a).sum(axis=0), (b * b).sum(axis=0)
    each = sums[0] / np.sqrt(sums[1] * sums[2] + 1e-12)
    shown = np.median(each, axis=0).max(axis=0) >= PREDICTION.reliable
    ab, aa, bb = sums[..., shown].sum(axis=-1)
    return ab / np.sqrt(aa * bb + 1e-12)
