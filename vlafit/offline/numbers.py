"""Turn the arrays of an offline evaluation into numbers: errors, baselines, calibration, sensitivity.

Errors are absolute differences of actions. In a joint's own units they show what a robot would do; to be
averaged over joints they are divided by the standard deviation of the joint's recorded actions, and joints
that never move are left out. Every episode counts once.

Where the tokens of a policy make no chunk of actions, its error is that of what is executed in its place.
Such an answer never counts as nearer than a baseline: its difference is 0, unless it is farther.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import DataError
from vlafit.offline.part import Part
from vlafit.score import InvalidAnswers
from vlafit.significance.clusters import Mean, mean_interval
from vlafit.types import Feature

Values = NDArray[np.float64]
Who = Literal["policy", "hold_still", "mean_chunk"]
WHO: tuple[Who, ...] = ("policy", "hold_still", "mean_chunk")


@dataclass(frozen=True)
class Measured:
    """The parts of each episode, and what their joints are."""

    parts: Mapping[str, Sequence[Part]]
    deviation: Values  # [a] 0 where a joint does not move
    joints: Feature
    inputs: tuple[str, ...]

    @cached_property
    def episodes(self) -> "list[Episode]":
        """The episodes' parts, joined."""
        chunks = {part.recorded.shape[1] for parts in self.parts.values() for part in parts}
        if len(chunks) > 1:
            raise DataError(
                f"the policy answers with chunks of {sorted(chunks)} steps; all must have one length"
            )
        return [Episode(name, parts) for name, parts in self.parts.items()]

    @property
    def moving(self) -> NDArray[np.bool_]:
        """The joints [a] that move in what the policy learned from; all, if none does."""
        moving = self.deviation > 0
        return moving if moving.any() else np.ones_like(moving)

    @property
    def scale(self) -> Values:
        """Divisor of each joint's error, [a]."""
        return np.where(self.deviation > 0, self.deviation, 1.0)


class Episode:
    """Errors in one episode: n observations, k draws, t steps, a joints; NaN past the episode's end."""

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self.name = name
        self.steps = np.concatenate([part.steps for part in parts])
        recorded = np.concatenate([part.recorded for part in parts]).astype(np.float64)
        real = np.concatenate([part.is_real for part in parts])[..., None]
        self.recorded = np.where(real, recorded, np.nan)  # [n, t, a]
        self.predicted = np.concatenate([part.predicted for part in parts]).astype(np.float64)  # [n, k, t, a]
        self.blanked = np.concatenate([part.blanked for part in parts], axis=1).astype(np.float64)
        self.valid = np.concatenate([part.valid for part in parts])  # [n, k] 1, 0, or -1: see Part
        self.blanked_valid = np.concatenate([part.blanked_valid for part in parts], axis=1)  # [c, n]
        baselines = {
            "hold_still": np.concatenate([part.hold_still for part in parts]),
            "mean_chunk": np.concatenate([np.broadcast_to(p.mean_chunk, p.recorded.shape) for p in parts]),
        }
        self.errors: dict[Who, Values] = {  # [n, t, a], of the policy the mean over its draws
            "policy": np.abs(self.predicted - self.recorded[:, None]).mean(axis=1),
            "hold_still": np.abs(baselines["hold_still"] - self.recorded),
            "mean_chunk": np.abs(baselines["mean_chunk"] - self.recorded),
        }
        self.spread = np.where(real, self.predicted.std(axis=1, ddof=1), np.nan)  # [n, t, a]
        self.below = np.where(real, (self.predicted < self.recorded[:, None]).sum(axis=1), np.nan)
        self.equal = np.where(real, (self.predicted == self.recorded[:, None]).sum(axis=1), np.nan)
        self.inside = np.where(
            real,
            (self.predicted.min(axis=1) <= self.recorded) & (self.recorded <= self.predicted.max(axis=1)),
            np.nan,
        )


def summarise(measured: Measured) -> dict[str, Any]:
    """Return every number of the report as plain JSON values; what does not apply is None."""
    episodes, moving, scale = measured.episodes, measured.moving, measured.scale
    draws, chunk = episodes[0].predicted.shape[1:3]
    invalid = invalid_answers(episodes)
    overall = {who: _over([_scaled(e.errors[who], scale, moving) for e in episodes]) for who in WHO}
    of_mean = [np.abs(e.predicted.mean(axis=1) - e.recorded) for e in episodes]
    return {
        "observations": sum(len(e.steps) for e in episodes),
        "draws": draws,
        "chunk": chunk,
        "invalid_answers": None if invalid is None else invalid.to_json(),
        "deviation": measured.deviation.tolist(),
        "overall": {who: _json(mean) for who, mean in overall.items()}
        | {"mean_of_draws": _json(_over([_scaled(error, scale, moving) for error in of_mean]))},
        "compared": {who: _compare(episodes, who, scale, moving) for who in WHO[1:]},
        "joints": _joints(measured),
        "by_step": _by_step(episodes, scale, moving),
        "calibration": _calibration(episodes, moving, scale),
        "sensitivity": [
            _sensitivity(episodes, number, name, scale, moving) for number, name in enumerate(measured.inputs)
        ],
        "by_episode": [
            {"episode": e.name} | {who: _mean_of(_scaled(e.errors[who], scale, moving)) for who in WHO}
            for e in episodes
        ],
        "samples": [sample for e in episodes for sample in _samples(e, measured)],
    }


