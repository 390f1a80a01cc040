"""Find jumps of states and actions, and rows that repeat in motion, by comparing the episodes."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Finding

FEWEST = 4  # episodes that must agree before one of them is called different
MOVING = 1e-6  # a change below this is no motion
HIGH = 4.0  # times the usual largest step of an episode
HIGHER = 3.0  # times the largest step in nine of ten episodes
LONGEST = 4  # equal rows in motion that are no chance
RUNS = 3.0  # times the longest run in nine of ten episodes


def check_steps(
    columns: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]],
    labels: Mapping[str, Sequence[str]],
    untested: Untested,
) -> list[Finding]:
    """Return episodes with a step in state or action far larger than in the others, or rows that repeat."""
    if len(columns) < FEWEST:
        for test in ("jump", "repeated_rows"):
            untested.add(test, f"the number of episodes is {len(columns)}")
        return []
    findings: list[Finding] = []
    for number, name in ((1, "state"), (2, "action")):
        steps = [np.abs(np.diff(np.asarray(c[number]), axis=0)) for c in columns]
        largest = np.stack([s.max(axis=0, initial=0.0) for s in steps])  # [episodes, dimensions]
        usual = np.median(largest, axis=0)
        for d in np.flatnonzero(usual <= MOVING).tolist():
            untested.add("jump", "it does not move in most episodes", f"{name} {_label(labels[name], d)}")
        limit = np.maximum(HIGH * usual, HIGHER * np.quantile(largest, 0.9, axis=0, method="lower"))
        for (episode, *_), rows, most in zip(columns, steps, largest, strict=True):
            over = np.flatnonzero((usual > MOVING) & (most > limit))
            if len(over):
                d = int(over[np.argmax(most[over] / usual[over])])
                label = _label(labels[name], d)
                step = int(rows[:, d].argmax())
                findings.append(_jump(episode, (name, d), label, step, most[d], usual[d]))
    if not any(np.abs(np.diff(state, axis=0)).max(initial=0.0) > 0 for _, state, _ in columns):
        untested.add("repeated_rows", "the state moves in no episode")
    return findings + _repeated(columns)


def _label(labels: Sequence[str], d: int) -> str:
    return labels[d] if d < len(labels) else f"dimension {d}"


def widest(rows: NDArray) -> int:
    """Return the dimension that moves over the widest range."""
    return int(np.ptp(rows, axis=0).argmax())


def _jump(episode: str, column: tuple[str, int], label: str, step: int, size: float, usual: float) -> Finding:
    return Finding(
        "warning",
        "jump",
        episode,
        step,
        f"{column[0]} {label} changes by {size:.3g} in one step, {size / usual:.0f} times the largest step "
        "of most episodes",
        "the policy learns a motion that the robot did not make, or the normalisation is stretched",
        "look at the step (missing rows, a wrong value?), cut the episode there, or leave it out",
        columns=(column,),
    )


def _repeated(columns: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]]) -> list[Finding]:
    """Find runs of equal states or actions that begin and end in motion."""
    findings = []
    runs = [[_longest(c, which) for c in columns] for which in ("both", "state", "action")]
    repeating: set[str] = set()
    for which, some in zip(("both", "state", "action"), runs, strict=True):
        lengths = np.asarray([length for length, _ in some])
        limit = max(LONGEST, RUNS * np.quantile(lengths, 0.9, method="lower"))
        for (episode, state, actions), (length, step) in zip(columns, some, strict=True):
            if length >= limit and episode not in repeating:
                repeating.add(episode)
                shown = (("state", widest(state)), ("action", widest(actions)))
                findings.append(_frozen(episode, which, length, step, shown))
    return findings


def _longest(column: tuple[str, NDArray[np.float64], NDArray[np.float64]], which: str) -> tuple[int, int]:
    """Return the length of the longest run without a change, between two steps in motion, and its start."""
    _, state, actions = column
    size = np.ptp(state, axis=0)
    speed = (np.abs(np.diff(state, axis=0)) / np.where(size > MOVING, size, 1)).sum(axis=1)
    calm = [np.abs(np.diff(rows, axis=0)).max(axis=1) == 0 for rows in (state, actions)]
    still = {"both": calm[0] & calm[1], "state": calm[0] & ~calm[1], "action": calm[1] & ~calm[0]}[which]
    if not len(still) or not speed.any():
        return 0, 0
    usual = float(speed.mean())
    best, start = (0, 0), 0
    for step, calm_now in enumerate([*still.tolist(), False]):
        if calm_now:
            continue
        length = step - start
        moves = start > 0 and step < len(speed) and min(speed[start - 1], speed[step]) > usual
        if which == "action":
            moves = length > 0 and float(speed[start:step].mean()) > usual
        if moves and length > best[0]:
            best = (length, start)
        start = step + 1
    return best


def _frozen(
    episode: str, which: str, length: int, step: int, columns: tuple[tuple[str, int], ...]
) -> Finding:
    what = {"both": "state and action", "state": "the state", "action": "the action"}[which]
    return Finding(
        "warning",
        "repeated_rows",
        episode,
        step,
        f"{what} {'repeat' if which == 'both' else 'repeats'} for {length + 1} steps in a motion",
        "the policy learns to stop there, or from a state that was not the robot's",
        "cut these steps out, or leave the episode out",
        columns=columns,
        steps=length + 1,
    )
