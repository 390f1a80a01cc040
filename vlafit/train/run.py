"""Run a recipe: load, evaluate, train, evaluate again, write the report.

A run only writes into its own folder; a run that was stopped or killed continues with `resume=True`.
"""

import logging
import os
import socket
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from vlafit import config, files, locks, report
from vlafit.checkpoints import model_card
from vlafit.datasets.bench import cores
from vlafit.errors import VlafitError, command_line
from vlafit.recipe import Recipe
from vlafit.report.card_results import results_of
from vlafit.score import InvalidAnswers
from vlafit.train import (
    data_files,
    dataloader,
    extension,
    held_out,
    launch,
    memory,
    processes,
    quantised_base,
    stages,
    trackers,
)
from vlafit.train.callbacks import Callbacks
from vlafit.train.checkpointer import CheckpointManager
from vlafit.train.context import RunContext
from vlafit.train.data import Data
from vlafit.train.distributed import barrier
from vlafit.train.evaluator import Evaluator
from vlafit.train.experiment import Experiment
from vlafit.train.feature_cache import require_cache
from vlafit.train.initial_policy import merge_error
from vlafit.train.memory_ladder import parse_memory
from vlafit.train.metrics import Metrics
from vlafit.train.preflight import check, never_began
from vlafit.train.prepare import (
    build_with_warnings,
    identity,
    settle_memory,
    with_extension,
    with_protocol,
    with_settings,
)
from vlafit.train.run_folder import (
    describe_machine,
    end_record,
    new_record,
    read_recipe,
    require_usable,
    write_record,
)
from vlafit.train.settle import Settled, allow_tf32, has_bf16, settle
from vlafit.train.trainer import RunStatus, Trainer

__all__ = ["Callbacks", "RunStatus", "RunSummary", "run"]

log = logging.getLogger(__name__)

LOCKED_BY = "vlafit train"  # in messages about a folder that is in use
TRACEBACK = "traceback.txt"  # of an unexpected error, in the run's folder
ONE_DAY = timedelta(days=1)  # other processes wait this long while the main process evaluates


@dataclass(frozen=True)
class RunSummary:
    """The result of a run."""

    folder: Path
    steps: int
    status: RunStatus
    success: dict[str, float]
    """Share of successes by evaluation name."""
    report: Path | None
    held_out: Mapping[str, str] = field(default_factory=dict)
    """For each dataset: what its held-out episodes show, without a simulator."""
    invalid: Mapping[str, InvalidAnswers] = field(default_factory=dict)
    """Answers that were no chunk of actions, by evaluation name; only of policies that write tokens."""

    @property
    def finished(self) -> bool:
        """False if a signal stopped the run before its last step."""
        return self.status.finished

    @property
    def signalled(self) -> bool:
        """SIGINT/SIGTERM was received; callers should not start another run."""
        return self.status.signalled


