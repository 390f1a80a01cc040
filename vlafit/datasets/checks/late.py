"""Check that frames belong to the state of their step: an episode's best shift against that of the others."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.curves import (
    FURTHEST,
    MANY,
    RELIABLE,
    SHIFTS,
    Track,
    motions,
    predictions,
    together,
    usual_place,
)
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.checks.matched import check_matches

AGREEING = 0.75  # share of the episodes that must be near the usual shift
SHOWING = 0.75  # share of the episodes in which a shift must show


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
PREDICTION = Rule(fewest=6, reliable=RELIABLE, near=2, least=3, gain=0.0, ratio=2.0, height=0.9, times=3.0)
TOGETHER = Rule(fewest=6, reliable=RELIABLE, near=1, least=2, gain=0.0, ratio=1.3, height=0.9, times=1.3)
Curves = Callable[[Sequence[Track]], NDArray[np.float64]]


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

    The change of the image is compared with the speeds of the state, and the states with those that a linear
    map from frames predicts (see `curves`); both together tell smaller shifts than either does. A shift only
    counts if most episodes have theirs at the same place, because smooth curves correlate strongly somewhere
    by chance, and if it is as large as would be found in most of them.
    """
    where, total = f"camera {camera!r}", len(tracks)
    tracks = [track for track in tracks if len(track.state) >= 3 * FURTHEST]
    moving = [t for t in tracks if np.ptp(t.speed) > 0 and np.ptp(t.change) > 0]
    made = _Made({})
    methods: list[tuple[str, Rule, list[Track], Curves]] = [
        ("the image changes as the state moves", MOTION, moving, made.motion),
        ("frames predict states", PREDICTION, tracks, made.prediction),
        ("both together", TOGETHER, moving, made.both),
        ("the image changes as the state moves", COARSE_MOTION, moving, made.motion),
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
        usual, usually = usual_place(curves), float(np.median(curves[:, usual_place(curves)]))
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
    mismatched = _mismatched(camera, made, moving, tracks, seen)
    if chosen is None:
        untested.add("video_shift", "; ".join(reasons[:2]), where)
        return mismatched
    if least > TOGETHER.least:
        untested.add("video_shift", f"fewer than {least} frames would not be found", where)
    blamed = {finding.episode for finding in mismatched}
    for track in tracks:
        if track.episode not in seen[chosen[0]] and track.episode not in blamed:
            reason = "at no shift do its frames follow its states as well as in most episodes"
            untested.add("video_shift", reason, f"{where} of episode {track.episode}")
    others = [found for rule, found in seen.items() if rule != chosen[0]]
    late = _found(camera, replace(chosen[0], least=least), *chosen[1:], others)
    return late + [finding for finding in mismatched if finding.episode not in {f.episode for f in late}]


@dataclass(frozen=True)
class _Made:
    """The curves of each method, made once for the same episodes."""

    kept: dict[tuple[str, tuple[str, ...]], NDArray[np.float64]]

    def motion(self, tracks: Sequence[Track]) -> NDArray[np.float64]:
        return self._once(motions, tracks)

    def prediction(self, tracks: Sequence[Track]) -> NDArray[np.float64]:
        return self._once(predictions, tracks)

    def both(self, tracks: Sequence[Track]) -> NDArray[np.float64]:
        """Return the curves of both together; 0 where they have not the same usual shift."""
        one, other = self.motion(tracks), self.prediction(tracks)
        same = abs(usual_place(one) - usual_place(other)) <= 1
        return together(one, other) if same else np.zeros((len(tracks), len(SHIFTS)))

    def _once(self, method: Curves, tracks: Sequence[Track]) -> NDArray[np.float64]:
        key = method.__name__, tuple(track.episode for track in tracks)
        if key not in self.kept:
            self.kept[key] = method(tracks)
        return self.kept[key]


def _mismatched(
    camera: str, made: _Made, moving: Sequence[Track], tracks: Sequence[Track], works: Collection[Rule]
) -> list[Finding]:
    """Return the episodes whose frames show the states of another one, as the methods that work here see."""
    if not {MOTION, COARSE_MOTION} & set(works):
        return []
    low, usual, usually = _low(moving, made.motion(moving), MOTION)
    if PREDICTION in works:
        low &= _low(tracks, made.prediction(tracks), PREDICTION)[0]
    return check_matches(camera, moving, sorted(low), usual, usually)


def _low(tracks: Sequence[Track], curves: NDArray[np.float64], rule: Rule) -> tuple[set[str], int, float]:
    """Return the episodes that are low at the usual shift, its place, and the median correlation there."""
    usual = usual_place(curves)
    usually = float(np.median(curves[:, usual]))
    near = curves[:, max(0, usual - rule.near) : usual + rule.near + 1].max(axis=1)
    low = {t.episode for t, height in zip(tracks, near, strict=True) if height < rule.height * usually}
    return low, usual, usually


def _agree(curves: NDArray[np.float64], rule: Rule) -> bool:
    """Whether the median correlation is high, and most episodes have their peak near the usual shift."""
    usual = usual_place(curves)
    close = np.abs(curves.argmax(axis=1) - usual) <= rule.near
    return float(np.median(curves[:, usual])) >= rule.reliable and float(close.mean()) >= AGREEING


def _disagreement(curves: NDArray[np.float64], rule: Rule) -> str:
    usual = usual_place(curves)
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
    usual = usual_place(curves)
    usually, best = float(np.median(curves[:, usual])), curves.max(axis=1)
    for shift in range(rule.least, FURTHEST + 1):
        places = [place for place in (usual - shift, usual + shift) if 0 <= place < curves.shape[1]]
        if places and np.mean([_counts(best, curves[:, p], usually, rule) for p in places]) >= SHOWING:
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
        usual, own = usual_place(curves), curves.argmax(axis=1)
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
        f"camera {camera!r} is about {abs(shift)} frames {'late' if shift > 0 else 'early'} against the "
        f"states (which it shows with correlation {best:.3f} there, {usual:.3f} "
        f"where the other episodes do best, with {seen.usually:.3f})",
        "images and actions of a step do not belong together",
        "shift the frames, or leave the episode out",
        (camera,),
    )
