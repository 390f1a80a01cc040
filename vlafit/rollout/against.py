"""Compare an evaluation with an earlier one at the starts that both played, and stop as soon as they differ.

The earlier one is a folder of `vlafit eval`, a run (its evaluation after training), or a published run. It is
not played again: an outcome belongs to its task and seed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlafit import files
from vlafit.config import build
from vlafit.errors import ConfigError, brief
from vlafit.files import plain_text
from vlafit.rollout.evaluation_folder import EvaluationFolder
from vlafit.rollout.protocol import Protocol
from vlafit.rollout.records import Record, read_records
from vlafit.rollout.shard import Start

ALPHA = 0.05  # probability of telling two policies apart that are alike
DECIDES_STARTS = ("horizon", "settle_steps", "settle_action", "success", "versions")
BESIDE = ("name", "purpose", "references", "tasks", "trials", "first_seed", "timeout_s", "swapped", "width")


@dataclass(frozen=True)
class Earlier:
    """The outcomes of an earlier evaluation. `protocol` is empty where only its hash was published."""

    path: Path
    outcomes: Mapping[Start, bool | None]
    protocol: Mapping[str, Any]
    protocol_sha256: str
    wrong_instruction: bool

    def sha256(self) -> str:
        """Return a hash of the outcomes."""
        listed = sorted([task, seed, success] for (task, seed), success in self.outcomes.items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


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


def read_earlier(path: str | Path, wrong_instruction: bool = False) -> Earlier:
    """Read the outcomes of an evaluation, a run, or a published run. Raises ConfigError with the reason.

    Of a run, it is the evaluation after training, or with `wrong_instruction` that of the control.
    """
    path = Path(path)
    name = "wrong_instruction" if wrong_instruction else "after"
    for folder in (path, path / "eval" / name):
        if (folder / "evaluation.json").is_file():
            return _of_evaluation(folder)
    if (path / "report.json").is_file() and (path / f"episodes_{name}.jsonl").is_file():
        return _of_published(path, name)
    raise ConfigError(
        f"{path}: holds no evaluation to compare with: neither evaluation.json, nor "
        f"eval/{name}/evaluation.json, nor report.json with episodes_{name}.jsonl; name a folder that "
        "`vlafit eval` or `vlafit train` wrote"
    )


def _of_evaluation(path: Path) -> Earlier:
    folder = EvaluationFolder(path, {})
    folder.read()
    identity = folder.identity
    _require_rows(path / "episodes.jsonl")
    records = folder.records()
    folder.require_counted(records)
    protocol, wrong = dict(identity["protocol"]), bool(identity["wrong_instruction"])
    return Earlier(path, _outcomes(records), protocol, str(identity["protocol_sha256"]), wrong)


def _of_published(folder: Path, name: str) -> Earlier:
    report, path = folder / "report.json", folder / f"episodes_{name}.jsonl"
    try:
        facts = files.parse_json(plain_text(report))["evaluations"][name]
        sha256 = str(facts["protocol_sha256"])
        listed = {(str(e["task"]), int(e["seed"])): (e["success"], e["steps"]) for e in facts["episodes"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{report}: damaged, or without evaluation {name!r} ({brief(error)})") from error
    records = read_records(path, None)
    rows = {(record.task, record.seed): (record.success, record.steps) for record in records}
    for start in listed.keys() | rows.keys():
        there, here = listed.get(start, "no such episode"), rows.get(start, "no such episode")
        if there != here:
            raise ConfigError(
                f"{path}: task {start[0]}, seed {start[1]}: (success, steps) is {here}, but {report} says "
                f"{there}; one of the two was changed: fetch both again"
            )
    return Earlier(folder, _outcomes(records), {}, sha256, name == "wrong_instruction")


def _require_rows(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: missing; no episode of this evaluation has ended")


def _outcomes(records: Iterable[Record]) -> dict[Start, bool | None]:
    return {(record.task, record.seed): record.success for record in records}


def require_comparable(
    earlier: Earlier, protocol: Protocol, wrong_instruction: bool, starts: Iterable[Start]
) -> tuple[str, ...]:
    """Return what else differs.

    Raises ConfigError where equal seeds are not equal starts, or no start is shared.
    """
    if not any(start in earlier.outcomes for start in starts):
        raise ConfigError(
            f"{earlier.path} and protocol {protocol.name!r} share no start: no task with the same seed"
        )
    here = protocol.to_json()
    differs = ["wrong_instruction"] if wrong_instruction != earlier.wrong_instruction else []
    if not earlier.protocol:
        if earlier.protocol_sha256 != protocol.sha256():
            raise ConfigError(
                f"{earlier.path}: was evaluated under another protocol, which is not published (sha256 "
                f"{earlier.protocol_sha256[:12]} there, {protocol.sha256()[:12]} here)"
            )
        return tuple(differs)
    there = build(Protocol, earlier.protocol, str(earlier.path)).to_json()
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
    differs += [f"env.{key}" for key in here["env"] if there["env"][key] != here["env"][key]]
    same = {*DECIDES_STARTS, *BESIDE, "env"}
    differs += [key for key in here if key not in same and there[key] != here[key]]
    return tuple(differs)


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
