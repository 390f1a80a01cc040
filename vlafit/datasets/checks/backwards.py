"""Find episodes that are played backwards: the motion comes before its command, and begins where others end.

Reversing an episode mirrors the delay between actions and states. Where actions are positions that alone is
also what a shift of the actions does; where they are velocities, also what turned signs do. So the ends of
the episode must agree, or both kinds of dimensions must be mirrored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Columns, Finding, Shown

MIRRORED = 0.75  # share of the dimensions that must be mirrored
FIXED = 8.0  # times that the ends of episodes must lie further apart than each of them varies
NEARER = 0.25  # of the distance that the last state must be from the usual first one, and the first is
MOVING = 1e-6  # a range below this is no motion


@dataclass(frozen=True)
class Evidence:
    """Which episodes relate an action to its state as they would if played backwards."""

    shown: Shown
    difference: bool
    """Whether the action drives differences of the state, whose sign reversing turns."""
    turned: NDArray[np.bool_]  # [episodes]
    tells: bool
    """Whether its delay is sharp enough, and not its own mirror image."""


def explain(
    columns: Columns, findings: Sequence[Finding], evidence: Sequence[Evidence], untested: Untested
) -> list[Finding]:
    """Return findings of signs and delays, those of an episode that is played backwards as one.

    Where only the delays, or only the signs, are mirrored, they say that this is possible.
    """
    telling = [one for one in evidence if one.tells]
    if not telling:
        if evidence:
            untested.add(
                "played_backwards",
                "no action has one delay, other than none, before its state in most episodes",
            )
        return list(findings)
    mirrored = np.stack([one.turned for one in telling]).mean(axis=0) >= MIRRORED
    kinds = {one.difference for one in telling}
    ends = _exchanged_ends(columns)
    made, suspected = list(findings), {f.episode for f in findings}
    for n in np.flatnonzero(mirrored):
        episode = columns[n][0]
        if episode not in suspected:
            continue
        if len(kinds) == 2 or ends[n]:
            made = [f for f in made if f.episode != episode]
            made.append(_backwards(episode, telling[0].shown, bool(ends[n])))
        else:
            made = [_possible(f) if f.episode == episode else f for f in made]
    return made


def _exchanged_ends(columns: Columns) -> NDArray[np.bool_]:
    """Return which episodes end where the others begin, and begin elsewhere [episodes].

    Of the state dimensions whose first value is much the same in most episodes, and unlike the last.
    """
    firsts, lasts = (np.stack([state[row] for _, state, _ in columns]) for row in (0, -1))
    begin = np.median(firsts, axis=0)
    vary = np.median(np.abs(firsts - begin), axis=0)
    apart = np.median(np.abs(lasts - begin), axis=0)
    fixed = (apart > FIXED * vary) & (apart > MOVING)
    if not fixed.any():
        return np.zeros(len(columns), bool)
    first, last = (np.abs(rows - begin)[:, fixed] / apart[fixed] for rows in (firsts, lasts))
    return last.sum(axis=1) < NEARER * first.sum(axis=1)


def _backwards(episode: str, shown: Shown, ends: bool) -> Finding:
    where = ", and it begins elsewhere and ends where the other episodes begin" if ends else ""
    return Finding(
        "error",
        "played_backwards",
        episode,
        None,
        f"actions come after the motion that they cause, as in the other episodes played backwards{where}",
        "the policy learns to undo the task",
        "reverse the episode's rows, or leave it out",
        columns=shown,
    )


def _possible(finding: Finding) -> Finding:
    message = f"{finding.message}; the same would be measured if the episode were played backwards"
    return replace(finding, message=message)
