"""A run's folder: a new one, or the same run's; and what may differ when a run goes on."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlafit import config, files
from vlafit.errors import TrainingError
from vlafit.recipe import Recipe
from vlafit.train import stages
from vlafit.tuning import load_strategy

# Fields that may differ between a run and its resumption: none of them changes a weight.
HARMLESS = ("name", "purpose", "eval", "train.log_every", "train.keep", "train.keep_best", "train.save_every",
            "train.validate_every", "train.validation_batches", "train.trackers", "data.workers",
            "data.validation_sets")  # fmt: skip
VALIDATION = ("train.validate_every", "train.validation_batches")  # not where it decides when stages begin


def look(recipe: Recipe, out: Path, resume: bool) -> None:
    """Raise TrainingError unless `out` is free for a new run or, with `resume`, holds this very run.

    A folder with no run in it yet is one where a run can begin, with `resume` or without. Writes nothing.
    """
    kept = out / "recipe.toml"
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; choose a folder with --out")
    if kept.is_file():
        if not resume:
            raise TrainingError(
                f"{out} holds a run already; --resume goes on with it, --out chooses another folder"
            )
        changed = changes(config.read(Recipe, kept, "recipe"), recipe)
        if changed:
            raise TrainingError(
                f"{out}: cannot resume with another recipe; changed: {'; '.join(changed)}. Give the "
                "values it began with, or start anew with --out"
            )
    elif out.exists() and not files.is_empty(out):
        raise TrainingError(f"{out} is not empty and holds no run; choose another folder with --out")


def changes(before: Recipe, now: Recipe) -> list[str]:
    """Name the fields of two recipes that differ and would change the weights."""
    pairs = zip(_flat(before), _flat(now), strict=True)
    odd = [(name, a, b) for (name, a), (_, b) in pairs if a != b]
    decides = any(name in VALIDATION for name, _, _ in odd) and stages.depends_on_validation(
        load_strategy(now.strategy).stages
    )
    return [
        f"{name} was {a!r}, is {b!r}"
        for name, a, b in odd
        if not _is_harmless(name) or (decides and name in VALIDATION)
    ]


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from _flat(getattr(value, item.name), f"{name}.{item.name}".lstrip("."))
    else:
        yield name, value


def _is_harmless(name: str) -> bool:
    return any(name == field or name.startswith(field + ".") for field in HARMLESS)


def begin_record(out: Path, facts: Mapping[str, Any], resumed_from: str | None) -> dict[str, object]:
    """Write run.json and return it. A resumed run keeps its notices, and how and when it began."""
    path, now = out / "run.json", dict(facts)
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            now |= {key: before[key] for key in ("command", "started")}
            now["notices"] = list(dict.fromkeys([*before.get("notices", ()), *facts.get("notices", ())]))
            now["memory"] = before.get("memory")  # a session that trains nothing more measures none
            seconds = before.get("seconds")  # None: that session was killed, and nobody knows
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path}: damaged ({error!r}); remove the file to go on") from error
        now |= {"resumed": facts["started"], "resumed_from": resumed_from, "seconds_before": seconds}
    files.write_atomic(path, json.dumps(now, indent=2) + "\n")
    return now


def end_record(out: Path, record: Mapping[str, object], facts: Mapping[str, object]) -> None:
    """Write run.json again, with how the run ended."""
    files.write_atomic(out / "run.json", json.dumps({**record, **facts}, indent=2) + "\n")
