"""Search for settings in which starting weights or tuning strategies differ: few demonstrations, few steps.

    python eval/few_demonstrations.py [--only WORD ...] [--most N] [--runs DIR] [--results DIR]

A point is one training run and its success: tasks, starting weights, strategy, demonstrations of each task,
steps, learning rate and training seed. Every point plays the same 48 or 50 starts, of seeds from 50000 on,
from which no published result is judged; seeds 3 to 5 of training are those of no published run. A point
that is finished is not played again, so the same command continues after an interruption; `--most 1` plays
one point and stops. Each is a line of search.jsonl in the results folder, with its command, every outcome
and what it took, whatever it shows; `python eval/readme.py` makes the tables from it, `python
eval/few_demonstrations_figure.py` the picture.

Other tasks than the faucets are recorded first: `vlafit record metaworld-related`, `vlafit record
metaworld-distant`.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training_run import carry_out, cpu_of, is_finished, words_of

from vlafit import files

HERE = Path(__file__).parent
FIRST_SEED = 50000  # of the starts of every point; published results start from 60000 and above
RECIPES = {
    "full checkpoint": "quickstart",
    "fresh expert": "quickstart-fresh-expert",
    "untrained": "quickstart-untrained",
}
TASKS = {  # card, tasks, starts of each, longest episode
    "faucet": ("metaworld-faucet", ("faucet-open-v3", "faucet-close-v3"), 25, 150),
    "distant": (
        "metaworld-distant",
        ("coffee-push-v3", "hammer-v3", "handle-pull-v3", "lever-pull-v3", "soccer-v3", "sweep-into-v3"),
        8,
        200,
    ),
    "related": (
        "metaworld-related",
        (
            "button-press-topdown-wall-v3",
            "button-press-wall-v3",
            "faucet-close-v3",
            "faucet-open-v3",
            "plate-slide-back-side-v3",
            "plate-slide-back-v3",
        ),
        8,
        150,
    ),
}
LORA_RANK_2 = "eval/results/few-demonstrations/lora-rank-2.toml"  # beside its results: nobody else needs it
PROGRESSIVE = "eval/results/few-demonstrations/progressive-short.toml"


@dataclass(frozen=True)
class Point:
    """One setting: what is learned, from what, how, and from how much."""

    tasks: str
    start: str
    demonstrations: int
    steps: int
    lr: float = 5e-4
    strategy: str = "full"
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of its folder."""
        strategy = Path(self.strategy).stem
        parts = [self.tasks, self.start.replace(" ", "-"), strategy, f"{self.demonstrations}-demonstrations"]
        seed = [f"seed{self.seed}"] if self.seed else []
        return "-".join([*parts, f"{self.steps}-steps", f"lr-{self.lr:g}", *seed])


def grid(
    tasks: str, demonstrations: tuple[int, ...], steps: tuple[int, ...], lr: tuple[float, ...] = (5e-4,)
) -> Iterator[Point]:
    """Yield every start at every combination."""
    for rate, n, s, start in itertools.product(lr, demonstrations, steps, RECIPES):
        yield Point(tasks, start, n, s, rate)


OWN_RATES = {"full checkpoint": 2e-3, "fresh expert": 1e-2, "untrained": 5e-3}
"""The best of three learning rates for each start, with five demonstrations and 30 steps."""


def at_own_rates(tasks: str, demonstrations: tuple[int, ...], steps: tuple[int, ...]) -> Iterator[Point]:
    """Yield every start at every combination, each at its own learning rate."""
    for n, s, (start, rate) in itertools.product(demonstrations, steps, OWN_RATES.items()):
        yield Point(tasks, start, n, s, rate)


STRATEGIES = ("full", "expert", "lora", LORA_RANK_2, "dora", PROGRESSIVE, "frozen-vision")
SEEDS = (3, 4, 5)  # of training, which draw other demonstrations than those of published runs


def of_strategies(
    tasks: str,
    demonstrations: int,
    steps: int,
    lr: tuple[float, ...],
    strategies: tuple[str, ...] = STRATEGIES,
    seeds: tuple[int, ...] = (0,),
) -> Iterator[Point]:
    """Yield every strategy from the full checkpoint at every learning rate with every training seed."""
    for rate, strategy, seed in itertools.product(lr, strategies, seeds):
        yield Point(tasks, "full checkpoint", demonstrations, steps, rate, strategy, seed)


PLAN = tuple(
    dict.fromkeys(
        [
            *grid("faucet", (5,), (60,), (5e-4, 2e-3)),
            *grid("faucet", (5,), (30,), (2e-3,)),
            *grid("related", (5,), (60,), (2e-3,)),
            *grid("related", (5,), (60,), (1e-3, 5e-3)),
            *grid("related", (5,), (200,), (2e-3,)),
            *grid("related", (20,), (60,), (2e-3,)),
            *of_strategies("related", 5, 60, (2e-3,)),
            *grid("distant", (25,), (200,), (2e-3,)),
            *grid("distant", (25,), (600,), (1e-3,)),
            *grid("faucet", (1,), (60,), (2e-3,)),
            *grid("faucet", (5,), (30,), (5e-3, 1e-2)),
            *grid("faucet", (25,), (60,), (2e-3,)),
            *of_strategies("faucet", 5, 30, (2e-3, 1e-3, 5e-3, 1e-2)),
            *grid("related", (20,), (200,), (1e-3,)),
            *of_strategies("faucet", 5, 30, (5e-4, 1e-3, 2e-3, 5e-3), ("lora",), SEEDS),
            *of_strategies("faucet", 5, 30, (1e-3, 2e-3), ("full", "dora", PROGRESSIVE, "expert"), SEEDS),
            *of_strategies("faucet", 5, 30, (2e-3, 5e-3), (LORA_RANK_2,), SEEDS),
            *at_own_rates("faucet", (10, 25), (30,)),
            *at_own_rates("faucet", (5,), (15, 60, 120)),
        ]
    )
)


