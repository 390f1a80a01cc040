"""Measure training steps of the product's own loop: samples/s, memory against its forecast, FLOPs, MFU.

    python -m benchmarks.train --sizes pi0 --strategies full expert lora --shapes padded libero --batch 8 16
    python -m benchmarks.train --sizes pi0-tiny --device cpu --steps 3      # checks the script itself

Run it in the repository's root. Each row is measured in a fresh process: a policy with random weights, to
which the strategy is applied as `vlafit train` does (trained weights in fp32, frozen ones and compute in bf16
on a GPU; its optimiser, clipping, checks, recompute, EMA), and `vlafit.train.loop.train` on batches of random
numbers in pinned memory of the host. Loading, augmenting and encoding samples is not measured.

--shapes    padded: three cameras and the longest prompt. libero: the third camera is missing in every row,
            and a third of the prompt is real (16 of 48 tokens), which the loop's trimming makes use of.
            mixed: every second row has one camera and a third of the prompt, the others are whole; with --set
            train.packing=none they are padded.
--set       any field of a recipe, such as train.draws=4 (train.memory, which picks fields, is not asked).
--copies    where the host's batches lie: pinned, as the product's do, whose copies to the GPU need no wait.
--limit     gigabytes that training may hold on the GPU: whether a step runs on a smaller card.
samples/s   of the median step, after the warm-up; low and high are those of the slowest and fastest step.
peak        allocated and reserved on the GPU since training began (CPU: the resident set), in 10^9 bytes.
forecast    that of `vlafit inspect` and `vlafit train`, without their reserve; error = forecast / peak - 1.
tflop       counted for a sample with attention, without what is recomputed; mfu is the share of the peak.
--profile   one more step under torch.profiler: kernels, launches, time in which the GPU was busy, attention
            kernels of the flash (without a mask) and of the masked kind, and the 25 operations that take
            longest, in a text file beside --out for each row.
fp32_product_error  relative, of a product of fp32 matrices as the step computes it: near 1e-7 in fp32, 1e-4
            in TF32. varlen is 1 where packed rows attend by flash attention over rows of any length.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
import tomllib
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows
from benchmarks.rows import Row
from vlafit import config
from vlafit.nn.batch import Batch
from vlafit.nn.policy import Needs, Policy
from vlafit.nn.rng import Keys
from vlafit.policies import build_family
from vlafit.recipe import Recipe
from vlafit.train.batch_shape import BatchShape
from vlafit.train.dataloader import rows_per_process
from vlafit.train.fit import workload
from vlafit.train.flops import FlopCounter, peak_flops
from vlafit.train.forecast import Forecast, forecast
from vlafit.train.frozen import FrozenWeights
from vlafit.train.launch_plan import LaunchPlan
from vlafit.train.loop import StepResult, train
from vlafit.train.memory import MemoryMeter
from vlafit.train.packer import packer_of
from vlafit.train.settle import allow_tf32, has_bf16, settle
from vlafit.train.stages import Place
from vlafit.train.train_state import TrainState
from vlafit.tuning import Strategy, apply, load_strategy, preview
from vlafit.tuning.inject import compute_adapters_in_bf16

CAMERAS = 3
LIBERO_DIMENSIONS = 7
PRODUCT = 512  # width of the matrices by which a product's precision is seen
HELD_BATCHES = 2  # prepared before training, and used in turns
COLUMNS = (
    "size", "strategy", "shape", "batch", "recompute", "states", "samples_per_s", "peak_gb", "reserved_gb",
    "forecast_gb", "forecast_error", "tflop", "mfu", "kernels", "device_busy_ms", "step_ms",
)  # fmt: skip


def main() -> int:
    options = parser().parse_args()
    if options.one:
        return rows.print_values(measure(options.one))
    measured = list(measure_all(points_of(options), options))
    print(rows.table(measured, [*COLUMNS, "set"] if options.set else COLUMNS))
    return 1 if any("error" in row for row in measured) else 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pi0"], choices=list(rows.sizes()))
    parser.add_argument("--strategies", nargs="+", default=["full", "expert", "lora"])
    parser.add_argument(
        "--shapes", nargs="+", default=["padded", "libero"], choices=("padded", "libero", "mixed")
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="samples of a step; a row for each")
    parser.add_argument("--recompute", nargs="+", default=["none"], choices=("none", "selective", "full"))
    parser.add_argument("--states", nargs="+", default=["fp32"], choices=("fp32", "8bit"))
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--ema", type=float, default=0.0, help="decay of the EMA [0: none]")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--copies", nargs="+", default=["pinned"], choices=("pinned", "pageable"))
    parser.add_argument("--limit", type=float, default=0.0, metavar="GB")
    parser.add_argument("--steps", type=int, default=10, help="measured steps [10]")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them [4]")
    rows.add_options(parser)
    return parser


def points_of(options: argparse.Namespace) -> list[Row]:
    """Return what is to be measured, in the order of the options."""
    every = itertools.product(
        options.sizes, options.strategies, options.shapes, options.recompute, options.states, options.copies,
        options.batch,
    )  # fmt: skip
    shared = {
        "micro_batches": options.micro_batches, "ema": options.ema, "set": options.set,
        "limit": options.limit, "steps": options.steps, "warm_up": options.warm_up, "device": options.device,
        "commit": options.commit, "profile": "",
    }  # fmt: skip
    points = []
    for size, strategy, shape, recompute, states, copies, batch in every:
        point = {"size": size, "strategy": strategy, "shape": shape, "batch": batch, "recompute": recompute,
                 "states": states, "copies": copies, **shared}  # fmt: skip
        if options.profile:
            beside = options.out or Path("train.jsonl")
            name = "-".join(map(str, (size, Path(strategy).stem, shape, batch, recompute, states, copies)))
            point["profile"] = str(beside.with_name(f"{beside.stem}-{name}.txt"))
        points.append(point)
    return points


def measure_all(points: list[Row], options: argparse.Namespace) -> Iterator[Row]:
    """Yield the row of each point, with what is counted on the meta device while the GPU measures."""
    workers = 1 if options.device == "cpu" else max(1, min(4, (os.cpu_count() or 1) // 4))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        counts = [pool.submit(counted, point) for point in points]
        if options.device == "cpu":
            for count in counts:
                count.exception()  # waits: counting would take the measured steps' time
        for row, count in zip(rows.measured_rows("train", points, options), counts, strict=False):
            if count.exception() is None:
                row |= compared(row, count.result())
            else:
                row.setdefault("error", f"counting failed: {count.exception()}")
            rows.write(row, options.out)
            yield row
        pool.shutdown(cancel_futures=True)


def recipe_of(point: Row, bf16: bool) -> Recipe:
    """Return the recipe of a point, its automatic values decided as `vlafit train` decides them.

    `bf16` says whether the device computes in bfloat16.
    """
    tables: dict[str, Any] = {
        "strategy": point["strategy"],
        "optim": {"states": point["states"], "ema": point["ema"]},
        "train": {
            "steps": point["warm_up"] + point["steps"] + bool(point["profile"]),
            "batch_size": point["batch"],
            "accumulate": point["micro_batches"],
            "recompute": point["recompute"],
        },
    }
    for text in point["set"]:
        field, _, value = text.partition("=")
        config.put(tables, field, _toml(value), "--set")
    recipe = config.build(Recipe, tables, "the benchmark's recipe")
    return settle(recipe, LaunchPlan(), bf16=bf16).recipe


def _toml(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def prepared(point: Row) -> TrainState:
    """Return a random policy, prepared as `vlafit.train.experiment` prepares it."""
    device = torch.device(point["device"])
    recipe = recipe_of(point, has_bf16(device))
    allow_tf32(device, recipe.train.precision)
    policy = rows.random_policy(point["size"], device)
    strategy = load_strategy(recipe.strategy)
    frozen = FrozenWeights(
        strategy, wanted=recipe.train.frozen == "bf16", trained=recipe.train.weights == "bf16"
    )
    frozen.in_memory(policy)
    plan = apply(policy, strategy, seed=recipe.train.seed)
    frozen.finish(policy)
    if recipe.train.precision == "bf16":
        compute_adapters_in_bf16(policy)
    return TrainState(policy, plan, recipe, device, Place())


def measure(point: Row) -> Iterator[Row]:
    """Yield the facts of a point's machine and policy, and then of its training steps."""
    device = torch.device(point["device"])
    meter = MemoryMeter(device)
    began = time.perf_counter()
    yield rows.machine(device, point["commit"])
    state = prepared(point)
    recipe = state.recipe.train
    peak = peak_flops(recipe.peak_tflops, device, recipe.precision)
    yield {
        "precision": recipe.precision,
        "frozen": recipe.frozen,
        "parameters": sum(p.numel() for p in state.policy.parameters()),
        "trainable": state.plan.trainable_parameters,
        "peak_tflops": None if peak is None else peak / 1e12,
        "build_s": round(time.perf_counter() - began, 1),
    }
    if device.type == "cuda":
        rows.wait_for(device)
        torch.cuda.empty_cache()
        if point["limit"]:
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, point["limit"] * 1e9 / whole), device.index or 0
            )
    batches = host_batches(
        state.policy.needs(), point["shape"], recipe.samples, recipe.micro_batches,
        device if point["copies"] == "pinned" else torch.device("cpu"),
    )  # fmt: skip
    yield steps_of(point, state, meter, batches)
    packer = packer_of(state.policy, state.recipe, device)
    yield {
        "varlen": int(packer is not None and packer.kernel == "flash"),
        "fp32_product_error": product_error(device),
    }


