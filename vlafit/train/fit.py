"""Compare a recipe's forecast with the device's memory before anything is loaded, and settle what is open."""

import logging
from dataclasses import dataclass

import torch

from vlafit.nn.policy import Policy
from vlafit.recipe import Recipe
from vlafit.train.data import Data
from vlafit.train.forecast import Forecast, Workload
from vlafit.train.memory_ladder import (
    IGNORE,
    Rung,
    first_that_fits,
    forecaster,
    gb,
    parse_memory,
    require_fit,
    rungs,
)
from vlafit.train.settle import AUTOMATIC, EARLIER, field_of, with_field
from vlafit.tuning import load_strategy

log = logging.getLogger(__name__)

OPEN = {"recompute": "train.recompute", "states": "optim.states", "micro_batches": "train.accumulate"}


@dataclass(frozen=True)
class Fit:
    """A recipe with its forecast; the forecast is None where nothing was compared."""

    recipe: Recipe
    forecast: Forecast | None = None


def close(recipe: Recipe) -> Recipe:
    """Return the recipe with the defaults of what `train.memory` could have decided."""
    for field in OPEN.values():
        if field_of(recipe, field) in AUTOMATIC:
            recipe = with_field(recipe, field, EARLIER[field])
    return recipe


def device_gb(device: torch.device) -> float | None:
    """Return the memory of a GPU in GB (10^9 bytes); None for a CPU, which has no memory of its own."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory / 1e9


def fit(recipe: Recipe, policy: Policy, data: Data, *, processes: int, gigabytes: float | None) -> Fit:
    """Settle what `train.memory` decides, and require that the run fits it, or a device of `gigabytes`.

    `policy` is on the meta device. Raises ConfigError naming settings that fit where the recipe's do not.
    """
    asked = parse_memory(recipe.train.memory)
    limit = asked if asked is not None else gigabytes
    if limit is None or recipe.train.memory == IGNORE:
        return Fit(close(recipe))
    closed = close(recipe)
    workload = workload_of(closed, policy, data, processes)
    own = Rung(closed.train.recompute, closed.optim.states, closed.train.micro_batches)
    of = forecaster(policy, load_strategy(recipe.strategy), workload)
    where = f"train.memory = {recipe.train.memory!r}" if asked is not None else "the GPU"
    if asked is not None:
        free = [name for name, field in OPEN.items() if field_of(recipe, field) in AUTOMATIC]
        chosen = first_that_fits(rungs(workload.rows, fixed=own, free=free), of, limit)
        if chosen is not None:
            for name in free:
                closed = with_field(closed, OPEN[name], getattr(chosen, name))
            log.info(
                "train.memory = %s picks %s: forecast %s", recipe.train.memory, chosen.options,
                gb(of(chosen).total),
            )  # fmt: skip
            return Fit(closed, of(chosen))
    every = rungs(workload.rows)
    if workload.shards > 1:
        every = [rung for rung in every if rung.states == "fp32"]  # 8-bit moments cannot be sharded
    require_fit(own, every, of, limit, where)
    return Fit(closed, of(own))


def _slots(recipe: Recipe, data: Data) -> set[str]:
    """Return the camera slots that the embodiments of the data fill, by name."""
    slots = set()
    for name, part in data.parts().items():
        cameras = part.cards[0].embodiment.cameras
        taken = {source: slot for slot, source in recipe.adapt.of(name).cameras.items()}
        slots |= {taken.get(camera.name, camera.name) for camera in cameras}
    return slots


def workload_of(recipe: Recipe, policy: Policy, data: Data, processes: int) -> Workload:
    """Return the recipe's workload on one of so many processes, with every camera and the longest prompt."""
    train = recipe.train
    return Workload(
        rows=max(1, train.batch_size // processes),
        micro_batches=train.micro_batches,
        draws=train.draws,
        cameras=max(1, len(_slots(recipe, data))),
        tokens=policy.needs().max_tokens,
        precision="bf16" if train.precision == "bf16" else "fp32",
        frozen="bf16" if train.frozen == "bf16" else "fp32",
        recompute=train.recompute,
        states="8bit" if recipe.optim.states == "8bit" else "fp32",
        ema=recipe.optim.ema > 0,
        shards=processes if train.shards else 1,
        shards_weights=train.sharding == "full",
    )
