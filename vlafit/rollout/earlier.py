"""Read the outcomes of an evaluation that was played before, to compare another one with it.

It is a folder of `vlafit eval`, a run (its evaluation after training), or what is published of one of them in
eval/results/: result.json with its episodes, a run's report.json, or an arm of a comparison.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlafit import files
from vlafit.errors import MOST_NAMES, ConfigError, brief
from vlafit.files import parse_json, plain_text
from vlafit.rollout import result_file
from vlafit.rollout.evaluation_folder import EvaluationFolder
from vlafit.rollout.protocol import WIDTH, Protocol, load_protocol
from vlafit.rollout.records import Record, difference, read_records
from vlafit.rollout.shard import Start

DEPTH = 2  # folders below one without an evaluation, in which evaluations are looked for, to name them


@dataclass(frozen=True)
class Earlier:
    """The outcomes of an earlier evaluation. `protocol` is empty where only its hash was published."""

    path: Path
    outcomes: Mapping[Start, bool | None]
    protocol: Mapping[str, Any]
    protocol_sha256: str
    wrong_instruction: bool
    protocol_name: str = ""
    execution: Mapping[str, Any] | None = None
    """How chunks were executed; empty: as the protocol says. None where that was not published."""

    def sha256(self) -> str:
        """Return a hash of the outcomes."""
        listed = sorted([task, seed, success] for (task, seed), success in self.outcomes.items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@dataclass(frozen=True)
class _Place:
    """Where an evaluation may be read: the file that describes it, and how to read it."""

    file: Path
    read: Callable[[], Earlier]


def read_earlier(
    path: str | Path, wrong_instruction: bool = False, protocol: Protocol | None = None
) -> Earlier:
    """Read the outcomes of an evaluation, a run, or a published one. Raises ConfigError with the reason.

    Of a run, it is the evaluation after training, or with `wrong_instruction` that of the control. Where a
    published run has another evaluation, under `protocol`, it is that one.
    """
    path = Path(path)
    name = "wrong_instruction" if wrong_instruction else "after"
    places = list(_places(path, name, protocol))
    if not places:
        raise ConfigError(_nothing(path, name, protocol))
    wanted = (protocol.name if protocol else "", wrong_instruction)
    fitting = [place for place in places[1:] if len(places) > 1 and _about(place.file, name) == wanted]
    if fitting and _about(places[0].file, name) != wanted:
        return fitting[0].read()
    return places[0].read()


def _places(path: Path, name: str, asked: Protocol | None) -> Iterator[_Place]:
    """Yield the evaluations of a folder; its own first."""
    for folder in (path, path / "eval" / name):
        if (folder / "evaluation.json").is_file():
            yield _Place(folder / "evaluation.json", lambda folder=folder: _of_evaluation(folder))
            return
    rows = path / f"episodes_{name}.jsonl"
    if rows.is_file() and (path / "report.json").is_file():
        yield _Place(path / "report.json", lambda: _of_report(path, name, asked))
    compared = path.parent.parent / "compare.json"
    if rows.is_file() and path.parent.name == "arms" and compared.is_file():
        yield _Place(compared, lambda: _of_arm(path, compared, name, asked))
    for result in [path / "result.json", *sorted(path.glob("result_*.json"))]:
        own = path / f"episodes{result.stem.removeprefix('result')}.jsonl"
        if result.is_file() and own.is_file():
            yield _Place(result, lambda result=result, own=own: _of_result(result, own))


def _about(file: Path, name: str) -> tuple[str, bool]:
    """Return the protocol's name and whether instructions were wrong, as a file says; "" if it is damaged."""
    try:
        values = parse_json(plain_text(file))
        match file.name:
            case "evaluation.json":
                values = values["identity"]
            case "report.json":
                return str(values["evaluations"][name]["protocol"]), name == "wrong_instruction"
            case "compare.json":
                return Path(values["recipe"]["eval"]["protocol"]).stem, name == "wrong_instruction"
        return str(values["protocol"]["name"]), bool(values["wrong_instruction"])
    except (ConfigError, ValueError, KeyError, TypeError):
        return "", False


def _nothing(path: Path, name: str, asked: Protocol | None) -> str:
    """Return the message for a folder without an evaluation, with those below it that have one."""
    if not path.is_dir():
        return f"{path}: no such folder; name one that `vlafit eval` or `vlafit train` wrote"
    levels = ["/".join("*" * depth) for depth in range(1, DEPTH + 1)]
    folders = sorted(folder for level in levels for folder in path.glob(level) if folder.is_dir())
    below = [folder for folder in folders if next(_places(folder, name, asked), None)]
    named = ", ".join(map(str, below[:MOST_NAMES])) + (", ..." if len(below) > MOST_NAMES else "")
    return (
        f"{path}: holds no evaluation to compare with: neither evaluation.json, nor "
        f"eval/{name}/evaluation.json, nor result.json with episodes.jsonl, nor episodes_{name}.jsonl with "
        "report.json (of a published arm, compare.json two folders above); "
        + (f"these folders do: {named}" if below else "name one that `vlafit eval` or `vlafit train` wrote")
    )


