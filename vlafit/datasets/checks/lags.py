"""Compare signs and delays of an episode's actions against its states with those of most episodes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks import backwards
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.chance import by_chance
from vlafit.datasets.checks.finding import Columns, Finding, Shown
from vlafit.datasets.checks.relations import Pair, check_relation
from vlafit.datasets.checks.turned import check_parts

FURTHEST_LAG = 12  # steps by which an action is looked for before and after the state that it causes
STRONG = 0.6  # correlation at which an action dimension is taken to drive a state dimension
MIRRORED = 0.75  # share of the usual correlation that an episode of the other sign must have
FEWEST = 4  # episodes that must agree before one of them is called different
AGREEING = 0.75  # share of the episodes that must agree on a sign
EXACT = 0.9  # share of the episodes whose own peak must be at the usual lag before one step counts
SHARP = 0.8  # share of the episodes whose own peak must be near the usual lag, else it is too broad to tell
LAG_RATIO = 2.0  # times that the unexplained part must be larger at the usual lag than at the episode's own
SAMPLE = 32  # episodes that say which state dimension an action dimension drives
MOVING = 1e-6  # a range below this is no motion
SHORTEST = 3 * FURTHEST_LAG  # steps of an episode
RELATED = ("dead_dimension", "action_sign", "action_lag", "played_backwards", "scale")  # the tests made here


@dataclass(frozen=True)
class _Driven:
    """How an action dimension drives a state dimension in each episode."""

    name: str
    shown: Shown
    difference: bool
    place: int
    """The usual lag's position in the curves."""
    curves: NDArray[np.float64]  # [episodes, lags], with the usual sign positive

    @cached_property
    def lag(self) -> int:
        return self.place - FURTHEST_LAG

    @cached_property
    def flipped(self) -> NDArray[np.bool_]:
        usual = self.curves[:, self.place]
        return usual < -max(STRONG, MIRRORED * float(np.median(usual)))

    @property
    def one_sign(self) -> bool:
        """Whether the sign is one in most episodes."""
        return bool(self.flipped.mean() <= 1 - AGREEING)

    @property
    def exact(self) -> bool:
        """Whether nearly every episode's own peak is at the usual lag, so that one step counts."""
        others = len(self.curves) - 1  # than the one that may be late
        return bool((self.curves.argmax(axis=1) == self.place).sum() >= EXACT * others)

    @cached_property
    def sharp(self) -> NDArray[np.bool_]:
        """Whether an episode's own peak is near the usual one."""
        return np.abs(self.curves.argmax(axis=1) - self.place) <= 1

    @cached_property
    def late(self) -> NDArray[np.int64]:
        """By how many steps each episode's lag is another, where that explains it much better."""
        height, usual = self.curves.max(axis=1), self.curves[:, self.place]
        gains = (height > np.median(usual) - 0.05) & (1 - usual > LAG_RATIO * (1 - height))
        return np.where(gains, self.curves.argmax(axis=1) - self.place, 0)


def check_lags(columns: Columns, labels: Sequence[str], untested: Untested) -> list[Finding]:
    """Return the episodes whose actions drive their states otherwise than in most episodes.

    The median of all correlation curves says at which lag and with which sign an action dimension drives its
    state. An episode's own peak anywhere else proves nothing: both signals are smooth, so they correlate
    strongly at some lag by chance. `labels` are the names of the action's dimensions.
    """
    columns = _long_enough(columns, untested)
    if not columns:
        return []
    driven, relations, parts = [], [], []
    drives, unsure = _drives(columns)
    for d in range(columns[0][2].shape[1]):
        name = labels[d] if d < len(labels) else f"dimension {d}"
        if d not in drives:
            reason = unsure.get(d) or _undriven(columns, d)
            for test in RELATED:
                untested.add(test, reason, f"action {name}")
            continue
        s, difference = drives[d]
        shown = (("action", d), ("state", s))
        one = _driven(columns, name, shown, difference)
        driven.append(one)
        pairs = [_pair(episode, x[:, s], a[:, d], one.lag, difference) for episode, x, a in columns]
        found = check_relation(name, pairs, untested)
        relations += [replace(finding, columns=shown) for finding in found]
        as_usual = [pair for pair, flipped in zip(pairs, one.flipped, strict=True) if not flipped]
        turned = check_parts(name, as_usual, untested) if one.one_sign else []
        parts += [replace(finding, columns=shown) for finding in turned]
    findings = [*_signs(columns, driven, untested), *_lags(columns, driven, untested)]
    findings = backwards.explain(columns, findings, [_evidence(one) for one in driven], untested)
    explained = {finding.episode for finding in findings}
    findings += [finding for finding in parts if finding.episode not in explained]
    explained = {finding.episode for finding in findings}
    return findings + [finding for finding in relations if finding.episode not in explained]


