"""Play the small policies of real LIBERO from all official initial states, and under LIBERO-PRO's changes.

    python eval/libero_full.py [NAME ...] [--trials 50] [--workers 1] [--runs DIR] [--results DIR]

Each name is an evaluation of `EVALUATIONS`; without one, all are played, in that order. `unseen-after` and
`unseen-wrong` need the run of `make libero-unseen`. Every evaluation is an ordinary `vlafit eval`: a finished
one is not played again, and one that was stopped goes on, so the same command continues after an
interruption. Keeps result.json and every episode of a finished evaluation in the results folder.
"""

import argparse
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training_run import carry_out, keep_text

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "libero-full"


@dataclass(frozen=True)
class Evaluation:
    """A policy under a protocol."""

    checkpoint: str
    """A shipped checkpoint, or the folder of a run."""
    protocol: str
    """Name of a shipped protocol."""
    wrong_instruction: bool = False
    """Whether each task gets its partner's sentence."""

    def words(self, trials: int) -> list[str]:
        """Return the words of the `vlafit` command that plays it."""
        wrong = ["--wrong-instruction"] * self.wrong_instruction
        return ["eval", self.checkpoint, "--protocol", self.protocol, "--trials", str(trials), *wrong]


EVALUATIONS = {
    "unseen-before": Evaluation("libero-object-base", "libero-object-unseen"),
    "unseen-after": Evaluation("runs/libero-object-unseen", "libero-object-unseen"),
    "unseen-wrong": Evaluation("runs/libero-object-unseen", "libero-object-unseen", True),
    "known": Evaluation("libero-object-base", "libero-object-small"),
    "known-wrong": Evaluation("libero-object-base", "libero-object-small", True),
    "language": Evaluation("libero-object-base", "libero-object-small-lan"),
    "language-wrong": Evaluation("libero-object-base", "libero-object-small-lan", True),
    "task": Evaluation("libero-object-base", "libero-object-small-task"),
    "task-wrong": Evaluation("libero-object-base", "libero-object-small-task", True),
    "object": Evaluation("libero-object-base", "libero-object-small-object"),
    "swap": Evaluation("libero-object-base", "libero-object-small-swap"),
}


def main() -> int:
    """Play what is missing, and keep every finished evaluation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EVALUATIONS))
    parser.add_argument("--trials", type=int, default=50, help="official initial states of each task")
    parser.add_argument("--workers", type=int, default=1, help="environment processes")
    parser.add_argument("--runs", type=Path, default=Path("runs/libero-full"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in EVALUATIONS]:
        parser.error(f"there is no evaluation {unknown[0]!r}; choose among {', '.join(EVALUATIONS)}")
    for name in options.names or EVALUATIONS:
        out = options.runs / f"{name}-{options.trials}"
        if not (out / "result.json").is_file():
            play(EVALUATIONS[name].words(options.trials), out, options.workers)
        keep(out, options.results / name)
    return 0


def play(words: Sequence[str], out: Path, workers: int) -> None:
    """Carry out or continue one evaluation. Raises CalledProcessError if it fails or is incomplete."""
    whole = [*words, "--out", str(out), "--workers", str(workers), "--resume"]
    if status := carry_out(whole, out):
        raise subprocess.CalledProcessError(status, ["vlafit", *whole])


def keep(evaluation: Path, folder: Path) -> None:
    """Copy the result and every episode of a finished evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_text(evaluation / "result.json", folder / "result.json")
    shutil.copy(evaluation / "episodes.jsonl", folder / "episodes.jsonl")


if __name__ == "__main__":
    raise SystemExit(main())
