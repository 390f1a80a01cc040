"""Compare tuning strategies at the fixed setting of few demonstrations: the recipe few-demonstrations.

    python eval/few_demonstrations_strategies.py [--seeds 0 1 2] [--most N] [--runs DIR] [--results DIR]

Every strategy starts from the full checkpoint, at the best of the rates that the search tried for it
(search.jsonl, other starts), and plays the protocol of the recipe. `full` is not trained again: `make
few-demonstrations` has published it. All strategies of a seed run before those of the next; a finished run is
not run again, so the same command continues after an interruption. Writes every run's report.json and
episodes, and figure.png, into the results folder; `python eval/readme.py` makes the table.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from cells import evaluation_of, every, runs_by_seed, score_of
from training_run import carry_out, is_finished, keep, words_of

from vlafit import files
from vlafit.report.picture import Arm, ablation_figure

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "few-demonstrations" / "strategies"
TITLE = "Two unseen tasks, few demonstrations and steps"
STRATEGIES: dict[str, tuple[str, float]] = {  # name: strategy, learning rate
    "expert": ("expert", 2e-3),
    "lora": ("lora", 2e-3),
    "lora-lr-0.001": ("lora", 1e-3),
    "lora-rank-2": ("eval/results/few-demonstrations/lora-rank-2.toml", 5e-3),
    "lora-rank-2-lr-0.002": ("eval/results/few-demonstrations/lora-rank-2.toml", 2e-3),
    "dora": ("dora", 2e-3),
    "dora-lr-0.001": ("dora", 1e-3),
    "progressive-short": ("eval/results/few-demonstrations/progressive-short.toml", 2e-3),
}


def main() -> int:
    """Play what is missing, and publish every finished run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--most", type=int, default=sys.maxsize, help="runs to play before stopping")
    parser.add_argument("--runs", type=Path, default=Path("runs/few-demonstrations/strategies"))
    parser.add_argument(
        "--results", type=Path, default=HERE / "results" / "few-demonstrations" / "strategies"
    )
    options = parser.parse_args()
    wanted = [(name, seed) for seed in options.seeds for name in STRATEGIES]
    missing = [one for one in wanted if not (options.results / folder_of(*one)).is_dir()]
    for name, seed in missing[: options.most]:
        run = options.runs / folder_of(name, seed)
        if not is_finished(run):
            play(name, seed, run)
        keep(run, options.results / run.name)
    draw(options.results)
    return 0


def folder_of(name: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{name}-seed{seed}"


def play(name: str, seed: int, run: Path) -> None:
    """Carry out or continue one run on one core. Raises CalledProcessError if it fails."""
    strategy, lr = STRATEGIES[name]
    fields = ("--strategy", strategy, "--optim.lr", f"{lr:g}", "--train.threads", "1", "--eval.workers", "1")
    words = words_of("few-demonstrations", seed, run, *fields)
    if status := carry_out(words, run):
        raise subprocess.CalledProcessError(status, ["vlafit", *words])


def published(results: Path) -> dict[str, dict[int, Path]]:
    """Return the published runs of every strategy, `full` first, by seed: of the seeds that all have."""
    runs = {"full": runs_by_seed(results.parent / "starts")["few-demonstrations"], **runs_by_seed(results)}
    seeds = set.intersection(*(set(of) for of in runs.values()))
    return {name: {seed: of[seed] for seed in sorted(seeds)} for name, of in runs.items()}


def draw(results: Path) -> None:
    """Draw the success of every strategy, once all have been played with a seed."""
    runs = published(results)
    if set(STRATEGIES) | {"full"} == set(runs) and runs["full"]:
        evaluation = evaluation_of(every(runs))
        scores = {name: tuple(score_of(run, evaluation) for run in of.values()) for name, of in runs.items()}
        arms = [Arm(name, of) for name, of in scores.items()]
        files.write_atomic(results / "figure.png", ablation_figure(arms, TITLE))


if __name__ == "__main__":
    sys.exit(main())
