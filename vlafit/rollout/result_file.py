"""Hold the numbers of a result.json against the episodes that they are said to count."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlafit.config import build
from vlafit.errors import ConfigError
from vlafit.rollout.protocol import Protocol
from vlafit.rollout.records import EpisodePlan, Record, count_invalid, difference
from vlafit.score import Score

SAME = ("protocol_sha256", "actor", "trials", "wrong_instruction")  # in evaluation.json and result.json


def plan_of(values: Mapping[str, Any]) -> EpisodePlan:
    """Return the episodes of a result.json that lies without its evaluation.json.

    Raises ConfigError, TypeError, ValueError or KeyError where it is damaged.
    """
    return EpisodePlan.of({**values, "tasks": list(values["tasks"])}, {})


def fault(
    values: Mapping[str, Any], records: Sequence[Record], identity: Mapping[str, Any] | None = None
) -> str:
    """Return which value of result.json differs from the records or from `identity`; "" if none does.

    `identity` is that of evaluation.json. Fewer records than were counted are no difference. Raises
    ConfigError, KeyError, TypeError, ValueError or AttributeError where `values` are damaged.
    """
    latest = list({(record.task, record.seed): record for record in records}.values())
    return (
        (_other(values, identity) if identity is not None else "")
        or _protocol(values)
        or difference(values["tasks"], latest)
        or next(_rates(values), "")
        or _answers(values, latest)
    )


def _other(values: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    for key in SAME:
        if values[key] != identity[key]:
            return (
                f"{key} is {values[key]}, but evaluation.json says {identity[key]}; the two are of different "
                "evaluations"
            )
    stated, tasks = list(values["tasks"]), list(identity["tasks"])
    return "" if stated == tasks else f"tasks are {stated}, but evaluation.json says {tasks}"


def _protocol(values: Mapping[str, Any]) -> str:
    """Return the difference between the protocol and its hash."""
    hashes = build(Protocol, dict(values["protocol"]), "protocol").hashes()
    if values["protocol_sha256"] in hashes:
        return ""
    return (
        f"protocol_sha256 is {values['protocol_sha256']}, but that of its protocol "
        f"{values['protocol'].get('name')!r} is {hashes[0]}"
    )


def _rates(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield each rate and end of an interval that is not that of its counts, and wrong sums."""
    total = Score(0, 0)
    for task, stated in values["tasks"].items():
        counts = counts_of(stated)
        total += counts
        yield from _unlike(f"task {task}: ", stated, counts.to_json(), "that of its counts")
    stated, overall = values["overall"], total.to_json()
    yield from _unlike("overall: ", stated, overall, "by the counts of its tasks")
    if "complete" in values and values["complete"] is not (not total.errors):
        yield f"complete is {values['complete']}, but {total.errors} episodes ended in an environment error"


def _unlike(
    where: str, stated: Mapping[str, Any], found: Mapping[str, float | int | None], why: str
) -> Iterator[str]:
    for key, value in found.items():
        if key in stated and not _equal(stated[key], value):
            yield f"{where}{key} is {stated[key]}, but {why} it is {value}"


def _equal(stated: object, value: float | None) -> bool:
    if value is None or isinstance(stated, bool) or not isinstance(stated, int | float):
        return stated is None and value is None
    return math.isclose(stated, value, rel_tol=1e-9, abs_tol=1e-12)


def counts_of(values: Mapping[str, Any]) -> Score:
    """Return the counts of a task, or of all. Raises ValueError, KeyError or TypeError for what are none."""
    score = Score(*(int(values[key]) for key in ("successes", "episodes", "errors")))
    if not 0 <= score.successes <= score.episodes or score.errors < 0:
        raise ValueError(f"{score.successes} successes of {score.episodes} episodes, {score.errors} errors")
    return score


def _answers(values: Mapping[str, Any], records: Sequence[Record]) -> str:
    stated = values.get("invalid_answers")
    played = sum(sum(map(int, (v["episodes"], v["errors"]))) for v in values["tasks"].values())
    found = count_invalid(records)
    if stated is None or len(records) != played:
        return ""
    counted = {"answers": 0, "invalid": 0, "rate": 0.0} if found is None else found.to_json()
    return next(_unlike("invalid_answers: ", stated, counted, "by the lines of episodes.jsonl"), "")


def require(
    place: object, values: Mapping[str, Any], records: Sequence[Record], identity: Mapping[str, Any] | None
) -> None:
    """Raise ConfigError naming the first value of result.json (at `place`) that `fault` finds."""
    if found := fault(values, records, identity):
        raise ConfigError(
            f"{place}: {found}; one of the two was changed since. Put the lines back as they were, or remove "
            "result.json and evaluate again with --resume, which takes the lines as they are"
        )
