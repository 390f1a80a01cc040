"""Compare an evaluation with an earlier one at the starts that both played, and stop as soon as they differ.

The earlier one (`vlafit.rollout.earlier`) is not played again: an outcome belongs to its task and seed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlafit.config import build
from vlafit.errors import ConfigError
from vlafit.execution import Execution
from vlafit.rollout.earlier import Earlier
from vlafit.rollout.protocol import Protocol
from vlafit.rollout.shard import Start

ALPHA = 0.05  # probability of telling two policies apart that are alike
DECIDES_STARTS = ("horizon", "settle_steps", "settle_action", "success", "versions")
BESIDE = ("name", "purpose", "references", "tasks", "trials", "first_seed", "timeout_s", "swapped")


@dataclass(frozen=True)
class Comparison:
    """The difference of success, this evaluation minus the earlier one, at the starts that both played."""

    against: str
    starts: int
    here: int
    """Successes of this evaluation at those starts."""
    there: int
    """Successes of the earlier evaluation at those starts."""
    difference: float
    low: float
    """Lower end of the 95 % interval (Tango's, for paired proportions)."""
    high: float
    here_only: int
    there_only: int
    p: float
    """McNemar's exact test."""
    p_anytime: float
    """p-value that stays valid however often one looks and whenever one stops."""
    starts_needed: int | None
    """Starts at which McNemar's exact test shows this difference with 80 % power, if starts are won and lost
    as often as those played; None where it is zero.
    """
    differs_in: tuple[str, ...]
    """Other differences between the two evaluations."""
    stopped: bool = False
    """Whether this evaluation ended because the two were told apart."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return json.loads(json.dumps(asdict(self)))

    def __str__(self) -> str:
        lines = [
            f"against {self.against}, at {self.starts} shared starts: {self.here} successes here, "
            f"{self.there} there; here only {self.here_only}, there only {self.there_only}"
        ]
        if self.stopped:
            better = "better" if self.here_only > self.there_only else "worse"
            lines.append(
                f"{better}: told apart (anytime p {self.p_anytime:.2g}); the probability of telling two "
                f"policies apart that are alike was {100 * ALPHA:g} %. The rates of a stopped evaluation "
                "are biased."
            )
        else:
            points = f"{100 * self.difference:+.0f} points"
            ends = f"{100 * self.low:+.0f} to {100 * self.high:+.0f}"
            word = "not told apart"
            if self.p <= ALPHA:
                word = "better" if self.difference > 0 else "worse"
            needed = "" if self.p <= ALPHA or not self.starts_needed else (
                "; if new starts are won here only, and there only, as often as these, "
                f"{self.starts_needed:,} starts show the difference with 80 % power"
            )  # fmt: skip
            lines.append(f"{word}: {points} (95 %: {ends}), exact paired p {self.p:.2g}{needed}")
        if self.differs_in:
            lines.append(f"the two evaluations also differ in: {', '.join(self.differs_in)}")
        return "\n".join(lines)


def plain_execution(execution: Execution) -> dict[str, Any]:
    """Return an execution as plain values; evaluations are older than `guidance.prefix`."""
    values = asdict(execution)
    if execution.guidance.prefix == "auto":
        del values["guidance"]["prefix"]
    return values


def require_comparable(
    earlier: Earlier,
    protocol: Protocol,
    wrong_instruction: bool,
    starts: Iterable[Start],
    execution: Execution | None = None,
) -> tuple[str, ...]:
    """Return what else differs; `execution` is that of this evaluation, None: as its protocol says.

    Raises ConfigError where equal seeds are not equal starts, or no start is shared.
    """
    if not any(start in earlier.outcomes for start in starts):
        raise ConfigError(
            f"{earlier.path} and protocol {protocol.name!r} share no start: no task with the same seed"
        )
    here = protocol.to_json()
    differs = ["wrong_instruction"] if wrong_instruction != earlier.wrong_instruction else []
    if not earlier.protocol and earlier.protocol_sha256 in protocol.hashes():
        earlier = replace(earlier, protocol=here)
    if not earlier.protocol:
        raise ConfigError(
            f"{earlier.path}: its protocol {earlier.protocol_name!r} is not published: "
            f"its sha256 is {earlier.protocol_sha256[:12]}, and {protocol.name!r} here has "
            f"{protocol.sha256()[:12]}. Nobody knows whether its starts are the same; evaluate that policy "
            "again, or compare with another folder"
        )
    played = build(Protocol, earlier.protocol, str(earlier.path))
    there = played.to_json()
    wrong = [
        f"{key}: {there[key]} there, {here[key]} here" for key in DECIDES_STARTS if there[key] != here[key]
    ]
    if there["env"]["name"] != here["env"]["name"]:
        wrong.append(f"env.name: {there['env']['name']} there, {here['env']['name']} here")
    if wrong:
        listed = "\n  ".join(wrong)
        raise ConfigError(
            f"{earlier.path} cannot be compared with protocol {protocol.name!r}: equal seeds are not equal "
            f"starts, or success means another thing:\n  {listed}"
        )
    if played.sha256() != earlier.protocol_sha256 in played.hashes():
        differs.append("pictures of the renderer (an earlier version's there)")
    differs += _unlike("env.", there["env"], here["env"], here["env"])
    same = {*DECIDES_STARTS, *BESIDE, "env"}
    differs += _unlike("", there, here, [key for key in here if key not in same])
    if earlier.execution is not None:
        executed = earlier.execution or plain_execution(Execution(replan=played.replan))
        now = plain_execution(execution or Execution(replan=protocol.replan))
        besides = [key for key in now if key != "replan" or there["replan"] == here["replan"]]
        differs += _unlike("execution.", executed, now, besides)
    return tuple(differs)


def _unlike(prefix: str, there: Mapping[str, Any], here: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Name the keys of which the values differ, with the values if they are short."""
    names = []
    for key in keys:
        values = there.get(key), here.get(key)
        if values[0] != values[1]:
            short = all(isinstance(value, str | int | float) and len(str(value)) < 30 for value in values)
            shown = f" ({values[0]} there, {values[1]} here)" if short else ""
            names.append(f"{prefix}{key}{shown}")
    return names


def compare(
    outcomes: Mapping[Start, bool | None], earlier: Earlier, differs_in: Sequence[str], *, stopped: bool
) -> Comparison:
    """Compare outcomes, in the order in which they count, with those of an earlier evaluation."""
    # Here, because environment processes import this package, and these bring scipy.
    from vlafit.significance import Pairs, anytime_p, paired_interval, sign_flip_p, starts_needed

    pairs = Pairs.of([_named(outcomes)], [_named(earlier.outcomes)])
    by_start = pairs.by_start
    low, high = paired_interval(pairs)
    return Comparison(
        against=str(earlier.path),
        starts=pairs.starts,
        here=int(pairs.first.sum()),
        there=int(pairs.second.sum()),
        difference=pairs.mean if pairs.starts else 0.0,
        low=low,
        high=high,
        here_only=int((by_start > 0).sum()),
        there_only=int((by_start < 0).sum()),
        p=sign_flip_p(by_start),
        p_anytime=anytime_p(map(int, by_start)),
        starts_needed=starts_needed(pairs) if pairs.starts > 1 else None,
        differs_in=tuple(differs_in),
        stopped=stopped,
    )


def stop_after(
    order: Sequence[Start], outcomes: Mapping[Start, bool | None], earlier: Earlier, alpha: float = ALPHA
) -> int | None:
    """Return after how many starts of `order` the two are told apart; None if not by those that have ended.

    Only the starts before the first one that has not ended count, so the answer does not depend on which
    episodes happen to end first. Valid at any time: the probability that two policies that are alike are
    ever told apart is at most `alpha`.
    """
    from vlafit.significance import first_rejection

    signs = []
    for start in order:
        if start not in outcomes:
            break
        here, there = outcomes[start], earlier.outcomes.get(start)
        signs.append(0 if here is None or there is None else int(here) - int(there))
    return first_rejection(signs, alpha)


def _named(outcomes: Mapping[Start, bool | None]) -> dict[str, bool | None]:
    return {f"{task} {seed}": success for (task, seed), success in outcomes.items()}
