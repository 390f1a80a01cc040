"""Compare how actions and states of an episode relate to each other with how they do in most episodes.

A linear map from a state dimension to the action dimension that drives it has a gain, an offset and a rest.
An episode in another unit has another gain, one of a robot that was calibrated anew another offset, and a
noisy one a larger rest. Nothing is judged where the map is a bad one in most episodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Finding

RELIABLE = 0.9  # median correlation of an action and the state that it drives, below which nothing is judged
FEWEST = 4  # episodes that must agree before one of them is called different
LEAST_GAIN = 1.2  # ratio of gains that is reported
CERTAIN = 3.0  # ratio that no load and no contact explains
LEAST_OFFSET = 0.25  # offset that is reported, in standard deviations of the action
MOST_OFFSET = 2.0  # standard deviations: an offset that should be found
LEAST_REST = 0.1  # rest that is reported, as a share of the action's standard deviation
WIDE = 8.0  # times that something must be further from the median than the others usually are
LARGER = 4.0  # times that a rest must be larger than in nine of ten episodes
MOVING = 1e-6  # a range below this is no motion
TURNED = 0.6  # correlation of the other sign from which on an episode's sign is called turned
DEAD = 0.2  # of the usual standard deviation: motion of one side beside which the other may not stand still


@dataclass(frozen=True)
class Pair:
    """An action dimension and the state dimension that it drives, at their usual lag, in one episode."""

    episode: str
    action: NDArray[np.float64]  # [T]
    state: NDArray[np.float64]  # [T]; differences of it if the action is a velocity
    follows_differences: bool


def check_relation(name: str, pairs: Sequence[Pair], untested: Untested) -> list[Finding]:
    """Return the episodes whose action `name` relates to its state otherwise than in the others."""
    spread = [float(np.median([np.std(side) for side in sides])) for sides in _sides(pairs)]
    findings, alive = [], []
    for pair in pairs:
        still = [bool(np.ptp(side) <= MOVING) for side in (pair.action, pair.state)]
        moves = [np.std(s) > DEAD * usual for s, usual in zip((pair.action, pair.state), spread, strict=True)]
        if (still[0] and moves[1]) or (still[1] and moves[0]):
            findings.append(_dead(pair.episode, name, "action" if still[0] else "state"))
        elif not any(still):
            alive.append(pair)
    if len(alive) < FEWEST:
        untested.add("scale", f"it moves, with its state, in {len(alive)} episodes", f"action {name}")
        return findings
    heights = [np.corrcoef(p.action, p.state)[0, 1] for p in alive]
    if abs(np.median(heights)) < RELIABLE:
        reason = f"its correlation with its state is below {RELIABLE} in the median"
        untested.add("scale", reason, f"action {name}")
        return findings
    sign = np.sign(np.median(heights))
    gains = np.asarray([np.std(p.action) / np.std(p.state) * sign for p in alive])
    gain = float(np.median(gains))
    offsets = np.asarray([p.action.mean() - gain * p.state.mean() for p in alive])
    rests = np.asarray([_rest(p, sign) for p in alive])
    off = np.zeros(len(alive)) if alive[0].follows_differences else np.abs(offsets - np.median(offsets))
    ratios = np.abs(np.log(gains / gain))
    far_gain = ratios > np.maximum(np.log(LEAST_GAIN), WIDE * np.median(ratios))
    whole = float(np.std(np.concatenate([pair.action for pair in alive])))
    vary = {
        "proportion": WIDE * np.median(ratios) > np.log(CERTAIN),
        "offset": WIDE * np.median(off) > MOST_OFFSET * whole,
        "noise": LARGER * np.quantile(rests, 0.9, method="lower") > 1,
    }
    for what in (what for what, much in vary.items() if much):
        untested.add("scale", f"its {what} varies too much between episodes", f"action {name}")
    far_off = off > np.maximum(LEAST_OFFSET * whole, WIDE * np.median(off))
    noisy = (rests > LEAST_REST) & (rests > LARGER * np.quantile(rests, 0.9, method="lower"))
    for number, pair in enumerate(alive):
        if heights[number] * sign < -TURNED:  # another finding says so
            continue
        if noisy[number]:
            findings.append(_noisy(pair.episode, name, float(rests[number]), float(np.median(rests))))
        elif far_gain[number]:
            findings.append(_scale(pair.episode, name, float(gains[number] / gain)))
        elif far_off[number]:
            findings.append(_offset(pair.episode, name, float(offsets[number] - np.median(offsets))))
    blamed = len({f.episode for f in findings})
    if blamed > len(pairs) / 4:
        untested.add(
            "scale", f"episodes disagree: {blamed} of {len(pairs)} would be blamed", f"action {name}"
        )
        return []
    return findings


def _sides(pairs: Sequence[Pair]) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    return [p.action for p in pairs], [p.state for p in pairs]


def _rest(pair: Pair, sign: float) -> float:
    """Return what the best map of this episode leaves of the action, as a share of its standard deviation."""
    correlation = sign * np.corrcoef(pair.action, pair.state)[0, 1]
    return float(np.sqrt(max(0.0, 1 - max(0.0, correlation) ** 2)))


def _dead(episode: str, name: str, side: str) -> Finding:
    other = "state" if side == "action" else "action"
    return Finding(
        "error",
        "dead_dimension",
        episode,
        None,
        f"{side} {name} never changes, while the {other} that belongs to it moves",
        "the policy learns that this dimension need not move"
        if side == "action"
        else "the policy is blind to it",
        "fix the column (a recorder that was not connected?), or leave the episode out",
    )


def _scale(episode: str, name: str, ratio: float) -> Finding:
    return Finding(
        "error" if not 1 / CERTAIN < ratio < CERTAIN else "warning",
        "scale",
        episode,
        None,
        f"action {name} is {ratio:.3g} times as large, for the same motion, as in the other episodes",
        "one command means two motions, and the normalisation fits neither",
        "convert the unit of action or state in this episode, or leave it out",
    )


def _offset(episode: str, name: str, size: float) -> Finding:
    return Finding(
        "warning",
        "offset",
        episode,
        None,
        f"action {name} is {size:+.3g} away from its state, compared with the other episodes",
        "one command means two places",
        "correct the zero of action or state in this episode (calibration?), or leave it out",
    )


def _noisy(episode: str, name: str, rest: float, usual: float) -> Finding:
    return Finding(
        "warning",
        "noisy",
        episode,
        None,
        f"{rest:.0%} of action {name} does not follow its state, in the other episodes {usual:.0%}",
        "the policy learns the mean of what is noise",
        "look at the episode (noise, repeated or missing rows in one of the two?), or leave it out",
    )
