"""Checks of states and actions: tasks, duplicates, spikes, and how actions and states follow one another."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.store import EpisodeStore

PLACEHOLDERS = ("", "task", "todo", "test", "none", "unknown", "dummy", "null")
FURTHEST_LAG = 8  # steps by which an action is looked for before and after the state that it causes
STRONG = 0.6  # correlation at which an action dimension is taken to drive a state dimension
FEWEST = 4  # episodes that must agree before one of them is called different
MOVING = 1e-6  # a range below this is no motion
SPIKE = 40.0  # a step this many times the dataset's 99th percentile is a spike

Columns = list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]  # id, states [T, s], actions [T, a]


def check_columns(store: EpisodeStore) -> list[Finding]:
    """Return what is suspicious in tasks, states and actions."""
    columns: Columns = [
        (info.id, store.state(n).astype(np.float64), store.actions(n).astype(np.float64))
        for n, info in enumerate(store.episodes)
    ]
    findings = [*_tasks(store), *_duplicates(columns), *_spikes(store, columns), *_copies(columns)]
    copied = {f.episode for f in findings if f.kind == "action_equals_state"}
    rest = [c for c in columns if c[0] not in copied]
    return findings + _signs_and_lags(store, rest)


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


def _duplicates(columns: Columns) -> list[Finding]:
    seen: dict[str, str] = {}
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
                )
            )
        seen.setdefault(digest, episode)
    return findings


def _spikes(store: EpisodeStore, columns: Columns) -> list[Finding]:
    findings = []
    robot = store.embodiment
    for number, name, labels in ((1, "state", robot.state.labels), (2, "action", robot.action.labels)):
        values = [c[number] for c in columns]
        middle = np.median(np.concatenate(values), axis=0)
        size = np.quantile(np.abs(np.concatenate(values) - middle), 0.99, axis=0)
        for (episode, *_), rows in zip(columns, values, strict=True):
            far = np.abs(rows - middle) > SPIKE * np.maximum(size, MOVING)
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
                    )
                )
    return findings


def _copies(columns: Columns) -> list[Finding]:
    findings = []
    for episode, state, actions in columns:
        width = min(state.shape[1], actions.shape[1])
        moving = np.ptp(state[:, :width], axis=0) > MOVING
        if state.shape[1] != actions.shape[1] or not moving.any() or len(state) < 3:
            continue
        now = np.abs(actions - state)[:, moving].max()
        if now <= 1e-6 * max(1.0, float(np.abs(state).max())):
            findings.append(
                Finding(
                    "error",
                    "action_equals_state",
                    episode,
                    None,
                    "every action is the state of the same step",
                    "the policy learns to repeat the present state, and the robot stands still",
                    "record commands, or use the state one step later as the action",
                )
            )
    return findings


def _signs_and_lags(store: EpisodeStore, columns: Columns) -> list[Finding]:
    """Compare how each episode's actions drive its states with how they do in most episodes."""
    columns = [c for c in columns if len(c[1]) >= 3 * FURTHEST_LAG]
    if len(columns) < FEWEST:
        return []
    drives = _drives(columns)
    findings = []
    labels = store.embodiment.action.labels
    lags: dict[str, list[int]] = {episode: [] for episode, *_ in columns}
    usual: dict[int, int] = {}
    for d, (s, difference) in drives.items():
        curves = np.stack(
            [_correlations(state[:, s], actions[:, d], difference) for _, state, actions in columns]
        )
        peaks = np.nan_to_num(curves)
        best = np.abs(peaks).argmax(axis=1)
        heights = peaks[np.arange(len(peaks)), best]
        strong = np.abs(heights) > STRONG
        if strong.sum() < FEWEST:
            continue
        sign = np.sign(np.median(heights[strong]))
        usual[d] = int(np.median(best[strong])) - FURTHEST_LAG
        agreeing = float((np.sign(heights[strong]) == sign).mean())
        for (episode, *_), height, place, ok in zip(columns, heights, best, strong, strict=True):
            if not ok:
                continue
            if np.sign(height) != sign and agreeing >= 0.7:
                name = labels[d] if d < len(labels) else f"dimension {d}"
                findings.append(
                    Finding(
                        "error",
                        "action_sign",
                        episode,
                        None,
                        f"action {name} moves the state the opposite way (correlation {height:.2f}) from "
                        f"{agreeing:.0%} of the episodes",
                        "the policy learns both signs, which cancel",
                        "flip the sign of that dimension in the episode, or leave it out",
                    )
                )
            elif np.sign(height) == sign:
                lags[episode].append(int(place) - FURTHEST_LAG - usual[d])
    findings += [_lag(episode, int(np.median(late))) for episode, late in lags.items() if _is_late(late)]
    everywhere = [lag for lag in usual.values() if lag < 0]
    if usual and len(everywhere) > len(usual) / 2:
        findings.append(_lag("", int(np.median(everywhere))))
    return findings


def _is_late(late: list[int]) -> bool:
    return bool(len(late) > 0 and abs(np.median(late)) >= 2 and (np.abs(late) >= 2).mean() > 0.5)


def _lag(episode: str, steps: int) -> Finding:
    how = f"actions come {abs(steps)} steps {'after' if steps < 0 else 'before'} the motion that they cause"
    return Finding(
        "error",
        "action_lag",
        episode,
        None,
        how + (", compared with the other episodes" if episode else ", in most episodes"),
        "the policy learns to act late or early",
        "shift the actions, or leave the episode out",
    )


def _drives(columns: Columns) -> dict[int, tuple[int, bool]]:
    """Return, for each action dimension, which state dimension it drives: (dimension, by its differences)."""
    drives = {}
    for d in range(columns[0][2].shape[1]):
        best, chosen = STRONG, None
        for s in range(columns[0][1].shape[1]):
            for difference in (False, True):
                peaks = []
                for _, state, actions in columns[:32]:
                    curve = _correlations(state[:, s], actions[:, d], difference)
                    if np.isfinite(curve).any():
                        peaks.append(np.nanmax(np.abs(curve)))
                height = float(np.median(peaks)) if len(peaks) >= FEWEST else 0.0
                if height > best:
                    best, chosen = height, (s, difference)
        if chosen is not None:
            drives[d] = chosen
    return drives


def _correlations(state: NDArray, action: NDArray, difference: bool) -> NDArray[np.float64]:
    """Return the correlation of action[t] with state[t + lag], for lags -FURTHEST_LAG to FURTHEST_LAG."""
    curve = np.full(2 * FURTHEST_LAG + 1, np.nan)
    if difference:
        state, action = np.diff(state), action[:-1]
    for number, lag in enumerate(range(-FURTHEST_LAG, FURTHEST_LAG + 1)):
        a = action[max(0, -lag) : len(action) - max(0, lag)]
        b = state[max(0, lag) : len(state) + min(0, lag)]
        if np.ptp(a) > MOVING and np.ptp(b) > MOVING:
            curve[number] = np.corrcoef(a, b)[0, 1]
    return curve
