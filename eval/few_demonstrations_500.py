"""Play the published runs of few demonstrations from 84 starts of each task: 504 episodes over three seeds.

    python eval/few_demonstrations_500.py [--seeds 0 1 2] [--only NAME ...] [--most N] [--runs DIR]
                                          [--results DIR]

Each is an evaluation of the protocol metaworld-faucet-84, whose first 25 starts of each task are those that
the run was published with. Their episodes are taken over, except the last five of each task, which are played
again: all fields but the time must be equal to the published ones. vlafit refuses another checkpoint (by its
SHA-256) and other versions. All runs of a seed are played before those of the next; an evaluation that was
stopped goes on, so the same command continues after an interruption. A run that is not in the folder of runs
is trained first, by its published command. Writes result_84_starts.json and episodes_84_starts.jsonl beside
each published run; `python eval/readme.py` makes the tables.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import few_demonstrations_strategies
from cells import LONG, evaluation_of, every, read, read_lines, runs_by_seed, score_of
from few_demonstrations_tables import RECIPES
from training_run import carry_out, is_finished, keep_text

from vlafit import files
from vlafit.config import build
from vlafit.errors import VlafitError
from vlafit.report.picture import Arm, ablation_figure
from vlafit.rollout import load_protocol
from vlafit.rollout.evaluation_folder import EvaluationFolder
from vlafit.rollout.protocol import Protocol

HERE = Path(__file__).parent
PROTOCOL = "metaworld-faucet-84"
ALL = "Two unseen tasks, five demonstrations of each, 30 steps"  # title of the picture of all arms
AGAIN = 5  # starts of each task that are played again


def main() -> int:
    """Play what is missing, and keep every finished evaluation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names without their seed, such as lora")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="evaluations to play before stopping")
    parser.add_argument("--runs", type=Path, default=Path("runs/few-demonstrations"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "few-demonstrations")
    options = parser.parse_args()
    missing = [run for run in wanted(options.results, options.seeds, options.only) if not is_kept(run)]
    for published in missing[: options.most]:
        run = options.runs / published.relative_to(options.results)
        out = options.runs / LONG / published.name
        train(run, published)
        play(run, out)
        require_equal(published / "episodes_after.jsonl", out / "episodes.jsonl")
        shutil.copy(out / "episodes.jsonl", published / f"episodes_{LONG}.jsonl")
        keep_text(out / "result.json", published / f"result_{LONG}.json")
    draw(options.results)
    return 0


def wanted(results: Path, seeds: Sequence[int], only: Sequence[str] | None = None) -> list[Path]:
    """Return the folders of published runs, all of a seed before those of the next."""
    runs = [path.parent for path in sorted(results.glob("*/*-seed*/report.json"))]
    by_seed = [(run.name.rpartition("-seed"), run) for run in runs]
    return [run for seed in seeds for (name, _, of), run in by_seed
            if int(of) == seed and (only is None or name in only)]  # fmt: skip


def is_kept(published: Path) -> bool:
    """Return whether a published run has its longer evaluation."""
    return (published / f"result_{LONG}.json").is_file()


def train(run: Path, published: Path) -> None:
    """Carry out or continue a published run's own command, unless it is finished."""
    if is_finished(run):
        return
    words = shlex.split(read(published / "run.json")["command"])[1:]
    words[words.index("--out") + 1] = str(run)
    begun = ["--resume"] if (run / "recipe.toml").is_file() else []
    _carry_out([*(word for word in words if word != "--resume"), *begun], run)


def play(run: Path, out: Path) -> None:
    """Play what is missing of a run's evaluation. Raises CalledProcessError if it fails or is incomplete."""
    if not (out / "evaluation.json").is_file():
        take_over(run / "eval" / "after", out)
    if not (out / "result.json").is_file():
        _carry_out([*words_for(run), "--out", str(out), "--resume"], out)


def words_for(run: Path) -> list[str]:
    """Return the words of the `vlafit` command that plays the whole evaluation of a run."""
    return ["eval", str(run), "--protocol", PROTOCOL, "--videos", "0", "--workers", "1"]


def _carry_out(words: Sequence[str], folder: Path) -> None:
    if status := carry_out(words, folder):
        raise subprocess.CalledProcessError(status, ["vlafit", *words])


def take_over(earlier: Path, out: Path) -> None:
    """Begin the evaluation in `out` with the episodes of an earlier one that has fewer starts.

    Raises VlafitError if its protocol differs in more than the number of starts.
    """
    protocol, header = load_protocol(PROTOCOL), read(earlier / "evaluation.json")
    identity = header["identity"]
    before = build(Protocol, identity["protocol"], str(earlier / "evaluation.json"))
    if replace(before, name=protocol.name, trials=protocol.trials).sha256() != protocol.sha256():
        raise VlafitError(
            f"{earlier}: its protocol {before.name} is not {PROTOCOL} with fewer starts; train the run again "
            "into other folders (--runs, --results)"
        )
    folder = EvaluationFolder(
        out,
        {
            **identity,
            "protocol": protocol.to_json(),
            "protocol_sha256": protocol.sha256(),
            "trials": protocol.trials,
        },
    )
    folder.adopt(header["environment"])
    kept = [
        line for line in read_lines(earlier / "episodes.jsonl") if line["trial"] < identity["trials"] - AGAIN
    ]
    files.write_atomic(out / "episodes.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def require_equal(published: Path, played: Path) -> None:
    """Raise VlafitError unless the longer evaluation has all published episodes, equal but for the time."""
    lines = {(line["task"], line["seed"]): line for line in read_lines(played)}
    for line in read_lines(published):
        found = lines.get((line["task"], line["seed"]), {})
        if differ := [key for key in line if key != "wall_s" and found.get(key) != line[key]]:
            listed = "; ".join(f"{key} is {found.get(key)!r}, published {line[key]!r}" for key in differ)
            raise VlafitError(
                f"{played}: {line['task']}, seed {line['seed']}, is not as published: {listed}. Another "
                "machine may round otherwise: publish your own runs into another folder (--results)"
            )


def draw(results: Path) -> None:
    """Draw the success of strategies, of starting points, and of both, once all runs have been played."""
    few_demonstrations_strategies.draw(results / "strategies")
    found = runs_by_seed(results / "starts")
    starts = {label: found[recipe] for recipe, label in RECIPES.items() if recipe in found}
    if not starts or evaluation_of(every(starts)) != LONG:
        return
    path = results / "starts" / f"figure_{LONG}.png"  # `make few-demonstrations` writes figure.png
    arms = [arm(label, of) for label, of in starts.items()]
    files.write_atomic(path, ablation_figure(arms, few_demonstrations_strategies.TITLE))
    tuned = few_demonstrations_strategies.published(results / "strategies")
    if evaluation_of(every(tuned)) == LONG:
        named = [(f"checkpoint, {name.partition('-lr-')[0]}", of) for name, of in tuned.items()]
        named += [(f"{label}, full", of) for label, of in list(starts.items())[1:]]
        first, *others = (arm(f"{label} at {rate_of(of):g}", of) for label, of in named)
        others.sort(key=lambda one: -sum(score.successes for score in one.scores))
        files.write_atomic(results / "figure.png", ablation_figure([first, *others], ALL))


def arm(label: str, runs: Mapping[int, Path]) -> Arm:
    """Return the long evaluation of a recipe's runs."""
    return Arm(label, tuple(score_of(run, LONG) for run in runs.values()))


def rate_of(runs: Mapping[int, Path]) -> float:
    """Return the learning rate of a recipe's runs."""
    return read(next(iter(runs.values())) / "report.json")["recipe"]["optim"]["lr"]


if __name__ == "__main__":
    sys.exit(main())
