"""Read and write arm.json: all results of an arm, so that a report does not need the run folder."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlafit import config, files, report
from vlafit.compare.arms import Arm
from vlafit.compare.process import reason
from vlafit.errors import VlafitError
from vlafit.files import parse_json, plain_text
from vlafit.report.facts import Facts
from vlafit.score import Score, overall, score

FORMAT = 1
FILE = "arm.json"
HELD_OUT = "held-out"  # name of the recipe's own validation split among the named sets
AFTER, WRONG = "after", "wrong_instruction"


@dataclass(frozen=True)
class ValidationPoint:
    """One validation on one set."""

    step: int
    samples: int
    seconds: float
    """Training time without validation and rollouts."""
    loss: float
    action_error: float | None = None


@dataclass(frozen=True)
class Memory:
    """Peak memory of the training process in bytes, and its breakdown."""

    peak: int
    """Allocated on CUDA, resident on a CPU."""
    parts: dict[str, int]
    """weights, gradients, optimiser, average, program, rest."""
    rss: int = 0
    allocated: int = 0
    reserved: int = 0
    exact: bool = True
    """False: the system reports only the peak over the process's whole lifetime."""


@dataclass(frozen=True)
class Figures:
    """Results of a finished arm."""

    steps: int
    samples: int
    train_seconds: float
    samples_per_s: float
    """Median over the logged steps, without validation and saving."""
    parameters: int
    trainable: int
    checkpoint_bytes: int
    """Size of the last checkpoint without the training state."""
    validation: dict[str, tuple[ValidationPoint, ...]]
    success: dict[str, dict[str, Score]] = field(default_factory=dict)
    """Evaluation (after, wrong_instruction) -> task -> score."""
    outcomes: dict[str, dict[str, dict[str, bool | None]]] = field(default_factory=dict)
    """Evaluation -> task -> environment seed -> success (None: error). Empty in earlier records."""
    memory: Memory | None = None
    merge_error: float | None = None
    """Largest difference in outputs caused by merging adapters; None if nothing was merged."""
    device: str = ""
    threads: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    caveats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise VlafitError if the outcomes of an evaluation are not those that its scores count."""
        for name, by_task in self.outcomes.items():
            scores = self.success.get(name, {})
            for task in {**by_task, **scores}:
                counted, listed = scores.get(task), score(by_task.get(task, {}).values())
                if counted != listed:
                    raise VlafitError(
                        f"success.{name}: task {task!r} has {counted}, but outcomes.{name} has {listed}; one "
                        "of the two was changed: put it back, or remove the file and run the comparison again"
                    )

    def score(self, evaluation: str) -> Score | None:
        """Return the score over all tasks; None if the evaluation was not run."""
        tasks = self.success.get(evaluation)
        return overall(tasks) if tasks else None

    def last(self, name: str = HELD_OUT) -> float | None:
        """Return the last validation loss on a set."""
        points = self.validation.get(name)
        return points[-1].loss if points else None

    def best(self, name: str = HELD_OUT) -> ValidationPoint | None:
        """Return the validation point with the lowest loss on a set."""
        return min(self.validation.get(name, ()), key=lambda p: p.loss, default=None)

    def forgotten(self, name: str) -> float | None:
        """Return the increase of the loss on a named set from step 0 to the end."""
        points = self.validation.get(name, ())
        return points[-1].loss - points[0].loss if len(points) > 1 and points[0].step == 0 else None


@dataclass(frozen=True)
class ArmRecord:
    """One arm with its results, or the error that ended it."""

    name: str
    strategy: str
    strategy_given: str
    strategy_sha256: str
    lr: float
    seed: int
    identity: str
    """Hash of the identity that all arms share."""
    judged: bool
    """Whether it was evaluated, if the recipe asks for that; arms that only try a learning rate are not."""
    figures: Figures | None = None
    error: str | None = None
    """The last output of an arm that failed."""
    format: int = FORMAT

    @property
    def finished(self) -> bool:
        """Whether the arm has results."""
        return self.figures is not None

    @property
    def reason(self) -> str:
        """Why the arm has no results, in one line."""
        return reason(self.error or "")


def record_of(
    arm: Arm, identity: str, *, judged: bool, figures: Figures | None = None, error: str | None = None
) -> ArmRecord:
    """Return an arm's record; pass either `figures` or `error`."""
    candidate = arm.candidate
    return ArmRecord(
        name=arm.name,
        strategy=candidate.label,
        strategy_given=candidate.strategy,
        strategy_sha256=candidate.sha256,
        lr=arm.lr,
        seed=arm.seed,
        identity=identity,
        judged=judged,
        figures=figures,
        error=error,
    )


