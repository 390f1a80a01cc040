"""Measure a training run that keeps the features of what is frozen beside the same run without, in turn.

    OMP_NUM_THREADS=1 python -m benchmarks.feature_cache --rounds 3 --steps 40 --batch 32 --episodes 4

Run it in the repository's root. Each round trains the recipe twice from its start, without a cache and with
one in memory, the order changing every round; rollouts and the report are left out. Seconds are those of the
training steps, filling the cache included, and so are the CPU seconds, which also hold the first and the last
validation. The losses of both must agree to 1e-6 at every step, or it stops.
"""

import argparse
import json
import statistics
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlafit import config, shipped
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.callbacks import Callbacks
from vlafit.train.data import open_data
from vlafit.train.loop import StepResult

TOLERANCE = 1e-6


class StepClock(Callbacks):
    """Measures the CPU seconds from the begin of training to the last step."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def phase(self, name: str) -> None:
        if name == "training":
            self.began = time.process_time()

    def step(self, result: StepResult, total: int, values: dict[str, float]) -> None:
        self.ended = time.process_time()


def measure(recipe: Recipe, out: Path) -> tuple[float, float, list[float]]:
    """Train; return the seconds of its steps, their CPU seconds, and the loss of every step."""
    clock = StepClock()
    run(recipe, out, callbacks=clock)
    cpu = clock.ended - clock.began
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    return json.loads((out / "run.json").read_text())["train_seconds"], cpu, losses


def samples_of(recipe: Recipe) -> int:
    """Return the number of training samples of the recipe."""
    data = open_data(recipe.data, recipe.train.seed)
    return sum(
        store.episodes[store.index(identity)].length
        for store, ids in zip(data.stores, data.training, strict=True)
        for identity in ids
    )


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each round, and medians of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--strategy", default="expert")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--episodes", type=int, default=4, help="training episodes of each task")
    options = parser.parse_args(words)
    recipe = config.read(Recipe, shipped.find("recipe", options.recipe), "recipe")
    recipe = replace(
        recipe,
        strategy=options.strategy,
        data=replace(recipe.data, episodes_per_task=options.episodes, shift_pixels=0),
        eval=replace(recipe.eval, protocol="", before=False, wrong_instruction=False, samples=0),
        train=replace(recipe.train, steps=options.steps, batch_size=options.batch, log_every=1, threads=1,
                      validate_every=0, validation_batches=1, save_every=0, trackers=(), report=False),
    )  # fmt: skip
    passes = options.steps * options.batch / (rows := samples_of(recipe))
    print(f"{options.recipe}, {options.strategy}: {rows} samples, each seen {passes:.1f} times", flush=True)
    wall, cpu = [], []
    for number in range(options.rounds):
        results = {}
        for cache in ("off", "memory") if number % 2 == 0 else ("memory", "off"):
            with tempfile.TemporaryDirectory() as folder:
                cached = replace(recipe, train=replace(recipe.train, cache=cache))
                results[cache] = measure(cached, Path(folder) / "run")
        (seconds, spent, losses), (kept_seconds, kept_spent, kept_losses) = results["off"], results["memory"]
        apart = max(abs(a - b) / abs(a) for a, b in zip(losses, kept_losses, strict=True))
        print(
            f"round {number + 1}: {seconds:.1f} s without, {kept_seconds:.1f} s with; CPU "
            f"{spent:.1f} s, {kept_spent:.1f} s; losses differ by {apart:.1e}",
            flush=True,
        )
        if apart > TOLERANCE:
            raise SystemExit(f"the losses differ by more than {TOLERANCE}")
        wall.append(seconds / kept_seconds)
        cpu.append(spent / kept_spent)
    for name, ratios in (("seconds", wall), ("CPU seconds", cpu)):
        print(f"{name}: {statistics.median(ratios):.2f} times [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
