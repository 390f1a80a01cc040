"""What a recipe may not say: found before anything is loaded or written."""

import os
from collections.abc import Iterator
from pathlib import Path

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from vlafit.errors import ConfigError, did_you_mean
from vlafit.recipe import Recipe

AT_LEAST_ONE = ("train.steps", "train.batch_size", "train.accumulate", "train.draws", "train.log_every",
                "train.validation_batches", "eval.every_trials")  # fmt: skip
NOT_NEGATIVE = ("train.seed", "train.validate_every", "train.save_every", "train.keep", "train.threads",
                "data.episodes_per_task", "data.shift_pixels", "data.workers", "optim.warmup_steps",
                "optim.weight_decay", "optim.clip_norm", "train.max_seconds", "eval.every", "eval.workers",
                "eval.videos")  # fmt: skip
BELOW_ONE = ("data.validation", "optim.beta1", "optim.beta2", "optim.ema")
THREADS_PER_CORE = 4  # more makes a process slower, and far more of them end it
NEED_A_PROTOCOL = ("eval.before", "eval.every", "eval.wrong_instruction")


def check(recipe: Recipe, processes: int) -> None:
    """Raise ConfigError for the first field of `recipe` whose value cannot train on so many processes."""
    for problem in _problems(recipe):
        raise ConfigError(problem)
    rows_per_process(recipe.train.batch_size, recipe.train.accumulate, processes)


def rows_per_process(batch_size: int, accumulate: int, processes: int) -> int:
    """Return the rows of one micro-batch of one process. Raises ConfigError where they would differ."""
    size, rest = divmod(batch_size, accumulate * processes)
    if rest or not size:
        near = accumulate * processes * max(1, round(batch_size / (accumulate * processes)))
        raise ConfigError(
            f"train.batch_size {batch_size} is not a multiple of train.accumulate {accumulate} x processes "
            f"{processes}; take {near}"
        )
    return size


def _problems(recipe: Recipe) -> Iterator[str]:
    def value(name: str) -> float:
        section, field = name.split(".")
        return vars(vars(recipe)[section])[field]

    for name in AT_LEAST_ONE:
        if not value(name) >= 1:
            yield f"{name} must be at least 1, is {value(name)}"
    for name in NOT_NEGATIVE:
        if not 0 <= value(name) < float("inf"):
            yield f"{name} must be 0 or more, is {value(name)}"
    for name in BELOW_ONE:
        if not 0 <= value(name) < 1:
            yield f"{name} must be from 0 to below 1, is {value(name)}"
    for name in ("optim.lr", "optim.eps"):
        if not 0 < value(name) < float("inf"):
            yield f"{name} must be above 0, is {value(name)}"
    if not 0 <= recipe.optim.final_lr <= 1:
        yield f"optim.final_lr is a share of the peak, from 0 to 1, is {recipe.optim.final_lr}"
    for name in recipe.data.validation_sets:
        if not name or "/" in name:
            yield f"data.validation_sets: {name!r} cannot be part of a metric's name; take a word"
    if recipe.train.seed >= 2**63:
        yield f"train.seed must be below 2^63, is {recipe.train.seed}"
    most = THREADS_PER_CORE * (os.cpu_count() or 1)
    if recipe.train.threads > most:
        yield f"train.threads {recipe.train.threads} is far above this machine's cores; take at most {most}"
    if recipe.name in ("", ".", "..") or Path(recipe.name).name != recipe.name:
        yield f"name {recipe.name!r} must be one folder name: the run's folder is runs/NAME"
    policy = recipe.policy
    if policy.checkpoint:
        both = {"policy.family": policy.family, "policy.size": policy.size}
        idle = [f"{name} {said!r}" for name, said in both.items() if said]
        if idle:
            yield (
                f'{" and ".join(idle)}: a checkpoint knows its own, so this must be "" beside '
                "policy.checkpoint (policy.config changes single fields)"
            )
    elif policy.fresh:
        yield "policy.fresh names parts of a checkpoint, but policy.checkpoint is empty; leave it out"
    if not recipe.eval.protocol:
        for name in NEED_A_PROTOCOL:
            if value(name):
                yield f"{name} asks for rollouts, but eval.protocol is empty; name one"
    known, installed = [str(one) for one in LoggerType.list()], [str(one) for one in get_available_trackers()]
    for name in recipe.train.trackers:
        if name not in known:
            yield f"train.trackers: accelerate has no tracker {name!r}{did_you_mean(name, known)}"
        if name not in installed:
            yield f"train.trackers: {name} is not installed; install it, or leave the tracker out"
