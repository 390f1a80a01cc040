"""Measure success and smoothness against latency: chunks as they come, guided, and given their first steps.

    python -m benchmarks.latency --out runs/latency               # some 15 minutes on one core

Trains two tiny policies on 200 made-up demonstrations of a point that passes a pillar on either side, one of
them with `train.max_delay = 8`, and plays both from the same 100 starts with chunks that arrive 0 to 8 steps
after their observation. Smoothness is the mean change of an action from step to step.
"""

import argparse
from pathlib import Path
from statistics import fmean

from benchmarks.latency_env import TASK, write_demonstrations
from vlafit import rollout, train
from vlafit.actor import load_actor
from vlafit.envs import EnvSpec
from vlafit.execution import Execution
from vlafit.recipe import DataRecipe, EvalRecipe, OptimRecipe, PolicyRecipe, Recipe, TrainRecipe
from vlafit.rollout import Protocol

DELAYS = (0, 1, 2, 4, 6, 8)
CHUNK, REPLAN, LARGEST = 16, 4, 8
EPISODES = 200
CONFIG = {
    "chunk": CHUNK, "max_tokens": 16, "vision": {"depth": 1}, "language": {"depth": 2},
    "expert": {"width": 48, "mlp": 96},
}  # fmt: skip
WAYS = {  # name -> largest delay in training, execution
    "as they come": (0, Execution("chunk", replan=REPLAN)),
    "guided": (0, Execution("real_time", replan=REPLAN)),
    "given (max_delay)": (LARGEST, Execution("real_time", replan=REPLAN)),
    "max_delay, as they come": (LARGEST, Execution("chunk", replan=REPLAN)),
}


def recipe(card: Path, max_delay: int, steps: int) -> Recipe:
    """Return the recipe of one of the two policies."""
    return Recipe(
        name=f"latency-{max_delay}",
        policy=PolicyRecipe(family="pi0", size="pi0-tiny", config=dict(CONFIG)),
        data=DataRecipe(cards=(str(card),), validation=0.05),
        optim=OptimRecipe(lr=2e-3, warmup_steps=50, final_lr=0.02, ema=0.99),
        train=TrainRecipe(
            steps=steps, batch_size=32, draws=8, max_delay=max_delay, threads=1, trackers=(), save_every=0,
            validate_every=0, log_every=50, report=False,
        ),
        eval=EvalRecipe(after=False, samples=0),
    )  # fmt: skip


def main() -> None:
    """Train, play, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/latency"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--trials", type=int, default=100)
    options = parser.parse_args()
    card = options.out / "pillar.toml"
    if not card.is_file():
        write_demonstrations(options.out, EPISODES)
    for max_delay in (0, LARGEST):
        run = options.out / f"run-{max_delay}"
        train.run(recipe(card, max_delay, options.steps), run, resume=run.is_dir())
    protocol = Protocol(
        name="pillar", env=EnvSpec("benchmarks.latency_env", size=8), tasks=(TASK,), trials=options.trials,
        first_seed=10**6, horizon=80, replan=REPLAN,
    )  # fmt: skip
    print("| chunks | " + " | ".join(f"{delay} steps" for delay in DELAYS) + " |")
    print("|---|" + "---:|" * len(DELAYS))
    for name, (max_delay, execution) in WAYS.items():
        actor = load_actor(options.out / f"run-{max_delay}", width=50)
        cells = []
        for delay in DELAYS:
            late = Execution(execution.mode, REPLAN, delay, guidance=execution.guidance)
            folder = options.out / "eval" / f"{name} {delay}".replace(" ", "-")
            result = rollout.evaluate(actor, protocol, folder, workers=1, videos=0, execution=late)
            changes = [r.action_change for r in result.records if r.action_change is not None]
            cells.append(f"{100 * (result.overall.rate or 0):.0f} %, {fmean(changes):.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
