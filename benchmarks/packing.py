"""CPU seconds and FLOPs of training steps on mixed batches: packed row by row, and padded.

    OMP_NUM_THREADS=1 python -m benchmarks.packing [--rounds 7] [--precision fp32 bf16] [--out packing.jsonl]

Run it in the repository's root. A policy of width 512 and depth 6 (images of 112 pixels, three cameras,
prompts of up to 48 tokens) steps in turns with `train.packing` "rows" and "none", the order reversed each
round, by the product's own loop in one process. Only CPU time counts, so that other work on the machine
matters little; a ratio is that of one round, its median and range are over the rounds.

whole       every row has three cameras and 48 tokens: nothing is packed.
prompts     prompts have 4 to 48 tokens.
cameras     every second row has one camera.
both        every second row has one camera and 16 tokens (`benchmarks.train`'s shape "mixed").
"""

import argparse
import statistics
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import rows
from benchmarks.rows import Row
from benchmarks.train import host_batch
from vlafit import config
from vlafit.nn.batch import Batch
from vlafit.nn.policy import Policy
from vlafit.nn.rng import Keys
from vlafit.policies import build_family
from vlafit.recipe import Recipe
from vlafit.train.batch_shape import BatchShape
from vlafit.train.flops import FlopCounter
from vlafit.train.launch_plan import LaunchPlan
from vlafit.train.loop import train
from vlafit.train.settle import settle
from vlafit.train.stages import Place
from vlafit.train.train_state import TrainState
from vlafit.tuning import apply, load_strategy, preview

DECODER = {"width": 512, "depth": 6, "mlp": 1024, "heads": 8, "kv_heads": 1, "head_dim": 64, "vocab": 4096}
CONFIG = {
    "vision": {"width": 512, "depth": 6, "mlp": 1024, "heads": 8, "patch": 14, "image_size": 112},
    "language": DECODER,
    "expert": {"width": 256, "mlp": 512},
}
MIXES = ("whole", "prompts", "cameras", "both")
HOW = ("none", "rows")
COLUMNS = ("mix", "strategy", "precision", "padding", "gflop_padded", "gflop_packed", "flops", "padded_s",
           "packed_s", "ratio", "low", "high")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--strategies", nargs="+", default=["full", "expert"])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="file of JSON lines, to which each row is added at once")
    options = parser.parse_args()
    measured = []
    for precision in options.precision:
        for strategy in options.strategies:
            for mix in options.mixes:
                row = measure(mix, strategy, precision, options.batch, options.rounds)
                rows.write(rows.machine(torch.device("cpu"), "") | row, options.out)
                measured.append(row)
    print(rows.table(measured, COLUMNS))
    return 0


def measure(mix: str, strategy: str, precision: str, size: int, rounds: int) -> Row:
    """Return the row of one mix."""
    states = {how: state_of(strategy, precision, how, size) for how in HOW}
    batch = mixed(states["none"].policy, mix, size)
    for state in states.values():
        step(state, batch)  # moments are made, caches are filled
    seconds: dict[str, list[float]] = {how: [] for how in HOW}
    for number in range(rounds):
        for how in HOW if number % 2 else HOW[::-1]:
            seconds[how].append(step(states[how], batch))
    ratios = sorted(a / b for a, b in zip(seconds["none"], seconds["rows"], strict=True))
    padded, packed = (gflop(states[how], batch) for how in HOW)
    trimmed = batch.trim()
    tokens = states["none"].policy.tokens(trimmed, 0)
    short = states["rows"].policy.tokens(states["rows"].prepare([(0, n) for n in range(size)], batch), 0)
    return {
        "mix": mix, "strategy": strategy, "precision": precision, "padding": 1 - short / tokens,
        "gflop_padded": padded, "gflop_packed": packed, "flops": padded / packed,
        "padded_s": statistics.median(seconds["none"]), "packed_s": statistics.median(seconds["rows"]),
        "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1], "rounds": rounds,
        "batch": size,
    }  # fmt: skip


def state_of(strategy: str, precision: str, how: str, size: int) -> TrainState:
    """Return a random policy with its optimiser, as `vlafit train` prepares it."""
    tables = {
        "strategy": strategy,
        "train": {"batch_size": size, "packing": how, "precision": precision, "steps": 10**6},
    }
    recipe = settle(config.build(Recipe, tables, "the benchmark's recipe"), LaunchPlan(), bf16=False).recipe
    policy = build_family("pi0", "pi0", CONFIG, device="cpu", generator=torch.Generator().manual_seed(0))
    plan = apply(policy, load_strategy(strategy), seed=0)
    return TrainState(policy, plan, recipe, torch.device("cpu"), Place())


def mixed(policy: Policy, mix: str, size: int) -> Batch:
    """Return random samples of a mix."""
    batch = host_batch(policy.needs(), "mixed" if mix == "both" else "padded", size, 0)
    length = policy.needs().max_tokens
    if mix == "prompts":
        lengths = torch.linspace(4, length, size).round()
        batch = replace(batch, token_mask=torch.arange(length) < lengths[:, None])
    elif mix == "cameras":
        mask = batch.image_mask.clone()
        mask[::2, 1:] = False
        batch = replace(batch, image_mask=mask)
    return batch


def step(state: TrainState, batch: Batch) -> float:
    """Return the CPU seconds of one optimiser step."""
    keys = [(0, row) for row in range(len(batch))]

    def batches() -> Iterator[list[tuple[Keys, Batch]]]:
        yield [(keys, batch)]

    began = time.process_time()
    train(
        state, batches(), first_step=0, recipe=state.recipe.train, optim=state.recipe.optim, world=1,
        wants_stop=lambda: False, spent=lambda: 0.0, after_step=lambda result: False,
    )  # fmt: skip
    return time.process_time() - began


def gflop(state: TrainState, batch: Batch) -> float:
    """Return the arithmetic of a step, as `train/tflops_per_s` counts it."""
    count = FlopCounter(state.policy, preview(state.policy, load_strategy(state.recipe.strategy)), 1)
    prepared = state.prepare([(0, row) for row in range(len(batch))], batch)
    return sum(count(part) for part in BatchShape.parts_of(prepared)) / 1e9


if __name__ == "__main__":
    raise SystemExit(main())
