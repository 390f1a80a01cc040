"""Run a recipe: load, evaluate, train, evaluate again, write the report.

A run only writes into its own folder; a run that was stopped or killed continues with `resume=True`.
"""

import logging
import os
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

from vlafit import config, files, report, rollout
from vlafit.agreement import EVALUATION, protocol_items
from vlafit.checkpoints import model_card
from vlafit.entry_points import outside_hashes
from vlafit.errors import CodecError, VlafitError, WeightsError
from vlafit.recipe import Recipe
from vlafit.train import (
    checkpointer,
    data_files,
    extension,
    held_out,
    launch,
    memory,
    processes,
    quantised_base,
    stages,
)
from vlafit.train.callbacks import Callbacks
from vlafit.train.checkpointer import CheckpointManager
from vlafit.train.context import RunContext
from vlafit.train.data import Data, open_data
from vlafit.train.distributed import barrier
from vlafit.train.evaluator import Evaluator
from vlafit.train.experiment import Experiment, build
from vlafit.train.fit import close, device_gb, fit, free_ram_gb
from vlafit.train.initial_policy import merge_error
from vlafit.train.memory_ladder import IGNORE, parse_memory
from vlafit.train.metrics import Metrics
from vlafit.train.preflight import check, meta_policy, never_began, resumed_policy, run_warnings
from vlafit.train.run_folder import (
    describe_machine,
    end_record,
    flat,
    new_record,
    read_recipe,
    require_usable,
    write_record,
)
from vlafit.train.settle import Settled, has_bf16, settle
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
        files.require_unlocked(out, LOCKED_BY)
    settled = replace(settled, recipe=require_usable(recipe, out, saved))
    if first:
        for sentence in settled.sentences:
            log.info("%s", sentence)
    with files.exclusive(out, LOCKED_BY) if first else nullcontext():
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
    return settle(
        recipe,
        launch.read(os.environ),
        bf16=has_bf16(device),
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
    store = processes.connect()
    with launch.hidden_from_accelerate():
        accelerator = Accelerator(
            mixed_precision="no",  # the loop computes in the recipe's precision
            cpu=launched > 1 and not torch.cuda.is_available(),  # else accelerate connects no CPU processes
            log_with=list(settled.recipe.train.trackers) or None,
            project_dir=str(out),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=ONE_DAY)],
        )
    del store
    with processes.together():
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
    if accelerator.device.type == "cuda" and recipe.train.precision == "bf16":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    main = accelerator.is_main_process
    began = time.perf_counter()
    manager = _open_folder(out, recipe.train.keep, main)

    callbacks.phase("loading")
    meter = memory.MemoryMeter(accelerator.device)
    resumed = manager.resumable(resume_from)
    recipe, data = _fit(recipe, accelerator, resumed)
    experiment = _with_settings(_build(recipe, accelerator, resumed, data), settled)
    data_facts = data_files.facts(experiment.data)
    processes.require_equal(_identity(experiment, data_facts), accelerator.device)
    if resumed is not None:
        data_files.require_same_readings(out, data_files.readings(experiment.data))
        rewritten = data_files.changes(out, data_facts)
        experiment = replace(experiment, warnings=(*experiment.warnings, *rewritten))
    stages.require_reachable(experiment.plan, recipe.train, held_out=any(experiment.data.validation))
    if main:
        experiment = _with_protocol(_extended(experiment, saved))
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

    metrics.rewind(resumed and int(resumed.name.removeprefix("step_")))
    context = RunContext(experiment, out, accelerator, manager, metrics, callbacks, meter)
    evaluator = trainer.evaluator if trainer is not None else Evaluator(context)
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
            model_card.refresh(manager.path(trainer.state.progress.step))
        if recipe.train.report:
            callbacks.phase("report")
            page = _report(out)
    accelerator.end_training()
    return RunSummary(out, trainer.state.progress.step, status, evaluator.success, page, verdicts)


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


def _report(out: Path) -> Path | None:
    """Write the report. Whatever is wrong with it, the run is finished, so an error is a warning."""
    try:
        return report.build(out)
    except Exception as error:  # of pictures, fonts, files that others damaged
        log.warning("the report could not be written: %r. Once fixed: vlafit report %s", error, out)
        return None


