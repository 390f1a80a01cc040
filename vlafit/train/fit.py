"""Compare a recipe's forecast with the device's memory before anything is loaded, and settle what is open."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlafit import checkpoints
from vlafit.nn.policy import Policy
from vlafit.policies import build_family
from vlafit.recipe import Recipe
from vlafit.rollout.memory import free_bytes
from vlafit.train.auto_batch import LARGEST, choose_rows, forecasts
from vlafit.train.data import Data
from vlafit.train.distributed import from_main
from vlafit.train.forecast import Forecast, Workload
from vlafit.train.less_memory import changes, require_fit
from vlafit.train.memory_ladder import (
    IGNORE,
    Rung,
    first_that_fits,
    forecaster,
    gb,
    parse_memory,
    room_for,
    rungs,
)
from vlafit.train.optim import states_of
from vlafit.train.settle import EARLIER, field_of, is_automatic, with_field
from vlafit.tuning import load_strategy

log = logging.getLogger(__name__)

OPEN = {
    "recompute": "train.recompute", "states": "optim.states", "micro_batches": "train.accumulate",
    "trained": "train.weights", "in_backward": "optim.in_backward",
}  # fmt: skip
"""Fields of a rung that `train.memory` decides, and those of the recipe."""
LARGE = 200 * 10**6  # bytes of weights


@dataclass(frozen=True)
class Fit:
    """A recipe with its forecast; the forecast is None where nothing was compared."""

    recipe: Recipe
    forecast: Forecast | None = None


def close(recipe: Recipe) -> Recipe:
    """Return the recipe with the defaults of what `train.memory` could have decided."""
    for field in OPEN.values():
        if is_automatic(field_of(recipe, field)):
            recipe = with_field(recipe, field, EARLIER[field])
    return recipe


def device_gb(device: torch.device) -> float | None:
    """Return the memory of a GPU in GB (10^9 bytes); None for a CPU, which has no memory of its own."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory / 1e9


