"""Checks of states and actions: tasks, duplicates, limits and spikes, and those of copies, steps and lags."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.copies import check_copies
from vlafit.datasets.checks.finding import Columns, Finding
from vlafit.datasets.checks.lags import RELATED, check_lags, is_one_step
from vlafit.datasets.checks.steps import check_steps, widest
from vlafit.datasets.store import EpisodeStore
from vlafit.datasets.value_faults import ABSURD, WILD

PLACEHOLDERS = ("", "task", "todo", "test", "none", "unknown", "dummy", "null")
MOVING = 1e-6  # a range below this is no motion
HOLE = 3  # rows of zeros in a row
FEW_WILD = 4  # values of a dimension that may be wild and are none of the usual ones
WRONG_ROWS = ("spike", "zero_rows", "jump", "repeated_rows")
SPIKE = 40.0  # a step this many times the dataset's 99th percentile is a spike
AFTER_FINITE = (
    "action_equals_state",
    "jump",
    "repeated_rows",
    "spike",
    *RELATED,
)  # leave out what is not finite
FEWEST_STEPS = 101  # of all episodes: with fewer, the 99th percentile lies beyond the second largest value


def check_columns(store: EpisodeStore, untested: Untested) -> list[Finding]:
    """Return what is suspicious in tasks, states and actions."""
    columns: Columns = [
        (info.id, store.state(n).astype(np.float64), store.actions(n).astype(np.float64))
        for n, info in enumerate(store.episodes)
    ]
    broken = _not_finite(columns)
    for finding in broken:
        for test in AFTER_FINITE:
            untested.add(test, "it holds values that are not finite", f"episode {finding.episode}")
    columns = [c for c in columns if c[0] not in {f.episode for f in broken}]
    robot = store.embodiment
    labels = {"state": robot.state.labels, "action": robot.action.labels}
    copies = check_copies(columns, labels, untested)
    findings = [*broken, *_tasks(store), *_duplicates(columns, untested), *_spikes(store, columns, untested)]
    findings += [*copies.findings, *_limits(store, columns, untested), *_holes(columns)]
    spiked = {f.episode for f in findings if f.kind in ("spike", "zero_rows")}
    findings += [f for f in check_steps(columns, labels, untested) if f.episode not in spiked]
    broken_rows = {f.episode for f in findings if f.kind in WRONG_ROWS}
    related = check_lags([c for c in columns if c[0] not in copies.whole], robot.action.labels, untested)
    return findings + [
        f
        for f in related
        if not copies.explain(f)
        and (f.kind != "noisy" or f.episode not in spiked)
        and not (is_one_step(f) and f.episode in broken_rows)
    ]


def _not_finite(columns: Columns) -> list[Finding]:
    """The layouts that ship refuse such an episode when it is opened; a layout of another package may not."""
    findings = []
    for episode, *arrays in columns:
        for name, values in zip(("state", "action"), arrays, strict=True):
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                step, dimension = (int(number) for number in bad[0])
                findings.append(
                    Finding(
                        "error",
                        "not_finite",
                        episode,
                        step,
                        f"{name} holds {values[step, dimension]} in dimension {dimension}; {len(bad)} in all",
                        "no statistics can be taken, and the loss is NaN",
                        "fix the file, or leave the episode out (skip in the card)",
                        columns=((name, dimension),),
                    )
                )
    return findings


def _tasks(store: EpisodeStore) -> list[Finding]:
    return [
        Finding(
            "warning",
            "placeholder_task",
            info.id,
            None,
            f"the instruction is {info.instruction!r}",
            "the policy cannot learn what the sentence means",
            'write the sentence in the card (instruction.source = "card")',
        )
        for info in store.episodes
        if info.instruction.strip().lower() in PLACEHOLDERS
    ]


def _duplicates(columns: Columns, untested: Untested) -> list[Finding]:
    seen: dict[str, str] = {}
    if len(columns) < 2:
        untested.add("duplicate_episode", f"{len(columns)} episode{'s' * (len(columns) != 1)}")
    findings = []
    for episode, state, actions in columns:
        digest = hashlib.sha256(state.tobytes() + actions.tobytes()).hexdigest()
        if digest in seen:
            findings.append(
                Finding(
                    "error",
                    "duplicate_episode",
                    episode,
                    None,
                    f"states and actions are those of episode {seen[digest]}",
                    "it counts twice, and may be in training and validation at once",
                    "leave one of the two out",
                    other=seen[digest],
                )
            )
        seen.setdefault(digest, episode)
    return findings


def _spikes(store: EpisodeStore, columns: Columns, untested: Untested) -> list[Finding]:
    findings = []
    steps = sum(len(state) for _, state, _ in columns)
    if steps < FEWEST_STEPS:
        untested.add("spike", f"all episodes together have {steps} steps, so only extreme values are found")
    robot = store.embodiment
    for number, name, labels in ((1, "state", robot.state.labels), (2, "action", robot.action.labels)):
        values = [c[number] for c in columns]
        if not values:
            continue
        every = np.concatenate(values)
        middle = np.median(every, axis=0)
        size = _usual_distance(np.abs(every - middle))
        for (episode, *_), rows in zip(columns, values, strict=True):
            far = (np.abs(rows - middle) > SPIKE * np.maximum(size, MOVING)) | (np.abs(rows) > ABSURD)
            if far.any():
                step, d = (int(i) for i in np.argwhere(far)[0])
                label = labels[d] if d < len(labels) else f"dimension {d}"
                findings.append(
                    Finding(
                        "error",
                        "spike",
                        episode,
                        step,
                        f"{name} {label} is {np.asarray(rows)[step, d]:.4g}, 99 % of its values are within "
                        f"{size[d]:.3g} of {middle[d]:.3g}",
                        "it stretches the normalisation of that dimension, and is learnt as an outlier",
                        "fix the value or leave the episode out",
                        columns=((name, d),),
                    )
                )
    return findings


def _usual_distance(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return within which distance [d] from the median 99 % of the values [n, d] are.

    Without wild ones: in few rows a second one would hide both.
    """
    size = np.quantile(distances, 0.99, axis=0)
    ordered = np.sort(distances, axis=0)
    rest = ordered[-1 - min(FEW_WILD, len(ordered) - 1)]
    return np.where(size > WILD * np.maximum(1.0, rest), rest, size)