def write(path: Path, record: ArmRecord) -> None:
    """Write arm.json atomically."""
    files.write_atomic(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> ArmRecord | None:
    """Read arm.json; None if the file does not exist. Raises VlafitError if it is damaged."""
    if not path.is_file():
        return None
    try:
        values = parse_json(plain_text(path))
    except ValueError as error:
        raise VlafitError(f"{path}: not JSON ({error}); remove the arm's folder to run it again") from error
    record = config.build(ArmRecord, values, str(path))
    if record.format != FORMAT:
        raise VlafitError(f"{path}: format {record.format}; this version reads format {FORMAT}")
    return record


# --------------------------------------------------------------------------------------------- from a run


def figures(run: Path) -> Figures:
    """Read the results of a finished run. Raises VlafitError if it is unfinished or files are missing."""
    facts = report.read_facts(run)
    if not facts.finished or facts.plan is None:
        raise VlafitError(f"{run}: the run has not finished")
    spec = facts.recipe.eval
    for name, wanted in ((AFTER, spec.after), (WRONG, spec.controls)):
        if spec.protocol and wanted and name not in facts.evaluations:
            reasons = [line for line in facts.missing if line.startswith(f"Evaluation {name!r}")]
            raise VlafitError(f"{run}: {' '.join(reasons) or f'evaluation {name!r} is missing'}")
    stages = [facts.plan.at(number) for number in range(len(facts.plan.strategy.stages))]
    batch = facts.recipe.train.samples
    speeds = sorted(point.value for point in facts.metrics.get("train/samples_per_s", ()))
    last = run / "checkpoints" / f"step_{facts.steps:06d}"
    return Figures(
        steps=facts.steps,
        samples=facts.steps * batch,
        train_seconds=float(facts.run.get("train_seconds") or 0.0),
        samples_per_s=speeds[len(speeds) // 2] if speeds else 0.0,
        parameters=facts.plan.parameters + facts.plan.adapter_parameters,
        trainable=max(stage.trainable_parameters for stage in stages),
        checkpoint_bytes=_size(last),
        validation=_validation(facts, batch),
        success={name: dict(e.tasks) for name, e in facts.evaluations.items() if name in (AFTER, WRONG)},
        outcomes={
            name: outcomes_of((r.task, r.seed, r.success) for r in e.records)
            for name, e in facts.evaluations.items()
            if name in (AFTER, WRONG)
        },
        memory=_memory(facts.run.get("memory"), str(run / "run.json")),
        merge_error=_number(facts.run.get("merge_error")),
        device=str(facts.run.get("device") or ""),
        threads=int(facts.run.get("threads") or 0),
        versions={k: str(v) for k, v in (facts.run.get("versions") or {}).items()},
        commit=facts.run.get("commit"),
        caveats=facts.caveats,
    )


def outcomes_of(episodes: Iterable[tuple[str, int, bool | None]]) -> dict[str, dict[str, bool | None]]:
    """Return (task, environment seed, success) triples as task -> seed -> success."""
    by_task: dict[str, dict[str, bool | None]] = {}
    for task, seed, success in episodes:
        by_task.setdefault(task, {})[str(seed)] = success
    return by_task


def _validation(facts: Facts, batch: int) -> dict[str, tuple[ValidationPoint, ...]]:
    """Return the validation points of each set: the held-out episodes first, then the named sets."""
    named = {name: f"validation/{name}/" for name in facts.recipe.data.validation_sets}
    by_set = {}
    for name, prefix in {HELD_OUT: "validation/", **named}.items():
        errors = {point.step: point.value for point in facts.metrics.get(f"{prefix}action_error", ())}
        points = facts.metrics.get(f"{prefix}loss", ())
        if points:
            by_set[name] = tuple(
                ValidationPoint(p.step, p.step * batch, p.time_s or 0.0, p.value, errors.get(p.step))
                for p in points
            )
    return by_set


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