def free_ram_gb(device: torch.device) -> float:
    """Return the free RAM in GB for each process on this machine, as the main process sees it."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return from_main(free_bytes() / processes / 1e9, device)


def is_large(recipe: Recipe) -> bool:
    """Whether the policy has so many weights that a forecast, which takes seconds, is worth it on a CPU."""
    spec = recipe.policy
    if not spec.checkpoint and not spec.family:
        return False  # refused where the policy is built
    if not spec.checkpoint:
        policy = build_family(spec.family, spec.size, spec.config, device="meta")
        return sum(4 * p.numel() for p in policy.parameters()) > LARGE
    path = checkpoints.place(spec.checkpoint).path
    base = checkpoints.read_base(path) if path.is_dir() else None
    if base is None:
        return _bytes_at(path) > LARGE
    below = path / base.checkpoint if base.checkpoint.startswith(".") else Path(base.checkpoint)
    below = Path(spec.base) if spec.base else below
    return not below.exists() or _bytes_at(below) > LARGE  # of the Hub, or missing: looked at later


def _bytes_at(path: Path) -> int:
    every = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in every if one.is_file())


def fit(
    recipe: Recipe,
    policy: Policy,
    data: Data,
    *,
    processes: int,
    gigabytes: float | None,
    on_cpu: bool = False,
) -> Fit:
    """Settle what `train.memory` decides, and require that the run fits it, or a device of `gigabytes`.

    `policy` is on the meta device; `on_cpu` says that the memory is the machine's. An automatic batch is
    chosen, too. Raises ConfigError naming settings that fit where the recipe's do not.
    """
    asked = parse_memory(recipe.train.memory)
    limit = asked if asked is not None else gigabytes
    if limit is None or recipe.train.memory == IGNORE:
        return Fit(close(recipe))
    if recipe.train.batch_size == "auto":
        return _with_batch(recipe, policy, data, processes, limit, on_cpu)
    closed = close(recipe)
    strategy, workload = load_strategy(recipe.strategy), workload_of(closed, policy, data, processes)
    own, workload = _own(closed), replace(workload, on_cpu=on_cpu)
    of = forecaster(policy, strategy, workload)
    own_memory = "the free RAM" if on_cpu else "the GPU"
    where = f"train.memory = {recipe.train.memory!r}" if asked is not None else own_memory
    if asked is not None:
        free = _free(recipe)
        chosen = first_that_fits(rungs(workload, strategy, fixed=own, free=free), of, limit, on_cpu)
        if chosen is not None:
            for name in free:
                closed = with_field(closed, OPEN[name], getattr(chosen, name))
            log.info(
                "train.memory = %s picks %s: forecast %s", recipe.train.memory, chosen.options,
                gb(of(chosen).total),
            )  # fmt: skip
            return Fit(closed, of(chosen))
    require_fit(own, of, changes(policy, strategy, workload, own), limit, where, on_cpu=on_cpu)
    return Fit(closed, of(own))


def _own(closed: Recipe) -> Rung:
    """Return the rung of a recipe without open values."""
    train, optim = closed.train, closed.optim
    trained = "bf16" if train.weights == "bf16" else "fp32"
    return Rung(train.recompute, states_of(optim), train.micro_batches, trained, optim.in_backward is True)


def _free(recipe: Recipe) -> list[str]:
    """Return the fields of a rung that `train.memory` may decide."""
    return [name for name, field in OPEN.items() if is_automatic(field_of(recipe, field))]


def _slots(recipe: Recipe, data: Data) -> set[str]:
    """Return the camera slots that the embodiments of the data fill, by name."""
    slots = set()
    for name, part in data.parts().items():
        cameras = part.cards[0].embodiment.cameras
        taken = {source: slot for slot, source in recipe.adapt.of(name).cameras.items()}
        slots |= {taken.get(camera.name, camera.name) for camera in cameras}
    return slots


def _with_batch(
    recipe: Recipe, policy: Policy, data: Data, processes: int, limit: float, on_cpu: bool
) -> Fit:
    """Choose the batch, and what `train.memory` decides, for `limit` GB."""
    free_ram = on_cpu and not recipe.train.memory
    where = recipe.train.memory or ("the free RAM" if free_ram else "the GPU")
    room = room_for(limit, on_cpu)
    closed = close(recipe)
    strategy, workload = load_strategy(recipe.strategy), workload_of(closed, policy, data, processes)
    own, free, workload = _own(closed), _free(recipe), replace(workload, on_cpu=on_cpu)
    if on_cpu and own.states == "cpu":  # where they would be in any case
        own, workload = replace(own, states="fp32"), replace(workload, states="fp32")
    fixed = [name for name in free if name != "micro_batches"]
    ladder = rungs(replace(workload, rows=1), strategy, fixed=own, free=fixed)
    most = LARGEST // (processes * own.micro_batches)
    of_rows = forecasts(policy, strategy, workload)
    chosen = choose_rows(of_rows, ladder, room, most)
    if chosen is None:
        where = f"{where} even with train.batch_size = {processes * own.micro_batches}"
        least = replace(workload, rows=own.micro_batches)
        of = forecaster(policy, strategy, least)
        require_fit(own, of, changes(policy, strategy, least, own), limit, where, on_cpu=on_cpu)
        raise AssertionError("choose_rows and require_fit disagree")
    rung, rows = chosen
    made = of_rows(rung, rows)
    for name in free:
        closed = with_field(closed, OPEN[name], getattr(rung, name))
    size = rows * rung.micro_batches * processes
    log.info(
        "train.batch_size = auto picks %d: forecast %s of %.1f GB (%s)%s", size, gb(made.total), limit, where,
        "" if rows < most else f", the most that auto picks is {LARGEST}",
    )  # fmt: skip
    return Fit(with_field(closed, "train.batch_size", size), made)


def workload_of(recipe: Recipe, policy: Policy, data: Data, processes: int) -> Workload:
    """Return the recipe's workload on one of so many processes, with every camera and the longest prompt."""
    return workload(recipe, max(1, len(_slots(recipe, data))), policy.needs().max_tokens, processes)


def workload(recipe: Recipe, cameras: int, tokens: int, processes: int = 1) -> Workload:
    """Return the recipe's workload on one of so many processes, for samples of that size."""
    train = recipe.train
    return Workload(
        rows=1 if train.batch_size == "auto" else max(1, train.batch_size // processes),
        micro_batches=train.micro_batches,
        draws=train.draws,
        cameras=cameras,
        tokens=tokens,
        precision="bf16" if train.precision == "bf16" else "fp32",
        frozen="bf16" if train.frozen == "bf16" else "fp32",
        recompute=train.recompute,
        trained="bf16" if train.weights == "bf16" else "fp32",
        states=states_of(recipe.optim),
        in_backward=recipe.optim.in_backward is True,
        processes=processes,
        ema=recipe.optim.ema > 0,
        shards=processes // (train.replicas or 1) if train.shards else 1,
        shards_weights=train.sharding == "full",
    )
