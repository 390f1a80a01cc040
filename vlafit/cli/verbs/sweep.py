"""`vlafit sweep RECIPE --study FILE`: search fields of a recipe, or of its strategy's rules, with Optuna."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlafit import shipped
from vlafit.cli.console import table
from vlafit.cli.parser import Parser, within
from vlafit.cli.recipes import read_recipe, without

if TYPE_CHECKING:
    from vlafit.recipe import Recipe
    from vlafit.sweep import Study, SweepResult

ABOUT = """\
Search for the values of a recipe's fields, or of a strategy's rules, that give the lowest validation loss. A
study is a TOML file:

    trials = 20
    [search]
    "optim.lr" = { low = 1e-5, high = 1e-3, log = true }
    "rule.rank" = { choices = [4, 8, 16] }

Trials are ordinary runs in DIR/trials, stopped early if they fall behind. The same command resumes a sweep
that was stopped, and --trials asks for more. Several commands, or --workers, share DIR; the trial of a worker
that dies is tried again. Every field of the recipe is also an option."""
USAGE = "--study FILE [--trials N] [--workers N] --out DIR"


def run(arguments: Sequence[str]) -> int:
    """Run or resume a sweep, and print its trials.

    Returns 130 if a signal stopped it, 1 if trials failed and none is complete.
    """
    recipe, study, options = read(arguments)
    command = shlex.join(["vlafit", "sweep", *arguments])
    from vlafit import sweep
    from vlafit.compare.process import vlafit

    requested = sweep.Sweep(recipe, study, Path(options.out))
    finished = sweep.run(
        requested,
        str(shipped.find("study", options.study)),
        workers=options.workers,
        worker_command=lambda: vlafit("sweep", *without(arguments, "--workers"), "--workers", "1"),
        tell=lambda line: print(line, flush=True),
    )
    result = sweep.read(requested, command)
    page = sweep.write(result)
    print(describe(result))
    print(f"report: {page}")
    if not finished:
        return 130
    if result.broken and result.best is None:
        print("no trial completed; fix the errors above, and choose another --out", file=sys.stderr)
        return 1
    return 0


def read(arguments: Sequence[str]) -> tuple["Recipe", "Study", Any]:
    """Return the recipe, the study with the command line's values, and the other options."""
    recipe, options = read_recipe("sweep", ABOUT, USAGE, arguments, _options)
    from vlafit.sweep import load_study

    study = load_study(options.study)
    changes = {
        name: getattr(options, name) for name in ("trials", "seed") if getattr(options, name) is not None
    }
    return recipe, dataclasses.replace(study, **changes), options


def _options(parser: Parser) -> None:
    names = ", ".join(shipped.names("study"))
    parser.add_argument(
        "--study", metavar="FILE", required=True, help=f"a TOML file, or a shipped one: {names}"
    )
    parser.add_argument(
        "--trials",
        metavar="N",
        type=within(1, 10**6),
        help="total number of trials, with earlier ones [the study's]",
    )
    parser.add_argument(
        "--seed", metavar="N", type=within(0, 2**63 - 1), help="seed of the sampler [the study's]"
    )
    parser.add_argument(
        "--workers", metavar="N", type=within(1, 1024), default=1, help="processes that run trials [1]"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the sweep")


def describe(result: "SweepResult") -> str:
    """Return the table of trials, the best first, and the command that trains the best again."""
    from vlafit.sweep.report import value_text

    names = list(result.sweep.study.search)
    rows = [
        (
            t.number,
            *(value_text(t.values[n]) if n in t.values else "" for n in names),
            "" if t.loss is None else value_text(t.loss),
            t.label,
        )
        for t in result.ordered
    ]
    lines = [table(("trial", *names, "last loss", "state"), rows)]
    lines += [f"trial {number} failed: {error}" for number, error in result.broken.items()]
    lines += result.notes()
    return "\n".join([*lines, *([f"train the best again: {result.train_again()}"] if result.best else [])])