def _long_enough(columns: Columns, untested: Untested) -> Columns:
    """Return the episodes that are long enough; none if these are too few."""
    long = [c for c in columns if len(c[1]) >= SHORTEST]
    for test in RELATED:
        if len(long) < FEWEST:
            reason = f"{len(long)} of {len(columns)} episodes have {SHORTEST} steps or more"
            untested.add(test, f"{reason} and commands of their own")
            continue
        for episode, state, _ in columns:
            if len(state) < SHORTEST:
                untested.add(test, f"fewer than {SHORTEST} steps", f"episode {episode}")
    return long if len(long) >= FEWEST else []


def _driven(columns: Columns, name: str, shown: Shown, difference: bool) -> _Driven:
    d, s = shown[0][1], shown[1][1]
    curves = np.stack(
        [_correlations(x[:, s : s + 1], a[:, d : d + 1], difference)[:, 0, 0] for _, x, a in columns]
    )
    middle = np.median(curves, axis=0)
    place = int(np.abs(middle).argmax())
    return _Driven(name, shown, difference, place, curves * np.sign(middle[place]))


def _evidence(one: _Driven) -> backwards.Evidence:
    """Return whether each episode is usual as it is, and played backwards."""
    curves, place = one.curves, one.place
    mirrored = curves[:, ::-1]
    if one.difference:  # a[t] with x[t + lag + 1] - x[t + lag] becomes its negative at -1 - lag
        mirrored = -np.roll(mirrored, -1, axis=1)
        mirrored[:, -1] = -1.0
    enough = np.median(curves[:, place]) - 0.05
    away, turned_away = (
        np.where(c.max(axis=1) > enough, np.abs(c.argmax(axis=1) - place), len(c[0]))
        for c in (curves, mirrored)
    )
    tells = bool(one.sharp.mean() >= SHARP) and (one.difference or one.lag != 0)
    turned = (turned_away <= 1) & (turned_away < away)
    return backwards.Evidence(one.shown, one.difference, turned, tells)


def _signs(columns: Columns, driven: Sequence[_Driven], untested: Untested) -> list[Finding]:
    findings = []
    for one in driven:
        flipped = one.flipped
        if not one.one_sign:
            reason = (
                f"its sign is one in {int((~flipped).sum())} and the other in {int(flipped.sum())} episodes"
            )
            untested.add("action_sign", reason, f"action {one.name}")
            continue
        for n in np.flatnonzero(flipped):
            height, agreeing = one.curves[n, one.place], int((~flipped).sum())
            findings.append(_sign(columns[n][0], one.name, one.shown, height, agreeing, len(columns)))
    return findings


def _lags(columns: Columns, driven: Sequence[_Driven], untested: Untested) -> list[Finding]:
    judged = [one for one in driven if one.sharp.mean() >= SHARP]
    findings: list[Finding] = []
    if driven and len(judged) <= len(driven) / 2:
        counted = f"{len(judged)} of {len(driven)} action dimensions"
        untested.add("action_lag", f"the state follows at one delay in most episodes in {counted}")
    elif driven:
        for one in driven:
            if one.sharp.mean() < SHARP:
                reason = (
                    f"the state follows at one delay in {int(one.sharp.sum())} of {len(columns)} episodes"
                )
                untested.add("action_lag", reason, f"action {one.name}")
        clearest = max(judged, key=lambda one: abs(float(np.median(one.curves[:, one.place])))).shown
        for n, (episode, *_) in enumerate(columns):
            as_usual = [one for one in judged if not one.flipped[n]]
            own = np.asarray([one.late[n] for one in as_usual], np.int64)
            exact = np.asarray([one.late[n] for one in as_usual if one.exact], np.int64)
            if _is_late(own, 2) or _is_late(exact, 1):
                findings.append(_lag(episode, clearest, int(np.median(own if _is_late(own, 2) else exact))))
    everywhere = [one.lag for one in driven if one.lag < 0]
    if driven and len(everywhere) > len(driven) / 2:
        sharpest = max(driven, key=lambda one: float(one.sharp.mean())).shown
        findings.append(_lag("", sharpest, int(np.median(everywhere))))
    return findings


def is_one_step(finding: Finding) -> bool:
    """Whether a finding is a delay of one step, which a few wrong rows may look like."""
    return finding.kind == "action_lag" and finding.message.startswith((_how_late(-1), _how_late(1)))