def run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    command: str = "",
    callbacks: Callbacks | None = None,
) -> RunSummary:
    """Run `recipe` in the folder `out`. Every process of an `accelerate launch` calls this.

    With `resume`, the run in `out` continues from its newest checkpoint, without repeating finished rollouts;
    if there is no run yet, one begins. With `resume_from`, it continues from that step, and later checkpoints
    are removed. Raises a VlafitError for whatever the user can fix, such as another process using `out`:
    before anything is written if possible; otherwise the run can be resumed. The traceback of any other error
    is also written to traceback.txt.
    """
    processes.require_launched()
    saved = read_recipe(out) if resume or resume_from is not None else None
    settled = _settle(recipe, saved)
    recipe = settled.recipe
    check(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    first = os.environ.get("RANK", "0") == "0"  # the main process writes, and holds the lock for all
    if first:
        locks.require_unlocked(out, LOCKED_BY)
    settled = replace(settled, recipe=require_usable(recipe, out, saved))
    if first:
        for sentence in settled.sentences:
            log.info("%s", sentence)
    with locks.exclusive(out, LOCKED_BY) if first else nullcontext():
        try:
            return _run(settled, out, saved, resume_from, command, callbacks or Callbacks())
        except VlafitError:
            raise
        except Exception:
            # Without recipe.toml no run has begun, and the folder must stay empty.
            if first and (out / "recipe.toml").is_file():
                files.write_atomic(out / TRACEBACK, traceback.format_exc())
            raise


def _settle(recipe: Recipe, before: Recipe | None) -> Settled:
    """Decide the recipe's automatic values, for a run that is resumed as it began with `before`."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    device = torch.device("cpu" if on_cpu or not torch.cuda.is_available() else "cuda")
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return settle(
        recipe,
        launch.read(os.environ),
        bf16=has_bf16(device),
        workers=dataloader.workers_for(device, cores(), beside, dataloader.shared_memory()),
        saved=before,
        open_fields=before is None and parse_memory(recipe.train.memory) is not None,
    )


def _run(
    settled: Settled,
    out: Path,
    saved: Recipe | None,
    resume_from: int | None,
    command: str,
    callbacks: Callbacks,
) -> RunSummary:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    store, rank = processes.connect(), int(os.environ.get("RANK", "0"))
    if store is not None:
        elsewhere = processes.require_one_folder(out, store, rank, launched, socket.gethostname())
        if elsewhere and rank == 0:
            log.warning("%s", elsewhere)
    with launch.hidden_from_accelerate():
        accelerator = Accelerator(
            mixed_precision="no",  # the loop computes in the recipe's precision
            cpu=launched > 1 and not torch.cuda.is_available(),  # else accelerate connects no CPU processes
            log_with=trackers.trackers(settled.recipe.train.trackers, out) or None,
            project_dir=str(out),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=ONE_DAY)],
        )
    launch.require_device(accelerator.device.type)
    del store
    with processes.group_kept_longest(), processes.together():
        return _train(settled, out, saved, accelerator, resume_from, command, callbacks)


def _train(
    settled: Settled,
    out: Path,
    saved: Recipe | None,
    accelerator: Accelerator,
    resume_from: int | None,
    command: str,
    callbacks: Callbacks,
) -> RunSummary:
    recipe = settled.recipe
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    allow_tf32(accelerator.device, recipe.train.precision)
    main = accelerator.is_main_process
    began = time.perf_counter()
    manager = _open_folder(out, recipe.train.keep, main)

    callbacks.phase("loading")
    meter = memory.MemoryMeter(accelerator.device)
    resumed = manager.resumable(resume_from)
    recipe, data = settle_memory(recipe, accelerator, resumed)
    experiment = with_settings(build_with_warnings(recipe, accelerator, resumed, data), settled)
    data_facts = data_files.facts(experiment.data)
    processes.require_equal(identity(experiment, data_facts, resumed), accelerator.device)
    if resumed is not None:
        changed = data_files.require_same_readings(out, data_files.readings(experiment.data))
        changed += data_files.changes(out, data_facts)
        experiment = replace(experiment, warnings=(*experiment.warnings, *changed))
    stages.require_reachable(experiment.plan, recipe.train, held_out=any(experiment.data.validation))
    cached = require_cache(experiment, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if cached:  # a line that the user sees before the cache is filled
        experiment = replace(experiment, warnings=(*experiment.warnings, cached))
    if main:
        if cached:
            log.info("%s", cached)
        experiment = with_protocol(with_extension(experiment, saved))
    metrics = Metrics(out, accelerator)
    trainer, record = None, {}
    if resumed is not None:  # all that can refuse the run comes before anything is written
        trainer = _trainer(
            RunContext(experiment, out, accelerator, manager, metrics, callbacks, meter), resumed
        )
    if main:
        record = new_record(out, _facts(experiment, accelerator, command, data_facts), resumed)
    barrier()
    if main:
        if resume_from is not None:
            manager.drop_after(resume_from)
        _begin(experiment, out, accelerator, saved, record)
    experiment = _with_quantised_base(experiment, out, main)
    if main and experiment.saved:
        log.info("%s", experiment.saved)
    callbacks.setup(experiment)

    step = resumed and int(resumed.name.removeprefix("step_"))
    goes_on = step is not None and step < recipe.train.steps and not recipe.train.max_seconds
    metrics.rewind(step, recipe.train.log_every, goes_on)
    if trainer is None:
        context = RunContext(experiment, out, accelerator, manager, metrics, callbacks, meter)
        evaluator = Evaluator(context)
    else:
        context, evaluator = trainer.context, trainer.evaluator
    if recipe.eval.before:
        evaluator.before_training()
    trainer = trainer or Trainer(context, evaluator, None)
    status = trainer.train()
    if status.finished:
        if main:
            _warn_of_skipped_stages(record, trainer)
        evaluator.after_training(trainer.state.progress.step)
    page, verdicts = None, {}
    if main:
        _end(record, trainer, time.perf_counter() - began)
        if status.finished and held_out.wanted(context):
            verdicts = held_out.evaluate(context, trainer.state.progress.step)
        if status.finished:
            folder = manager.path(trainer.state.progress.step)
            model_card.refresh(folder, results_of(folder))
        if recipe.train.report:
            callbacks.phase("report")
            page = _report(out, experiment.data)
    accelerator.end_training()
    return RunSummary(
        out, trainer.state.progress.step, status, evaluator.success, page, verdicts, evaluator.invalid
    )


def _trainer(context: RunContext, resumed: Path) -> Trainer:
    """Return the trainer of a resumed run. Writes nothing; raises TrainingError if it cannot be resumed."""
    evaluator = Evaluator(context)
    if context.recipe.eval.before:
        evaluator.require_start()
    return Trainer(context, evaluator, resumed)


def _open_folder(out: Path, keep: int, main: bool) -> CheckpointManager:
    """Prepare the run's folder, once every process has checked it."""
    manager = CheckpointManager(out, keep)
    barrier()
    if main:
        files.require_writable(out)
        manager.tidy()
    barrier()
    return manager


def _report(out: Path, data: Data) -> Path | None:
    """Write what the report shows of the training data, and the report.

    Whatever is wrong with it, the run is finished, so an error is a warning.
    """
    from vlafit.report import training_data  # matplotlib, as `report.build` does

    try:
        training_data.write(out, list(zip(data.stores, data.training, data.validation, strict=True)))
        return report.build(out)
    except Exception as error:  # of pictures, fonts, files that others damaged
        log.warning("the report could not be written: %r. Once fixed: %s", error, command_line("report", out))
        return None


def _warn_of_skipped_stages(record: dict[str, object], trainer: Trainer) -> None:
    progress = trainer.state.progress
    warning = never_began(trainer.train_state.plan, progress.stage.number, progress.step)
    if warning:
        log.warning("%s", warning)
        record["notices"] = [*dict.fromkeys([*_texts(record["notices"]), warning])]


def _texts(values: object) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def _facts(
    experiment: Experiment, accelerator: Accelerator, command: str, data_facts: dict[str, dict[str, int]]
) -> dict[str, object]:
    """Return what run.json says of this session."""
    return {
        "command": command,
        "started": _now(),
        "resumed_from": None,
        "load_report": experiment.load_report,
        "notices": list(experiment.warnings),
        "base_sha256": experiment.history.base,
        "seeds_known": experiment.data.seeds_known,
        "data_files": data_facts,
        "data_read": data_files.readings(experiment.data),
        "left_out": experiment.data.left_out(),
        "datasets": [asdict(dataset) for dataset in experiment.history.datasets],
        "processes": accelerator.num_processes,
        **describe_machine(accelerator.device),
    }


def _begin(
    experiment: Experiment,
    out: Path,
    accelerator: Accelerator,
    saved: Recipe | None,
    record: Mapping[str, object],
) -> None:
    """Write recipe.toml, plan.json and run.json (`record`); keep the last evaluations of an extended run."""
    text = extension.notice(saved, experiment.recipe) if saved is not None else ""
    if saved is not None and text:
        extension.keep_evaluations(out, saved.train.steps)
        log.info("%s; %s keeps the new recipe", text, out / "recipe.toml")
    toml, recipe = config.dump(experiment.recipe), out / "recipe.toml"
    if saved is None:
        files.write_atomic(recipe, toml)  # first, because only it says that these are files of a run
    try:
        trackers.begin(accelerator, out, toml)
    except VlafitError:  # then the folder is as it was
        if saved is None:
            recipe.unlink()
        raise
    if saved is not None:
        files.write_atomic(recipe, toml)
    files.write_atomic(out / "plan.json", experiment.plan.at(0).to_json())
    if experiment.agreement is not None:
        experiment.agreement.write(out)
    write_record(out, record)


def _with_quantised_base(experiment: Experiment, out: Path, main: bool) -> Experiment:
    """Save the full-precision weights of a quantised run, if no checkpoint holds them, as its base."""
    if not experiment.unquantised:
        return experiment
    if main:
        quantised_base.write(
            out, experiment.policy, experiment.codecs, experiment.history, experiment.unquantised
        )
    barrier()
    return replace(experiment, base=quantised_base.at(out), changed=frozenset(), unquantised={})


def _end(record: dict[str, object], trainer: Trainer, seconds: float) -> None:
    """Write the end of the run to run.json; `seconds` is the time of this session."""
    context, state, train_state = trainer.context, trainer.state, trainer.train_state
    seconds_before, memory_before = record.pop("seconds_before", 0.0), record.pop("memory", None)
    facts: dict[str, object] = {
        "ended": _now(),
        "finished": state.status.finished,
        "train_seconds": round(state.progress.seconds, 1),
        "steps": state.progress.step,
        "memory": memory.larger(memory_before if isinstance(memory_before, dict) else None, state.memory),
    }
    if train_state.ranks is not None:
        facts["ranks"] = train_state.ranks.ranks()
    if state.status.finished and train_state.plan.adapted:
        last = context.manager.path(state.progress.step)
        train_state.release()  # the checkpoint is loaded in its place
        bf16 = context.recipe.train.precision == "bf16"
        facts["merge_error"] = merge_error(last, context.experiment.data, context.device, bf16=bf16)
    if isinstance(seconds_before, int | float):
        facts["seconds"] = round(seconds_before + seconds, 1)
    end_record(context.out, record, facts)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