def product_error(device: torch.device) -> float:
    """Return the relative error of a product of two random float32 matrices."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, PRODUCT, PRODUCT, generator=generator)
    exact = a.double() @ b.double()
    return float(((a.to(device) @ b.to(device)).cpu() - exact).norm() / exact.norm())


def steps_of(
    point: Row, state: TrainState, meter: MemoryMeter, batches: Iterator[list[tuple[Keys, Batch]]]
) -> Row:
    """Train, and return time, memory and loss of the measured steps."""
    device, recipe = state.device, state.recipe
    last = point["warm_up"] + point["steps"]
    profiler = rows.profiler(device) if point["profile"] else None
    ends: list[float] = []
    losses: list[float] = []
    memory: dict[str, Any] = {}

    def after_step(result: StepResult) -> bool:
        ends.append(time.perf_counter())  # the loop waited for the gradient's norm, so this is a step's time
        losses.append(result.loss)
        if result.step == last:
            rows.wait_for(device)
            meter.pause()
            memory.update(meter.facts(state.policy, state.optimizer, state.ema))
            if profiler is not None:
                profiler.start()
        return True

    meter.start()
    ends.append(time.perf_counter())
    train(
        state,
        batches,
        first_step=0,
        recipe=recipe.train,
        optim=recipe.optim,
        world=1,
        wants_stop=lambda: False,
        spent=lambda: 0.0,
        after_step=after_step,
    )
    rows.wait_for(device)
    if profiler is not None:
        profiler.stop()
    taken = [after - before for before, after in itertools.pairwise(ends)][point["warm_up"] : last]
    values: Row = {
        "samples_per_s": round(recipe.train.samples / statistics.median(taken), 3),
        "samples_per_s_low": round(recipe.train.samples / max(taken), 3),
        "samples_per_s_high": round(recipe.train.samples / min(taken), 3),
        "step_ms": round(1000 * statistics.median(taken), 2),
        "peak_gb": memory["peak"] / 1e9,
        "reserved_gb": memory["reserved"] / 1e9 if "reserved" in memory else None,
        "memory_parts_gb": {name: round(size / 1e9, 3) for name, size in memory["parts"].items()},
        "loss": losses[-1],
    }
    return values if profiler is None else values | rows.profiled(profiler, device, Path(point["profile"]))


def host_batches(
    needs: Needs, shape: str, samples: int, micro_batches: int, device: torch.device
) -> Iterator[list[tuple[Keys, Batch]]]:
    """Yield a step's micro-batches of random samples on the host, with keys that never repeat."""
    size = rows_per_process(samples, micro_batches, 1)
    held = [host_batch(needs, shape, size, seed) for seed in range(HELD_BATCHES * micro_batches)]
    if device.type == "cuda":
        held = [batch.pin_memory() for batch in held]
    turns = itertools.cycle(held)
    for step in itertools.count():
        first = step * samples
        yield [
            ([(0, first + number * size + row) for row in range(size)], next(turns))
            for number in range(micro_batches)
        ]