def _limits(store: EpisodeStore, columns: Columns, untested: Untested) -> list[Finding]:
    """Find values that the card says the robot does not permit."""
    findings = []
    robot = store.embodiment
    for number, name, feature in ((1, "state", robot.state), (2, "action", robot.action)):
        if not (feature.low or feature.high):
            untested.add("outside_limits", "the card gives no limits", name)
        low = np.asarray(feature.low or -np.inf)
        high = np.asarray(feature.high or np.inf)
        for column in columns:
            rows = np.asarray(column[number])
            beyond = (rows < low - MOVING) | (rows > high + MOVING)
            if beyond.any():
                step, d = (int(i) for i in np.argwhere(beyond)[0])
                label = feature.labels[d] if feature.labels else f"dimension {d}"
                findings.append(
                    Finding(
                        "error",
                        "outside_limits",
                        str(column[0]),
                        step,
                        f"{name} {label} is {rows[step, d]:.4g}, beyond the card's limits, in "
                        f"{int(beyond.any(axis=1).sum())} of {len(rows)} steps",
                        "the policy learns what the robot cannot do, or the unit is another",
                        "fix the values, the card's low and high, or its scale",
                        columns=((name, d),),
                    )
                )
    return findings


def _holes(columns: Columns) -> list[Finding]:
    """Find steps whose whole state and action are 0: a hole in the file, or an episode never written."""
    findings = []
    for episode, state, actions in columns:
        empty = np.abs(np.concatenate([state, actions], axis=1)).max(axis=1) == 0
        if not empty.any() or not (state.any() or empty.all()):
            continue
        longest = max(len(run) for run in "".join("x" if e else " " for e in empty.tolist()).split())
        if longest >= HOLE:
            findings.append(
                Finding(
                    "error",
                    "zero_rows",
                    episode,
                    int(np.flatnonzero(empty)[0]),
                    f"state and action are 0 in every dimension in {int(empty.sum())} of {len(empty)} steps",
                    "the policy learns to go to 0",
                    "fetch the file again (a download that went on after a break?), or leave the episode out",
                    columns=(("state", widest(state)), ("action", widest(actions))),
                    steps=int(np.ptp(np.flatnonzero(empty))) + 1,
                )
            )
    return findings
