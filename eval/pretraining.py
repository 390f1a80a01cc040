"""Run the ablation of the pretrained weights: a recipe from three starting points, three seeds each.

    python eval/pretraining.py [RECIPE] [--seeds 0 1 2] [--jobs 2] [--runs DIR] [--results DIR]

Full checkpoint (RECIPE), fresh action expert (RECIPE-fresh-expert) and untrained (RECIPE-untrained): same
data, order, steps and protocol. Each run is an ordinary `vlafit train`; a finished one is not run again, so
the same command continues after an interruption. All starting points of a seed run before those of the next.
Writes every run's report.json and episodes, results.json and figure.png into the results folder.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training_run import is_finished, keep, words_of

from vlafit import files
from vlafit.report.picture import Arm, ablation_figure, read_scores
from vlafit.score import Score, overall

STARTS = {  # end of the recipe's name: label
    "": "full checkpoint",
    "-fresh-expert": "fresh action expert",
    "-untrained": "untrained",
}
TITLES = {
    "quickstart": "Two unseen tasks, same data and budget",
    "few-demonstrations": "Two unseen tasks, few demonstrations and steps",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", choices=list(TITLES), default="quickstart", metavar="RECIPE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/pretraining"))
    parser.add_argument("--results", type=Path, default=Path("eval/results/pretraining"))
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at once; each gets its share of the CPU cores"
    )
    options = parser.parse_args()
    arms = {f"{options.recipe}{end}": label for end, label in STARTS.items()}
    wanted = [(recipe, seed) for seed in options.seeds for recipe in arms]
    runs = {(recipe, seed): options.runs / f"{recipe}-seed{seed}" for recipe, seed in wanted}
    cores = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda key: train(*key, runs[key], cores), wanted))
    scores: dict[str, dict[int, dict[str, Score]]] = {recipe: {} for recipe in arms}
    for (recipe, seed), run in runs.items():
        scores[recipe][seed] = read_scores(run)
        keep(run, options.results / run.name)
    write(arms, scores, TITLES[options.recipe], options.results)
    print((options.results / "results.json").read_text())
    return 0


def train(recipe: str, seed: int, run: Path, cores: int) -> None:
    """Carry out or continue one run on some of the cores; do nothing if it is finished."""
    if is_finished(run):
        return
    words = words_of(recipe, seed, run, "--eval.workers", str(cores))
    command = [sys.executable, "-m", "vlafit", *words]
    run.parent.mkdir(parents=True, exist_ok=True)
    print("+ vlafit", *words, flush=True)
    with (run.parent / f"{run.name}.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)


def write(
    labels: dict[str, str], scores: dict[str, dict[int, dict[str, Score]]], title: str, folder: Path
) -> None:
    """Write results.json and figure.png."""
    arms = {}
    for recipe, label in labels.items():
        by_seed = {f"seed{seed}": one for seed, one in scores[recipe].items()}
        arms[recipe] = {
            "label": label,
            "seeds": {
                seed: {k: score.to_json() for k, score in one.items()} for seed, one in by_seed.items()
            },
            "after": overall({seed: one["after"] for seed, one in by_seed.items()}).to_json(),
        }
    files.write_atomic(folder / "results.json", json.dumps(arms, indent=2) + "\n")
    drawn = [
        Arm(label, tuple(s["after"] for s in scores[recipe].values())) for recipe, label in labels.items()
    ]
    files.write_atomic(folder / "figure.png", ablation_figure(drawn, title))


if __name__ == "__main__":
    sys.exit(main())