def invalid_answers(episodes: Sequence[Episode]) -> InvalidAnswers | None:
    """Count the answers that were no chunk of actions; None where the policy answers with numbers."""
    answers = sum(int((e.valid >= 0).sum()) for e in episodes)
    return InvalidAnswers(answers, sum(int((e.valid == 0).sum()) for e in episodes)) if answers else None


def _scaled(errors: Values, scale: Values, moving: NDArray[np.bool_]) -> Values:
    """Return errors [..., a] of the moving joints in their standard deviations."""
    return (errors / scale)[..., moving]


NOT_SHOWN = "not shown"
ERROR, SHARE, DIFFERENCE = (0.0, math.inf), (0.0, 1.0), (-math.inf, math.inf)
"""Least and largest value of errors and spreads, of shares, and of differences of errors."""


def _over(by_episode: Sequence[Values], within: tuple[float, float] = ERROR) -> Mean | None:
    """Return the mean over episodes, each the mean of its values; None where nothing applies.

    `within` are the least and largest value that there can be.
    """
    if any(np.isnan(values).all() for values in by_episode):
        return None
    return mean_interval([float(np.nanmean(values)) for values in by_episode], within=within)


def _json(mean: Mean | None) -> dict[str, float | None] | None:
    return None if mean is None else mean.to_json()


