"""One run, from recipe to report: set up, evaluate before, train, evaluate after, write the page.

Everything a run writes lies in its folder; a run that was stopped, or killed, goes on with `resume=True`.
"""

import logging
import os
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from vlafit import config, files, report, rollout
from vlafit.errors import CodecError, VlafitError, WeightsError
from vlafit.recipe import Recipe
from vlafit.train import checkpointer as state
from vlafit.train import experiment as setup
from vlafit.train import initial_policy as start
from vlafit.train import memory, stages
from vlafit.train import quantised_base as own_base
from vlafit.train import run_folder as folder
from vlafit.train import warnings as notices
from vlafit.train.callbacks import Observer
from vlafit.train.checkpoint_folders import Shelf
from vlafit.train.distributed import barrier
from vlafit.train.preflight import check
from vlafit.train.provenance import describe_machine
from vlafit.train.trainer import Job

__all__ = ["Observer", "RunSummary", "run"]

log = logging.getLogger(__name__)

WHAT = "vlafit train"  # in messages about a folder that is in use
TRACEBACK = "traceback.txt"  # of an error that nobody foresaw, in the run's folder
ONE_DAY = timedelta(days=1)  # other processes wait this long while the main one evaluates


@dataclass(frozen=True)
class RunSummary:
    """What a run came to."""

    folder: Path
    steps: int
    finished: bool  # False when a signal stopped it
    success: dict[str, float]  # share of successes by evaluation name
    report: Path | None
    asked_to_stop: bool = False
    """A signal asked for it, be it in the last step: whoever began the run is to begin no other."""


def run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    command: str = "",
    observer: Observer | None = None,
) -> RunSummary:
    """Carry out `recipe` in the folder `out`. Every process of an `accelerate launch` calls this.

    With `resume`, a run that `out` holds goes on where its newest checkpoint was written, and does not repeat
    rollouts that ended; where there is no run yet, one begins. With `resume_from`, it goes on from the state
    of that step instead, and what was saved after it is removed. Raises a VlafitError for whatever the user
    can mend, another process at work in `out` for one: before anything is written if it can be known then;
    later, the run stays resumable. The traceback of any other error is kept in traceback.txt, too.
    """
    check(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    first = os.environ.get("RANK", "0") == "0"  # the one that writes, and holds the lock for all
    if first:
        files.require_unlocked(out, WHAT)
    folder.look(recipe, out, resume or resume_from is not None)
    with files.exclusive(out, WHAT) if first else nullcontext():
        try:
            return _carry_out(recipe, out, resume_from, command, observer or Observer())
        except VlafitError:
            raise
        except Exception:
            # Without a recipe the folder holds no run, and is to stay empty.
            if first and (out / "recipe.toml").is_file():
                files.write_atomic(out / TRACEBACK, traceback.format_exc())
            raise


def _carry_out(
    recipe: Recipe, out: Path, resume_from: int | None, command: str, observer: Observer
) -> RunSummary:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        cpu=launched > 1 and not torch.cuda.is_available(),  # else accelerate leaves CPU processes unjoined
        log_with=list(recipe.train.trackers) or None,
        project_dir=str(out),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=ONE_DAY)],
    )
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    main = accelerator.is_main_process
    began = time.perf_counter()
    shelf = Shelf(out, recipe.train.keep)
    barrier()  # all have looked before the main process writes
    if main:
        files.require_writable(out)
        shelf.tidy()
    barrier()

    observer.phase("loading")
    meter = memory.MemoryMeter(accelerator.device)
    resumed = shelf.resumable(resume_from)
    experiment = _build(recipe, accelerator, resumed)
    stages.require_reachable(experiment.plan, recipe.train, held_out=any(experiment.data.validation))
    if resumed is not None and resume_from is not None:
        state.read(resumed, experiment.data.fingerprint)  # before anything is given up for it
        barrier()
    if main:
        if resume_from is not None:
            shelf.drop_after(resume_from)
        _try_protocol(experiment)
        record = _begin(experiment, out, accelerator, command, resumed)
    experiment = _with_own_base(experiment, out, main)
    observer.setup(experiment)

    job = Job(experiment, out, accelerator, shelf, observer, meter)
    job.metrics.rewind(resumed and int(resumed.name.removeprefix("step_")))
    if recipe.eval.before:
        job.save_start(resumed is not None)
        job.evaluate("before", 0)
    finished = job.train(resumed)
    if finished:
        late = notices.never_began(job.learner.plan, job.progress.stage.number, job.progress.step)
        if late and main:
            log.warning("%s", late)
            record["notices"] = [*dict.fromkeys([*_texts(record["notices"]), late])]
    if finished and recipe.eval.protocol and recipe.eval.after:
        job.evaluate("after", job.progress.step)
    if finished and recipe.eval.wrong_instruction:
        job.evaluate("wrong_instruction", job.progress.step, wrong_instruction=True)
    page = None
    if main:
        _end(record, out, job, finished, time.perf_counter() - began)
        observer.phase("report")
        page = report.build(out)
    accelerator.end_training()
    return RunSummary(out, job.progress.step, finished, job.success, page, job.asked_to_stop)


