"""Find actions that repeat the present state, in some or all dimensions, for an episode or a part of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Columns, Finding, Shown
from vlafit.datasets.checks.steps import widest

MOVING = 1e-6  # a range below this is no motion
FEWEST_CHANGES = 3  # of a dimension in an episode: one change at one step may be chance
LONGEST = 10  # changes of the state that an action repeats before that is reported of a part of an episode
RUNS = 3.0  # times the longest such part in nine of ten episodes
PROBES = 8  # rows compared first
EFFECT = "the policy learns to repeat the present state, and the robot stands still"
FIX = "record commands, or use the state one step later as the action"


@dataclass(frozen=True)
class Copies:
    """Where actions repeat the present state."""

    findings: tuple[Finding, ...] = ()
    whole: frozenset[str] = frozenset()
    """Episodes in which all actions do, throughout."""
    dimensions: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """The action dimensions of each episode that do, throughout or in a part of it."""

    def explain(self, finding: Finding) -> bool:
        """Whether a finding of how actions and states relate is only that they are equal."""
        copied = self.dimensions.get(finding.episode, frozenset())
        of = [d for column, d in finding.columns if column == "action"]
        if finding.kind == "action_lag":
            return len(copied) > 1 or set(of) <= copied
        return finding.kind in ("noisy", "scale", "offset") and set(of) <= copied


def check_copies(columns: Columns, labels: Mapping[str, Sequence[str]], untested: Untested) -> Copies:
    """Return the episodes in which actions equal the state of the same step."""
    copied = {episode: _equal(state, actions) for episode, state, actions in columns}
    judged = [c[0] for c in columns if len(_both_move(*c[1:]))]
    if not judged:
        untested.add("action_equals_state", "no dimension moves in both state and action")
        return Copies()
    times: dict[int, int] = {}
    for pairs in copied.values():
        for d in pairs:
            times[d] = times.get(d, 0) + 1
    common = {d for d, count in times.items() if count > len(judged) / 2 and len(judged) > 1}
    findings = []
    whole = [e for e, _, a in columns if len(copied[e]) and set(copied[e]) >= set(_moving(a))]
    if common:
        of_all = len(whole) > len(judged) / 2
        moving = {d for c in columns for d in _moving(c[2])}
        severe = of_all or len(common) >= len(moving) / 2
        what = "every action is" if of_all else f"action {_names(sorted(common), labels)} is"
        many = len(whole) if of_all else max(times[d] for d in common)
        findings.append(
            _copy(
                "error" if severe else "warning",
                "",
                f"{what} the state of the same step, in {many} of {len(columns)} episodes",
                tuple(("action", d) for d in sorted(common)[:1]),
            )
        )
    for episode, state, _ in columns:
        own = {d: s for d, s in copied[episode].items() if d not in common}
        if not own:
            continue
        if episode in whole:
            message = "every action is the state of the same step"
            shown: Shown = (("action", widest(state)), ("state", widest(state)))
        else:
            message = f"action {_names(list(own), labels)} equals the present state at every step"
            shown = (("action", next(iter(own))), ("state", next(iter(own.values()))))
        findings.append(_copy("error", episode, message, shown))
    dimensions = {episode: frozenset(pairs) for episode, pairs in copied.items()}
    for finding, dims in _parts([c for c in columns if not copied[c[0]]], labels):
        findings.append(finding)
        dimensions[finding.episode] = frozenset(dims)
    return Copies(tuple(findings), frozenset(whole), dimensions)


def _copy(severity: Literal["error", "warning"], episode: str, message: str, shown: Shown) -> Finding:
    return Finding(severity, "action_equals_state", episode, None, message, EFFECT, FIX, columns=shown)


def _names(dimensions: Sequence[int], labels: Mapping[str, Sequence[str]]) -> str:
    names = labels["action"]
    return ", ".join(names[d] if d < len(names) else f"dimension {d}" for d in dimensions)


def _moving(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.flatnonzero(np.ptp(rows, axis=0) > MOVING)


def _both_move(state: NDArray[np.float64], actions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the action dimensions that change often, if any state dimension does."""
    return _changing(actions) if len(_changing(state)) else np.zeros(0, np.int64)


def _changing(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    changes = (np.abs(np.diff(rows, axis=0)) > 0).sum(axis=0)
    return np.flatnonzero((np.ptp(rows, axis=0) > MOVING) & (changes >= FEWEST_CHANGES))


def _room(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return by how much two values of a dimension may differ and be equal: the rounding of float32."""
    return np.minimum(1e-6 * np.maximum(1.0, np.abs(rows).max(axis=0)), 1e-3 * np.ptp(rows, axis=0))


def _equal(state: NDArray[np.float64], actions: NDArray[np.float64]) -> dict[int, int]:
    """Return the action dimensions that equal a state dimension at every step, with that dimension.

    A dimension that changes less often than FEWEST_CHANGES counts only beside one that changes more often.
    """
    probes = np.linspace(0, len(state) - 1, PROBES).round().astype(int)
    room, moving = _room(actions), _moving(actions).tolist()
    rooms = np.minimum(room[:, None], _room(state))  # [a, s]
    near = np.abs(actions[probes][:, :, None] - state[probes][:, None, :]) <= rooms
    equal: dict[int, int] = {}
    for d in moving:
        candidates = np.flatnonzero(near[:, d].all(axis=0)).tolist()
        for s in sorted(candidates, key=lambda s: s != d):
            if (np.abs(actions[:, d] - state[:, s]) <= rooms[d, s]).all():
                equal[d] = s
                break
    often = set(_changing(actions).tolist())
    return equal if often & set(equal) else {}


def _parts(columns: Columns, labels: Mapping[str, Sequence[str]]) -> list[tuple[Finding, list[int]]]:
    """Find parts of an episode in which actions equal the state in motion, and their dimensions."""
    width = min((min(s.shape[1], a.shape[1]) for _, s, a in columns), default=0)
    if not width or len(columns) < 2:
        return []
    runs = np.asarray([[_longest(s[:, d], a[:, d]) for d in range(width)] for _, s, a in columns])
    findings = []  # runs: [episodes, dimensions, (changes, first step, steps)]
    limit = np.maximum(LONGEST, RUNS * np.quantile(runs[..., 0], 0.9, axis=0, method="lower"))
    for (episode, *_), own in zip(columns, runs, strict=True):
        over = np.flatnonzero(own[:, 0] > limit).tolist()
        if over:
            first, last = int(own[over, 1].min()), int((own[over, 1] + own[over, 2]).max())
            message = (
                f"action {_names(over, labels)} equals the present state from step {first} to {last - 1}"
            )
            shown = (("action", over[0]), ("state", over[0]))
            copy = _copy("error", episode, message, shown)
            findings.append((replace(copy, step=first, steps=last - first), over))
    return findings


def _longest(state: NDArray[np.float64], action: NDArray[np.float64]) -> tuple[int, int, int]:
    """Return how often the state changes in the longest stretch in which the action equals it, and where."""
    room = float(np.minimum(_room(action[:, None]), _room(state[:, None]))[0])
    equal = np.abs(action - state) <= room
    if not equal.any():
        return 0, 0, 0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], equal.astype(int), [0]])))
    best = (0, 0, 0)
    for first, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        part = state[first:end]
        changes = int((np.abs(np.diff(part)) > room).sum()) if np.ptp(part) > MOVING else 0
        best = max(best, (changes, first, end - first))
    return best