def main() -> int:
    """Play what is missing, and write every finished point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="points whose name has all of these words"
    )
    parser.add_argument("--most", type=int, default=len(PLAN), help="points to play before stopping")
    parser.add_argument("--runs", type=Path, default=Path("runs/few-demonstrations"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "few-demonstrations")
    parser.add_argument("--trials", type=int, help="starts of each task [25 of faucet, 8 of others]")
    options = parser.parse_args()
    chosen = [point for point in PLAN if all(word in point.name for word in options.only)]
    missing = [point for point in chosen if not is_finished(options.runs / point.name)]
    for point in missing[: options.most]:
        play(point, options.runs, options.trials)
        write(options.runs, options.results)
    write(options.runs, options.results)
    return 0


def play(point: Point, runs: Path, trials: int | None) -> None:
    """Carry out or continue one point on one core. Raises CalledProcessError if it fails."""
    words = words_for(point, runs, trials)
    if status := carry_out(words, runs / point.name):
        raise subprocess.CalledProcessError(status, ["vlafit", *words])


def words_for(point: Point, runs: Path, trials: int | None) -> list[str]:
    """Return the words of the point's `vlafit train`."""
    fields = {
        "data.cards": TASKS[point.tasks][0],
        "data.episodes_per_task": point.demonstrations,
        "strategy": point.strategy,
        "optim.lr": f"{point.lr:g}",
        "optim.warmup_steps": max(10, point.steps // 10),
        "train.steps": point.steps,
        "train.batch_size": 32,
        "train.validate_every": 0,
        "train.save_every": point.steps,
        "train.threads": 1,
        "eval.protocol": protocol(point.tasks, runs, trials),
        "eval.before": "false",
        "eval.wrong_instruction": "false",
        "eval.videos": 0,
        "eval.workers": 1,
    }
    words = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    return words_of(RECIPES[point.start], point.seed, runs / point.name, *words)


def protocol(tasks: str, runs: Path, trials: int | None) -> Path:
    """Write the protocol of the search for some tasks, and return its file."""
    _, names, starts, horizon = TASKS[tasks]
    path = runs / f"{tasks}-search.toml"
    lines = [
        'base = "metaworld-faucet-open"',
        f'name = "{path.stem}"',
        'purpose = "Starts that no published result is judged from."',
        f"tasks = {json.dumps(names)}",
        f"trials = {trials or starts}",
        f"first_seed = {FIRST_SEED}",
        f"horizon = {horizon}",
    ]
    runs.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, "\n".join(lines) + "\n")
    return path


def write(runs: Path, results: Path) -> None:
    """Write search.jsonl: one line for each finished point of the plan, in its order.

    A point that it has already and that was played elsewhere stays.
    """
    path = results / "search.jsonl"
    earlier = {point_of(line): line for line in files.read_json_lines(path)}
    played = {point: found(point, runs) for point in PLAN if is_finished(runs / point.name)}
    lines = [json.dumps({**earlier, **played}[point]) for point in PLAN if point in earlier | played]
    results.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, "".join(f"{line}\n" for line in lines))


def point_of(line: dict[str, Any]) -> Point:
    """Return the point that a line of search.jsonl is of."""
    return Point(**{field.name: line[field.name] for field in dataclasses.fields(Point)})


def found(point: Point, runs: Path) -> dict[str, Any]:
    """Return what a finished point shows, and how it was made."""
    run = runs / point.name
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    after = report["evaluations"]["after"]
    of_task: dict[str, str] = {}
    for episode in after["episodes"]:  # in the order of the starts; e: an error of the environment
        letter = "e" if episode["error"] else str(int(episode["success"]))
        of_task[episode["task"]] = of_task.get(episode["task"], "") + letter
    metrics = report["training"]["metrics"]
    times = files.read_json_lines(cpu_of(run))  # none if the search was killed before it was written
    return {
        **asdict(point),
        **{key: report["success"]["after"][key] for key in ("successes", "episodes", "errors")},
        "first_start": FIRST_SEED,
        "outcomes": of_task,
        "validation_loss": round(metrics["validation/loss"]["last"], 4),
        "cpu_s": round(sum(line["cpu_s"] for line in times), 1) or None,
        "protocol_sha256": after["protocol_sha256"],
        "actor": after["actor"],
        "versions": {key: after["versions"][key] for key in ("mujoco", "metaworld", "torch")},
        "command": facts["command"].replace(f"{Path.cwd()}/", ""),
    }


if __name__ == "__main__":
    sys.exit(main())