def _identity(experiment: Experiment, data_facts: Mapping[str, Mapping[str, int]]) -> dict[str, object]:
    """Return what must be equal on all processes, or they would train apart.

    `data_facts` are those of the data's files; copies of them on two machines have different times.
    """
    return {
        **dict(flat(experiment.recipe)),
        "data": experiment.data.fingerprint,
        "frames": {name: (facts["files"], facts["bytes"]) for name, facts in data_facts.items()},
        "cards": data_files.readings(experiment.data),
        "agreement": experiment.agreement and experiment.agreement.to_json(),
        "code": processes.code_hash(),
        "modules": outside_hashes(),
        "torch": torch.__version__,
        "plan": experiment.plan.to_json(),
        "load report": experiment.load_report,
    }


def _warn_of_skipped_stages(record: dict[str, object], trainer: Trainer) -> None:
    progress = trainer.state.progress
    warning = never_began(trainer.train_state.plan, progress.stage.number, progress.step)
    if warning:
        log.warning("%s", warning)
        record["notices"] = [*dict.fromkeys([*_texts(record["notices"]), warning])]


def _build(recipe: Recipe, accelerator: Accelerator, resumed: Path | None, data: Data | None) -> Experiment:
    """Build the experiment with its warnings. Errors about damaged checkpoints say how to recover."""
    try:
        experiment = build(recipe, accelerator.device, resumed, data)
    except (WeightsError, CodecError) as error:
        if resumed is None:
            raise
        remedy = checkpointer.how_to_resume(resumed)
        raise type(error)(f"{error}\nIf {resumed} is damaged: {remedy}") from error
    warnings = run_warnings(recipe, experiment.plan, experiment.data, accelerator.num_processes)
    return replace(experiment, warnings=(*experiment.warnings, *warnings))


def _fit(recipe: Recipe, accelerator: Accelerator, resumed: Path | None) -> tuple[Recipe, Data | None]:
    """Settle what `train.memory` decides, and refuse a run that does not fit, before anything is loaded.

    Returns the data, too, where the forecast needed it.
    """
    gigabytes = device_gb(accelerator.device)
    if recipe.train.batch_size == "auto" and gigabytes is None:
        gigabytes = free_ram_gb(accelerator.device)
    if recipe.train.memory == IGNORE or (gigabytes is None and not recipe.train.memory):
        return close(recipe), None
    data = open_data(recipe.data, recipe.train.seed)
    policy = meta_policy(recipe, data) if resumed is None else resumed_policy(recipe, resumed)
    fitting = fit(
        recipe,
        policy,
        data,
        processes=accelerator.num_processes,
        gigabytes=gigabytes,
        on_cpu=accelerator.device.type == "cpu",
    )
    return fitting.recipe, data


def _with_settings(experiment: Experiment, settled: Settled) -> Experiment:
    """Add what recipe and launcher said to the agreement, and what has no effect to the warnings."""
    agreement = experiment.agreement
    if agreement is not None:
        known = {item.name for item in agreement.items}  # a resumed run's has them already
        items = [setting.item() for setting in settled.settings if setting.field not in known]
        agreement = agreement.with_items(items)
    return replace(experiment, agreement=agreement, warnings=(*experiment.warnings, *settled.notes))


def _texts(values: object) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def _with_protocol(experiment: Experiment) -> Experiment:
    """Check before training that the evaluation protocol fits this policy, and add it to the agreement."""
    spec, agreement = experiment.recipe.eval, experiment.agreement
    if not spec.protocol:
        return experiment
    trained = experiment.codecs.choose(experiment.evaluated, where="the run", option="eval.embodiment")
    robot = rollout.preflight(
        spec.protocol,
        trained.embodiment,
        trials=spec.every_trials if spec.every else 0,
        wrong_instruction=spec.wrong_instruction,
        seeds=experiment.history.seeds,
    )
    if agreement is None or any(item.name.startswith(EVALUATION) for item in agreement.items):
        return experiment
    items = protocol_items(trained.embodiment, robot, spec.protocol)
    return replace(experiment, agreement=agreement.with_items(items))


def _extended(experiment: Experiment, saved: Recipe | None) -> Experiment:
    """Add a warning if the run of the recipe `saved` has fewer steps."""
    text = extension.notice(saved, experiment.recipe) if saved is not None else ""
    return replace(experiment, warnings=(*experiment.warnings, text)) if text else experiment


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
    toml = config.dump(experiment.recipe)
    files.write_atomic(out / "recipe.toml", toml)
    files.write_atomic(out / "plan.json", experiment.plan.at(0).to_json())
    if experiment.agreement is not None:
        experiment.agreement.write(out)
    accelerator.init_trackers("tensorboard", config={"recipe": toml})
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
        facts["merge_error"] = merge_error(last, context.experiment.data, context.device)
    if isinstance(seconds_before, int | float):
        facts["seconds"] = round(seconds_before + seconds, 1)
    end_record(context.out, record, facts)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
