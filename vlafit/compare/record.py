"""What is kept of a finished arm: arm.json, whole, so that a report needs no run folder any more."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlafit import config, files, report
from vlafit.compare.arms import Arm
from vlafit.compare.process import reason
from vlafit.errors import VlafitError
from vlafit.report.facts import Facts
from vlafit.score import Score, overall

FORMAT = 1
FILE = "arm.json"
HELD_OUT = "held-out"  # what the recipe's own validation split is called beside the named sets
AFTER, WRONG = "after", "wrong_instruction"


@dataclass(frozen=True)
class ValidationPoint:
    """One validation on one set."""

    step: int
    samples: int
    seconds: float
    """Training time, without validation and rollouts."""
    loss: float
    action_error: float | None = None


@dataclass(frozen=True)
class Memory:
    """Peak memory of the training process in bytes, and what it consists of."""

    peak: int
    """Allocated on CUDA, resident on a CPU."""
    parts: dict[str, int]
    """weights, gradients, optimiser, average, program, rest."""
    rss: int = 0
    allocated: int = 0
    reserved: int = 0
    exact: bool = True
    """False: the system gives the peak of the process's whole life alone."""


@dataclass(frozen=True)
class Figures:
    """What an arm came to."""

    steps: int
    samples: int
    train_seconds: float
    samples_per_s: float
    """Median over the logged steps: validation and saving are not in it."""
    parameters: int
    trainable: int
    checkpoint_bytes: int
    """Of the last checkpoint, without the state that resumes training."""
    validation: dict[str, tuple[ValidationPoint, ...]]
    success: dict[str, dict[str, Score]] = field(default_factory=dict)
    """Evaluation (after, wrong_instruction) -> task -> outcomes."""
    memory: Memory | None = None
    merge_error: float | None = None
    """Largest difference of outputs that merging adapters makes; None where nothing was merged."""
    device: str = ""
    threads: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    caveats: tuple[str, ...] = ()

    def score(self, evaluation: str) -> Score | None:
        """Return the outcomes of all tasks together; None where it was not played."""
        found = self.success.get(evaluation)
        return overall(found) if found else None

    def last(self, name: str = HELD_OUT) -> float | None:
        """Return the last validation loss on a set."""
        points = self.validation.get(name)
        return points[-1].loss if points else None

    def best(self, name: str = HELD_OUT) -> ValidationPoint | None:
        """Return the validation of the lowest loss on a set."""
        return min(self.validation.get(name, ()), key=lambda p: p.loss, default=None)

    def forgotten(self, name: str) -> float | None:
        """Return by how much the loss on a named set rose from step 0 to the end."""
        points = self.validation.get(name, ())
        return points[-1].loss - points[0].loss if len(points) > 1 and points[0].step == 0 else None


@dataclass(frozen=True)
class Record:
    """One arm: what it was, and what it came to or what broke it."""

    name: str
    strategy: str
    strategy_given: str
    strategy_sha256: str
    lr: float
    seed: int
    identity: str
    """Hash of what the comparison's arms share."""
    judged: bool
    """Whether it was rolled out, if the recipe asks for that; one that only tried a learning rate was not."""
    figures: Figures | None = None
    error: str | None = None
    """The last words of an arm that broke."""
    format: int = FORMAT

    @property
    def finished(self) -> bool:
        """Whether there are figures."""
        return self.figures is not None

    @property
    def reason(self) -> str:
        """Why there are none, in one line."""
        return reason(self.error or "")


def record_of(arm: Arm, identity: str, *, judged: bool, **outcome: Any) -> Record:
    """Return an arm's record; `outcome` is either `figures` or `error`."""
    one = arm.candidate
    return Record(arm.name, one.label, one.given, one.sha256, arm.lr, arm.seed, identity, judged, **outcome)


def write(path: Path, record: Record) -> None:
    """Write arm.json, whole or not at all."""
    files.write_atomic(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> Record | None:
    """Read arm.json; None where there is none. Raises VlafitError for one that is damaged."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VlafitError(f"{path}: not JSON ({error}); remove the arm's folder to run it again") from error
    found = config.build(Record, values, str(path))
    if found.format != FORMAT:
        raise VlafitError(f"{path}: format {found.format}; this version reads format {FORMAT}")
    return found


# --------------------------------------------------------------------------------------------- from a run


def figures(run: Path) -> Figures:
    """Read what a finished run came to. Raises VlafitError where its folder lacks what every run has."""
    facts = report.read_facts(run)
    if not facts.finished or facts.plan is None:
        raise VlafitError(f"{run}: the run has not finished")
    every = [facts.plan.at(number) for number in range(len(facts.plan.strategy.stages))]
    batch = facts.recipe.train.batch_size
    speeds = sorted(point.value for point in facts.metrics.get("train/samples_per_s", ()))
    last = run / "checkpoints" / f"step_{facts.steps:06d}"
    return Figures(
        steps=facts.steps,
        samples=facts.steps * batch,
        train_seconds=float(facts.run.get("train_seconds") or 0.0),
        samples_per_s=speeds[len(speeds) // 2] if speeds else 0.0,
        parameters=facts.plan.parameters + facts.plan.adapter_parameters,
        trainable=max(stage.trainable_parameters for stage in every),
        checkpoint_bytes=_size(last),
        validation=_validation(facts, batch),
        success={name: dict(one.tasks) for name, one in facts.evaluations.items() if name in (AFTER, WRONG)},
        memory=_memory(facts.run.get("memory"), str(run / "run.json")),
        merge_error=_number(facts.run.get("merge_error")),
        device=str(facts.run.get("device") or ""),
        threads=int(facts.run.get("threads") or 0),
        versions={k: str(v) for k, v in (facts.run.get("versions") or {}).items()},
        commit=facts.run.get("commit"),
        caveats=facts.caveats,
    )


def _validation(facts: Facts, batch: int) -> dict[str, tuple[ValidationPoint, ...]]:
    """Return the validations of each set: the held-out episodes first, then the named ones."""
    named = {name: f"validation/{name}/" for name in facts.recipe.data.validation_sets}
    found = {}
    for name, prefix in {HELD_OUT: "validation/", **named}.items():
        errors = {point.step: point.value for point in facts.metrics.get(f"{prefix}action_error", ())}
        points = facts.metrics.get(f"{prefix}loss", ())
        if points:
            found[name] = tuple(
                ValidationPoint(p.step, p.step * batch, p.time_s or 0.0, p.value, errors.get(p.step))
                for p in points
            )
    return found


def _memory(values: object, where: str) -> Memory | None:
    return config.build(Memory, values, f"{where}: memory") if isinstance(values, Mapping) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _size(checkpoint: Path) -> int:
    return sum(
        path.stat().st_size
        for path in checkpoint.rglob("*")
        if path.is_file() and "training" not in path.relative_to(checkpoint).parts
    )