def host_batch(needs: Needs, shape: str, samples: int, seed: int) -> Batch:
    """Return random samples shaped like real ones; see the module's text for `shape`."""
    rng = torch.Generator().manual_seed(seed)
    libero = shape == "libero"
    side, length = needs.image_size, needs.max_tokens
    chunk = (samples, needs.chunk, needs.action_dim)
    image_mask = torch.ones(samples, CAMERAS, dtype=torch.bool)
    token_mask = torch.ones(samples, length, dtype=torch.bool)
    action_mask = torch.ones(chunk, dtype=torch.bool)
    if libero:
        image_mask[:, -1] = False
        token_mask[:, max(1, length // 3) :] = False
        action_mask[..., LIBERO_DIMENSIONS:] = False
    if shape == "mixed":
        image_mask[::2, 1:] = False
        token_mask[::2, max(1, length // 3) :] = False
    images = torch.randint(0, 256, (samples, CAMERAS, 3, side, side), dtype=torch.uint8, generator=rng)
    return Batch(
        images=images,
        image_mask=image_mask,
        tokens=torch.randint(1, needs.vocabulary, (samples, length), generator=rng),
        token_mask=token_mask,
        state=torch.randn(samples, needs.state_dim, generator=rng),
        actions=torch.randn(chunk, generator=rng),
        action_mask=action_mask,
    )


def counted(point: Row) -> Row:
    """Return FLOPs of a sample and the forecast of a point's memory, on the meta device."""
    recipe, policy, strategy, batch = on_meta(point)
    packer = packer_of(policy, recipe, torch.device("cpu"))
    parts = BatchShape.parts_of(batch if packer is None else packer.pack(batch))
    count = FlopCounter(policy, preview(policy, strategy), recipe.train.draws)
    flops = sum(count(part) for part in parts) / recipe.train.samples
    made = forecast_of(point)
    parts = {name: round(size / 1e9, 3) for name, size in vars(made).items()}
    return {"tflop": flops / 1e12, "forecast_gb": made.total / 1e9, "forecast_parts_gb": parts}


def forecast_of(point: Row) -> Forecast:
    """Return the forecast of a point's memory, made on the meta device."""
    recipe, policy, strategy, batch = on_meta(point)
    shape = BatchShape.of(batch)
    return forecast(policy, strategy, workload(recipe, shape.cameras, shape.tokens))


def on_meta(point: Row) -> tuple[Recipe, Policy, Strategy, Batch]:
    """Return recipe and strategy of a point, its policy on the meta device, and a trimmed batch."""
    torch.set_num_threads(1)
    recipe = recipe_of(point, point["device"] != "cpu")  # not asked: it would take memory of the GPU
    policy = build_family(rows.sizes()[point["size"]], point["size"], device="meta")
    batch = host_batch(policy.needs(), point["shape"], recipe.train.samples, 0).trim()
    return recipe, policy, load_strategy(recipe.strategy), batch


def compared(row: Row, counts: Row) -> Row:
    """Return what was counted, and how it compares with what was measured."""
    values = dict(counts)
    speed, peak = row.get("samples_per_s"), row.get("peak_tflops")
    if speed:
        values["tflops_per_s"] = speed * counts["tflop"]
        values["mfu"] = values["tflops_per_s"] / peak if peak else None
    if row.get("peak_gb") and row.get("card") != "cpu":  # a resident set holds the program, too
        values["forecast_error"] = counts["forecast_gb"] / row["peak_gb"] - 1
    return values


if __name__ == "__main__":
    sys.exit(main())