def _build(recipe: Recipe, accelerator: Accelerator, resumed: Path | None) -> setup.Experiment:
    """Make what the recipe asks for, with its notices. A checkpoint that is damaged is told with a way on."""
    try:
        made = setup.build(recipe, accelerator.device, resumed)
    except (WeightsError, CodecError) as error:
        if resumed is None:
            raise
        raise type(error)(f"{error}\nIf {resumed} is damaged: {state.way_on(resumed)}") from error
    said = notices.notices(recipe, made.plan, made.data, accelerator.num_processes)
    return replace(made, notices=(*made.notices, *said))


def _texts(values: object) -> list[str]:
    return [str(one) for one in values] if isinstance(values, list) else []


def _try_protocol(experiment: setup.Experiment) -> None:
    """Find out now, not after days of training, whether the protocol can judge this policy."""
    spec = experiment.recipe.eval
    if spec.protocol:
        rollout.preflight(
            spec.protocol,
            experiment.codec.embodiment,
            trials=spec.every_trials if spec.every else 0,
            wrong_instruction=spec.wrong_instruction,
            seeds=experiment.history.seeds,
        )


def _begin(
    experiment: setup.Experiment, out: Path, accelerator: Accelerator, command: str, resumed: Path | None
) -> dict[str, object]:
    """Write what the run is, and return what run.json says."""
    toml = config.dump(experiment.recipe)
    files.write_atomic(out / "recipe.toml", toml)
    files.write_atomic(out / "plan.json", experiment.plan.at(0).to_json())
    accelerator.init_trackers("tensorboard", config={"recipe": toml})
    facts = {
        "command": command,
        "started": _now(),
        "resumed_from": None,
        "load_report": experiment.load_report,
        "notices": list(experiment.notices),
        "base_sha256": experiment.history.base,
        "seeds_known": experiment.data.seeds_known,
        "datasets": [asdict(one) for one in experiment.history.datasets],
        "processes": accelerator.num_processes,
        **describe_machine(accelerator.device),
    }
    return folder.begin_record(out, facts, resumed.name if resumed else None)


def _with_own_base(experiment: setup.Experiment, out: Path, main: bool) -> setup.Experiment:
    """Write the start of a quantised run that lies in no file, and return the experiment on top of it."""
    if not experiment.unrounded:
        return experiment
    if main:
        own_base.write(out, experiment.policy, experiment.codec, experiment.history, experiment.unrounded)
    barrier()
    return replace(experiment, base=own_base.at(out), anew=frozenset(), unrounded={})


def _end(record: dict[str, object], out: Path, job: Job, finished: bool, seconds: float) -> None:
    """Write how the run ended."""
    before, before_it = record.pop("seconds_before", 0.0), record.pop("memory", None)
    facts: dict[str, object] = {
        "ended": _now(),
        "finished": finished,
        "train_seconds": round(job.progress.seconds, 1),
        "steps": job.progress.step,
        "memory": memory.larger(before_it if isinstance(before_it, dict) else None, job.memory),
    }
    if job.learner.ranks is not None:
        facts["ranks"] = job.learner.ranks.ranks()
    if finished and job.learner.plan.adapted:
        last = job.shelf.path(job.progress.step)
        facts["merge_error"] = start.merge_error(last, job.experiment.data, job.device)
    if isinstance(before, int | float):
        facts["seconds"] = round(before + seconds, 1)
    folder.end_record(out, record, facts)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
