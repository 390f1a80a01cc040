"""Find parts of an episode in which the sign of an action is turned: it follows its state mirrored."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.checks.relations import Pair

FEWEST = 4  # episodes that must agree before one of them is called different
RELIABLE = 0.9  # median correlation of an action and the state that it drives, below which nothing is judged
SHORTEST = 8  # steps of a part
LEAST = 0.15  # share of an episode
FURTHER = 4.0  # times that a part must speak for a turned sign more than in nine of ten episodes
BETTER = 4.0  # times that the mirrored action must fit better in the part
CLEAR = 0.5  # of what a turned quarter usually weighs
AS_USUAL = 0.75  # of the steps of most episodes are nearer to their state than most steps of the part must be
SHARE = 0.25  # of an episode: a part that should be found
FOUND = 0.75  # share of the episodes in which it must be found, else it is said
STILL = 0.05  # of the other's range
CLOSE = 0.1  # standard deviations by which an action may be away from its state and follow it closely
MOVING = 1e-6  # a range below this is no motion
NOT_FOUND = "a sign turned in a quarter of an episode would not be found"


class _Part(NamedTuple):
    """The part of an episode that speaks most for a turned sign."""

    first: int
    end: int
    weight: float
    """By how much the mirrored action fits it better, in squared standard deviations."""
    better: float
    """How many times smaller the mirrored action's squared distance from the state is."""
    distance: float
    """That squared distance at most steps."""


def check_parts(name: str, pairs: Sequence[Pair], untested: Untested) -> list[Finding]:
    """Return the episodes in a part of which action `name` is mirrored against the state that it drives.

    The map from state to action is that of most episodes; the action is mirrored at 0, and at the middle of
    its range, since a gripper may be commanded by 0 and 1. `pairs` are of episodes that are not turned as a
    whole. A part counts if the mirrored action fits there as well as actions do elsewhere, and if it speaks
    for a turned sign much more than any part of the other episodes: a slow gripper, or one that holds an
    object, follows its command late or not at all. Nothing is judged where a turned quarter of most episodes
    would not be found.
    """
    pairs = [p for p in pairs if np.ptp(p.action) > MOVING and np.ptp(p.state) > MOVING]
    if len(pairs) < FEWEST:
        return []  # the relation of the two is not tested either, which says so
    height = float(np.median([np.corrcoef(p.action, p.state)[0, 1] for p in pairs]))
    if abs(height) < RELIABLE:
        untested.add(
            "action_sign",
            f"{NOT_FOUND}: its correlation with its state is below {RELIABLE}",
            f"action {name}",
        )
        return []
    gain = float(np.median([np.std(p.action) / np.std(p.state) for p in pairs])) * np.sign(height)
    offset = float(np.median([p.action.mean() - gain * p.state.mean() for p in pairs]))
    width = float(np.std(np.concatenate([p.action for p in pairs])))
    middle = float(np.median([(p.action.max() + p.action.min()) / 2 for p in pairs]))

    squares = [((p.action - gain * p.state - offset) / width) ** 2 for p in pairs]
    usual = max(CLOSE**2, float(np.median([np.quantile(square, AS_USUAL) for square in squares])))

    def counts(part: _Part, pair: Pair, limit: float) -> bool:
        steps = slice(part.first, part.end)
        long = part.end - part.first >= max(SHORTEST, LEAST * len(pair.action))
        ranges = (
            sorted([np.ptp(pair.action[steps]), abs(gain) * np.ptp(pair.state[steps])]) if long else [0, 0]
        )
        if ranges[1] > width and ranges[0] < STILL * ranges[1]:  # one stands still beside the other
            return False
        fits = part.better >= BETTER and part.distance <= usual
        return long and fits and part.weight > limit

    def part(pair: Pair, action: NDArray[np.float64], centre: float) -> _Part:
        expected = gain * pair.state + offset
        away, mirrored = (((values - expected) / width) ** 2 for values in (action, 2 * centre - action))
        return _best(away, mirrored)

    findings: dict[str, Finding] = {}
    quarters = np.zeros(len(pairs), bool)
    for centre in dict.fromkeys((0.0, middle)):
        parts = [part(pair, pair.action, centre) for pair in pairs]
        turned = [part(p, _quarter_turned(p.action, centre), centre) for p in pairs]
        others = float(np.quantile([p.weight for p in parts], 0.9, method="lower"))
        limit = max(CLEAR * float(np.median([t.weight for t in turned])), FURTHER * others)
        for number, (pair, own) in enumerate(zip(pairs, parts, strict=True)):
            if counts(own, pair, limit):
                findings.setdefault(pair.episode, _finding(name, pair, own))
            quarters[number] |= counts(turned[number], pair, limit)
    if quarters.mean() < FOUND:
        reason = f"{NOT_FOUND} in {int((~quarters).sum())} of {len(pairs)} episodes"
        untested.add("action_sign", reason, f"action {name}")
        return []
    return list(findings.values())


def _quarter_turned(action: NDArray[np.float64], centre: float) -> NDArray[np.float64]:
    turned = action.copy()
    first = len(action) - int(SHARE * len(action))
    turned[first:] = 2 * centre - turned[first:]
    return turned


def _best(away: NDArray[np.float64], mirrored: NDArray[np.float64]) -> _Part:
    """Return the stretch of steps with the largest sum of `away` less `mirrored`."""
    gain = away - mirrored
    sums = np.concatenate([[0.0], np.cumsum(gain)])
    lowest = np.minimum.accumulate(sums)
    end = int((sums - lowest).argmax())
    first = int(sums[: end + 1].argmin())
    weight = float(sums[end] - sums[first])
    if end == first:
        return _Part(first, end, weight, 0.0, 0.0)
    better = float(away[first:end].sum() / max(mirrored[first:end].sum(), 1e-9))
    return _Part(first, end, weight, better, float(np.median(mirrored[first:end])))


def _finding(name: str, pair: Pair, part: _Part) -> Finding:
    first, steps = part.first, part.end - part.first
    times = f"{part.better:.0f}" if part.better < 100 else "more than 100"
    return Finding(
        "error",
        "action_sign",
        pair.episode,
        first,
        f"action {name} moves the state the opposite way from step {first} to {part.end - 1} (mirrored, "
        f"it follows the state {times} times better there)",
        "the policy learns both signs, which cancel",
        "flip the sign of that dimension in these steps, or leave the episode out",
        steps=steps,
    )