def _of_evaluation(path: Path) -> Earlier:
    folder = EvaluationFolder(path, {})
    folder.read()
    identity = folder.identity
    _require_rows(path / "episodes.jsonl")
    records = folder.records()
    folder.require_counted(records)
    return _of_identity(path, identity, records)


def _of_identity(path: Path, identity: Mapping[str, Any], records: Iterable[Record]) -> Earlier:
    protocol = dict(identity["protocol"])
    return Earlier(
        path,
        _outcomes(records),
        protocol,
        str(identity["protocol_sha256"]),
        bool(identity["wrong_instruction"]),
        str(protocol["name"]),
        dict(identity.get("execution", {})),
    )


def _of_result(result: Path, rows: Path) -> Earlier:
    """Read a result.json whose evaluation.json was not published."""
    try:
        values = parse_json(plain_text(result))
        records = read_records(rows, result_file.plan_of(values))
        result_file.require(result, values, records, None)
        return _of_identity(result.parent, values, records)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(result, error) from error


def _of_report(folder: Path, name: str, asked: Protocol | None) -> Earlier:
    """Read an evaluation that a run's report.json holds, with its episodes_NAME.jsonl."""
    report, path = folder / "report.json", folder / f"episodes_{name}.jsonl"
    try:
        facts = files.parse_json(plain_text(report))["evaluations"][name]
        sha256, protocol, actor = str(facts["protocol_sha256"]), str(facts["protocol"]), str(facts["actor"])
        listed = {(str(e["task"]), int(e["seed"])): (e["success"], e["steps"]) for e in facts["episodes"]}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(report, error, f", or without evaluation {name!r}") from error
    records = read_records(path, None)
    rows = {(record.task, record.seed): (record.success, record.steps) for record in records}
    for start in listed.keys() | rows.keys():
        there, here = listed.get(start, "no such episode"), rows.get(start, "no such episode")
        if there != here:
            raise ConfigError(
                f"{path}: task {start[0]}, seed {start[1]}: (success, steps) is {here}, but {report} says "
                f"{there}; one of the two was changed: fetch both again"
            )
    outcomes = _outcomes(records)
    of_hash = _protocol_of(sha256, protocol, outcomes, actor, asked)
    return Earlier(folder, outcomes, of_hash, sha256, name == "wrong_instruction", protocol)


def _of_arm(folder: Path, compared: Path, name: str, asked: Protocol | None) -> Earlier:
    """Read an evaluation of an arm of a published comparison, whose numbers compare.json holds."""
    path = folder / f"episodes_{name}.jsonl"
    try:
        values = parse_json(plain_text(compared))
        arms = [arm for arm in values["arms"] if arm["name"] == folder.name]
        if not arms:
            raise ConfigError(f"{compared}: names no arm {folder.name!r}, the folder's name")
        sha256 = str(values["identity"]["protocol"])
        protocol = Path(values["recipe"]["eval"]["protocol"]).stem
        records = read_records(path, None)
        counted = arms[0]["figures"]["success"][name]
        stated = arms[0]["figures"].get("outcomes", {}).get(name, {})
        fault = difference(counted, records)
        outcomes = _outcomes(records)
        unlike = [
            f"task {task}, seed {seed}: success is {success}"
            for (task, seed), success in outcomes.items()
            if task in stated and stated[task].get(str(seed), "missing") != success
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(compared, error, f", or without evaluation {name!r} of this arm") from error
    if fault or unlike:
        raise ConfigError(
            f"{path}: {fault or unlike[0]}, but {compared} says otherwise; fetch both files again"
        )
    return Earlier(
        folder,
        outcomes,
        _protocol_of(sha256, protocol, outcomes, "", asked),
        sha256,
        name == "wrong_instruction",
        protocol,
    )


def _protocol_of(
    sha256: str, name: str, starts: Iterable[Start], actor: str, asked: Protocol | None
) -> Mapping[str, Any]:
    """Return the protocol with a hash, of which nothing else was published but its name; {} if unknown.

    It is the one that is asked for now, or the shipped one of that name, with the width that the actor was
    loaded with, or the starts that were played; the hash tells whether it is.
    """
    bases = [asked] if asked and asked.name == name else []
    if "/" not in name:
        try:
            bases.append(load_protocol(name))
        except ConfigError:
            pass  # it does not ship
    seeds = [seed for _, seed in starts]
    trials = max(Counter(task for task, _ in starts).values(), default=1)
    stated = [int(width) for width in re.findall(r"\bwidth=(\d{1,4})\b", actor)]
    for base in bases:
        for width in (*stated, base.width, WIDTH):
            for first, count in ((base.first_seed, base.trials), (min(seeds, default=0), trials)):
                one = replace(base, width=max(1, width), first_seed=first, trials=count)
                if sha256 in one.hashes():
                    return one.to_json()
    return {}


def _require_rows(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: missing; no episode of this evaluation has ended")


def _outcomes(records: Iterable[Record]) -> dict[Start, bool | None]:
    return {(record.task, record.seed): record.success for record in records}


def _damaged(file: Path, error: Exception, more: str = "") -> ConfigError:
    return ConfigError(f"{file}: damaged{more} ({brief(error)}); restore it, or compare with another folder")
