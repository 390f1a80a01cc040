"""Train a small policy of every family from nothing on the quickstart's tasks and evaluate it: three seeds.

    python eval/families.py [--seeds 0 1 2] [--recipes scratch-pi0 ...] [--runs DIR] [--results DIR]

The recipes are `configs/scratch-*.toml`: about the same number of parameters, the same demonstrations,
samples and optimiser. All recipes of a seed run before those of the next, so that a stopped command leaves a
balanced table. Each run is an ordinary `vlafit train` on one core; a finished one is not run again, so the
same command continues after an interruption. A run is published as soon as it is finished; `python
eval/readme.py` makes the table from what is published.
"""

import argparse
import sys
from pathlib import Path

from training_run import carry_out, cpu_of, is_finished, keep, keep_text, log_of, words_of

from vlafit import shipped

HERE = Path(__file__).parent
PREFIX = "scratch-"


def main() -> int:
    """Run what is missing, and publish what is finished."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name in shipped.names("recipe") if name.startswith(PREFIX)]
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=known, choices=known, metavar="RECIPE")
    parser.add_argument("--runs", type=Path, default=Path("runs/families"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "scratch")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other values than the recipes have"
    )
    options = parser.parse_args()
    failed = []
    for seed in options.seeds:
        for recipe in options.recipes:
            run = options.runs / f"{recipe}-seed{seed}"
            if train(recipe, seed, run, options.set):
                publish(run, options.results / run.name)
            else:
                failed.append(run)
    for run in failed:
        print(f"failed: {run} (see {log_of(run)})", file=sys.stderr)
    return int(bool(failed))


def train(recipe: str, seed: int, run: Path, changed: list[str]) -> bool:
    """Carry out or continue one run on one core; say whether it is finished."""
    if is_finished(run):
        return True
    fields = ["--train.threads", "1", "--eval.workers", "1"]
    for field in changed:
        name, _, value = field.partition("=")
        fields += [f"--{name}", value]
    command = words_of(recipe, seed, run, *fields)
    carry_out(command, run)
    return is_finished(run)


def publish(run: Path, folder: Path) -> None:
    """Copy what a reader needs of a run, and its processor time."""
    keep(run, folder)
    keep_text(cpu_of(run), folder / "cpu.jsonl")


if __name__ == "__main__":
    sys.exit(main())