def _pair(
    episode: str, state: NDArray[np.float64], action: NDArray[np.float64], lag: int, difference: bool
) -> Pair:
    """Return the action at each step with the state (or its difference) `lag` steps later."""
    if difference:
        state, action = np.diff(state), action[:-1]
    first, last = max(0, -lag), len(action) - max(0, lag)
    return Pair(episode, action[first:last], state[first + lag : last + lag], difference)


def _is_late(late: NDArray[np.int64], least: int) -> bool:
    return bool(len(late) > 0 and abs(np.median(late)) >= least and (np.abs(late) >= least).mean() > 0.5)


def _sign(episode: str, name: str, shown: Shown, correlation: float, agreeing: int, total: int) -> Finding:
    return Finding(
        "error",
        "action_sign",
        episode,
        None,
        f"action {name} moves the state the opposite way (correlation {correlation:.2f}) from {agreeing} of "
        f"{total} episodes",
        "the policy learns both signs, which cancel",
        "flip the sign of that dimension in the episode, or leave it out",
        columns=shown,
    )


def _lag(episode: str, shown: Shown, steps: int) -> Finding:
    return Finding(
        "error",
        "action_lag",
        episode,
        None,
        _how_late(steps) + (", compared with the other episodes" if episode else ", in most episodes"),
        "the policy learns to act late or early",
        "shift the actions, or leave the episode out",
        columns=shown,
    )


def _how_late(steps: int) -> str:
    count = f"{abs(steps)} step{'s' * (abs(steps) > 1)}"
    return f"actions come {count} {'after' if steps < 0 else 'before'} the motion that they cause"


def _undriven(columns: Columns, d: int) -> str:
    """Return why an action dimension is taken to drive no state."""
    if np.median([np.ptp(actions[:, d]) for _, _, actions in columns]) <= MOVING:
        return "it does not move in most episodes"
    for difference in (False, True):
        curves = np.stack(
            [_correlations(x, a[:, d : d + 1], difference)[:, 0] for _, x, a in columns[:SAMPLE]]
        )
        lag, s = np.unravel_index(int(np.median(np.abs(curves), axis=0).argmax()), curves.shape[1:])
        heights = curves[:, lag, s]  # [episodes]
        if np.median(np.abs(heights)) > STRONG:
            with_it, against = int((heights > STRONG).sum()), int((heights < -STRONG).sum())
            return f"a state dimension follows it in {with_it} episodes, and moves against it in {against}"
    return f"no state dimension follows it (correlation of {STRONG}) in most episodes"


def _drives(columns: Columns) -> tuple[dict[int, tuple[int, bool]], dict[int, str]]:
    """Return which state dimension each action dimension drives, and why others are not taken to drive one.

    The first are (dimension, by its differences).
    """
    some = columns[:SAMPLE]
    heights = []
    for difference in (False, True):
        curves = np.stack([_correlations(state, actions, difference) for _, state, actions in some])
        heights.append(np.abs(np.median(curves, axis=0)).max(axis=0))  # [a, s]
    best = np.stack(heights, axis=1)  # [a, 2, s]
    highest = best.max(axis=(1, 2))
    strong = np.flatnonzero(highest > STRONG).tolist()
    drives, unsure = {}, {}
    for d, chance in zip(strong, by_chance(some, strong, FURTHEST_LAG) if strong else [], strict=True):
        if highest[d] > chance:
            kind, s = np.unravel_index(int(best[d].argmax()), best[d].shape)
            drives[d] = (int(s), bool(kind))
        else:
            unsure[d] = (
                f"a state dimension follows it with correlation {highest[d]:.2f} in {len(some)} episodes, "
                f"and unrelated motion as smooth reaches {chance:.2f} by chance"
            )
    return drives, unsure


def _correlations(
    state: NDArray[np.float64], actions: NDArray[np.float64], difference: bool
) -> NDArray[np.float64]:
    """Return the correlation of actions[t] with state[t + lag], for lags -FURTHEST_LAG to FURTHEST_LAG.

    [lags, a, s]; 0 where one of the two does not move. `difference` takes the state's steps instead.
    """
    if difference:
        state, actions = np.diff(state, axis=0), actions[:-1]
    length = len(state)
    lags = range(-FURTHEST_LAG, FURTHEST_LAG + 1)
    return np.stack(
        [
            _standard(actions[max(0, -lag) : length - max(0, lag)]).T
            @ _standard(state[max(0, lag) : length + min(0, lag)])
            for lag in lags
        ]
    )


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return columns of mean 0 and length 1; those that do not move are 0."""
    centred = values - values.mean(axis=0)
    size = np.sqrt((centred * centred).sum(axis=0))
    moves = np.ptp(values, axis=0) > MOVING
    return np.where(moves, centred / np.where(moves, size, 1), 0)