def _mean_of(values: Values) -> float | None:
    """Return the mean of the values that apply; None if none does."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _number(value: float | np.floating) -> float | None:
    return float(value) if math.isfinite(value) else None


def _compare(
    episodes: Sequence[Episode], who: Who, scale: Values, moving: NDArray[np.bool_]
) -> dict[str, Any] | None:
    """Return the policy's error minus a baseline's, paired by episode, and what that shows.

    An answer that was no chunk of actions counts as 0 where what is executed in its place is nearer.
    """
    differences = [_difference(e, who, scale, moving) for e in episodes]
    mean = _over(differences, DIFFERENCE)
    if mean is None:
        return None
    observations = np.concatenate([np.nanmean(d, axis=(1, 2)) for d in differences])
    if mean.low is None or mean.high is None:
        verdict = NOT_SHOWN  # one episode says nothing about others
    else:
        verdict = "beats" if mean.high < 0 else "does not beat" if mean.value >= 0 else NOT_SHOWN
    return {"difference": mean.to_json(), "better_at": float((observations < 0).mean()), "verdict": verdict}


def _difference(episode: Episode, who: Who, scale: Values, moving: NDArray[np.bool_]) -> Values:
    """Return the policy's error minus a baseline's in an episode, [n, t, a] of the moving joints."""
    baseline = episode.errors[who]
    if not (episode.valid == 0).any():
        return _scaled(episode.errors["policy"] - baseline, scale, moving)
    errors = np.abs(episode.predicted - episode.recorded[:, None])
    each = _scaled(errors - baseline[:, None], scale, moving)  # [n, k, t, a]
    nearer = (episode.valid == 0) & (np.nansum(each, axis=(2, 3)) < 0)
    return np.where(nearer[..., None, None] & ~np.isnan(each), 0.0, each).mean(axis=1)


def _joints(measured: Measured) -> list[dict[str, Any]]:
    episodes, joints = measured.episodes, measured.joints
    rows = []
    for d in range(joints.shape[0]):
        errors = {who: _over([e.errors[who][..., d] for e in episodes]) for who in WHO}
        rows.append(
            {
                "name": joints.labels[d] if joints.labels else str(d),
                "unit": joints.unit,
                "moves": bool(measured.deviation[d] > 0),
                "deviation": float(measured.deviation[d]),
                **{who: _json(mean) for who, mean in errors.items()},
                "spread": _number(np.mean([np.nanmean(e.spread[..., d]) for e in episodes])),
                "inside": _number(np.mean([np.nanmean(e.inside[..., d]) for e in episodes])),
                "spread_to_error": _spread_to_error(
                    [e.spread[..., d] for e in episodes],
                    [(e.predicted.mean(axis=1) - e.recorded)[..., d] for e in episodes],
                    episodes[0].predicted.shape[1],
                ),
            }
        )
    return rows


def _by_step(
    episodes: Sequence[Episode], scale: Values, moving: NDArray[np.bool_]
) -> dict[str, list[dict[str, float | None] | None]]:
    """Return the errors at each step of the chunk, and the spread; None where no episode reaches it."""

    def at(values: Sequence[Values], step: int) -> dict[str, float | None] | None:
        here = [v[:, step] for v in values if not np.isnan(v[:, step]).all()]
        return _json(_over(here)) if here else None

    curves = {who: [_scaled(e.errors[who], scale, moving) for e in episodes] for who in WHO}
    spread = {"spread": [_scaled(e.spread, scale, moving) for e in episodes]}
    steps = range(episodes[0].recorded.shape[1])
    return {name: [at(values, step) for step in steps] for name, values in {**curves, **spread}.items()}


def _calibration(episodes: Sequence[Episode], moving: NDArray[np.bool_], scale: Values) -> dict[str, Any]:
    """Return how often the recorded action lies within the draws, and its rank among them.

    In a calibrated policy each of the k + 1 ranks is as likely, so k - 1 of k + 1 recorded actions lie within
    the draws. Draws that equal the recorded action share their ranks evenly.
    """
    draws = episodes[0].predicted.shape[1]
    histogram = np.zeros(draws + 1)
    for e in episodes:
        below, equal = e.below[..., moving].ravel(), e.equal[..., moving].ravel()
        real = ~np.isnan(below)
        own = np.zeros(draws + 1)
        for low, ties in zip(below[real].astype(int), equal[real].astype(int), strict=True):
            own[low : low + ties + 1] += 1 / (ties + 1)
        histogram += own / max(own.sum(), 1) / len(episodes)
    ratio = _spread_to_error(
        [_scaled(e.spread, scale, moving) for e in episodes],
        [_scaled(e.predicted.mean(axis=1) - e.recorded, scale, moving) for e in episodes],
        draws,
    )
    return {
        "deterministic": all(bool((e.spread[~np.isnan(e.spread)] == 0).all()) for e in episodes),
        "inside": _json(_over([e.inside[..., moving] for e in episodes], SHARE)),
        "inside_expected": (draws - 1) / (draws + 1),
        "ranks": histogram.tolist(),
        "spread": _json(_over([_scaled(e.spread, scale, moving) for e in episodes])),
        "spread_to_error": ratio,
    }


def _spread_to_error(spreads: Sequence[Values], misses: Sequence[Values], draws: int) -> float | None:
    """Return the draws' spread over the error of their mean: 1 in a calibrated policy, None without error.

    The mean of k draws scatters itself, so that its squared error is 1 + 1 / k times their variance.
    """
    square, miss = (np.mean([np.nanmean(v**2) for v in values]) for values in (spreads, misses))
    return _number(math.sqrt(float(square) * (1 + 1 / draws) / float(miss))) if miss > 0 else None


def _sensitivity(
    episodes: Sequence[Episode], number: int, name: str, scale: Values, moving: NDArray[np.bool_]
) -> dict[str, Any]:
    """Return how much the first draw changes without an input, and how its error does.

    An input is not called ignored on answers that were no chunk of actions, with it and without.
    """
    changes, worse = [], []
    answered = any(((e.valid[:, 0] != 0) | (e.blanked_valid[number] != 0)).any() for e in episodes)
    for e in episodes:
        first, blanked = e.predicted[:, 0], e.blanked[number]
        real = np.where(np.isnan(e.recorded), np.nan, 1.0)
        changes.append(_scaled(np.abs(blanked - first) * real, scale, moving))
        error = np.abs(blanked - e.recorded) - np.abs(first - e.recorded)
        worse.append(_scaled(error, scale, moving))
    return {
        "input": name,
        "change": _json(_over(changes)),
        "error_change": _json(_over(worse, DIFFERENCE)),
        "ignored": answered and all(bool((np.nan_to_num(change) == 0).all()) for change in changes),
    }


def _samples(episode: Episode, measured: Measured) -> list[dict[str, Any]]:
    """Return one object for each observation of an episode."""
    scale, moving = measured.scale, measured.moving
    rows = []
    for i, step in enumerate(episode.steps.tolist()):
        errors = {who: _scaled(episode.errors[who][i], scale, moving) for who in WHO}
        means = {who: _mean_of(error) for who, error in errors.items()}
        changes = {
            name: _number(
                np.nanmean(
                    _scaled(
                        np.abs(episode.blanked[number, i] - episode.predicted[i, 0])
                        + 0 * episode.recorded[i],
                        scale,
                        moving,
                    )
                )
            )
            for number, name in enumerate(measured.inputs)
        }
        rows.append(
            {
                "episode": episode.name,
                "step": step,
                **means,
                "invalid": int((episode.valid[i] == 0).sum()) if (episode.valid[i] >= 0).any() else None,
                "spread": _number(np.nanmean(_scaled(episode.spread[i], scale, moving))),
                "joints": [_number(v) for v in np.nanmean(episode.errors["policy"][i], axis=0)],
                "blanked": changes,
            }
        )
    return rows
