"""`vlafit compare RECIPE --strategies A,B,...`: compare tuning strategies and recommend one."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlafit import shipped
from vlafit.cli.console import Line, number, size, table
from vlafit.cli.parser import MOST_STEPS, Parser, within
from vlafit.cli.recipes import has_option, numbers, read_recipe
from vlafit.errors import ConfigError

if TYPE_CHECKING:
    from vlafit.compare import Comparison, Options
    from vlafit.recipe import Recipe

ABOUT = """\
Train a recipe under several tuning strategies, each with several seeds, and compare their success. All arms
have the same data order, validation noise and budget; with --lr-grid each strategy takes its own best
learning rate. Arms are ordinary runs in child processes, in DIR/arms. A finished arm is never run again: the
same command resumes a comparison that was stopped. Every field of the recipe is also an option."""
USAGE = "--strategies A,B,... [--seeds N] [--lr-grid X,Y,...] [--budget-... N] [--jobs N] --out DIR"


def run(arguments: Sequence[str]) -> int:
    """Run or resume a comparison, and print its result.

    Returns 130 if a signal stopped it, 1 if an arm failed.
    """
    recipe, options, out = read(arguments)
    command = shlex.join(["vlafit", "compare", *arguments])
    from vlafit import compare

    with Line("arms", 1) as line:
        comparison = compare.run(recipe, options, out, command=command, observer=_view(line, out))
    compare.write(comparison)
    print(describe(comparison))
    if comparison.missing:
        print(f"stopped with {len(comparison.missing)} arms left; the same command resumes the comparison")
        return 130
    if comparison.broken:
        names = ", ".join(record.name for record in comparison.broken)
        print(f"did not finish: {names}; the same command tries them again", file=sys.stderr)
        return 1
    return 0


def read(arguments: Sequence[str]) -> tuple["Recipe", "Options", Path]:
    """Return the recipe with budget and overrides, the options of the comparison, and its folder."""
    recipe, options = read_recipe("compare", ABOUT, USAGE, arguments, _options)
    if has_option(arguments, "--strategy"):
        raise ConfigError("`vlafit compare` ignores --strategy; use --strategies")
    from vlafit.compare import Options, with_budget

    recipe = with_budget(
        recipe, steps=options.budget_steps, samples=options.budget_samples, seconds=options.budget_seconds
    )
    first = recipe.train.seed
    chosen = Options(
        strategies=tuple(word for word in options.strategies.split(",") if word),
        seeds=tuple(range(first, first + options.seeds)),
        lr_grid=numbers(options.lr_grid, "--lr-grid"),
        grid_seeds=options.seeds if options.lr_all_seeds else 1,
        jobs=options.jobs,
    )
    return recipe, chosen, Path(options.out)


def _options(parser: Parser) -> None:
    names = ", ".join(shipped.names("strategy"))
    parser.add_argument(
        "--strategies", metavar="A,B,...", required=True, help=f"TOML files, or shipped ones: {names}"
    )
    parser.add_argument(
        "--seeds", metavar="N", type=within(1, 1024), default=3, help="seeds, from train.seed on [3]"
    )
    parser.add_argument(
        "--lr-grid",
        metavar="X,Y,...",
        default="",
        help="learning rates to try for each strategy [the recipe's]",
    )
    parser.add_argument(
        "--lr-all-seeds",
        action="store_true",
        help="try the learning rates with all seeds, not only the first",
    )
    parser.add_argument(
        "--budget-steps",
        metavar="N",
        type=within(1, MOST_STEPS),
        help="optimiser steps of each arm [the recipe's]",
    )
    parser.add_argument(
        "--budget-samples", metavar="N", type=within(1, 10**12), help="training samples of each arm instead"
    )
    parser.add_argument(
        "--budget-seconds",
        metavar="S",
        type=within(0, 10**8, float, above=True),
        help="training time of each arm instead",
    )
    parser.add_argument("--jobs", metavar="N", type=within(1, 1024), default=1, help="arms at once [1]")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the comparison")


def _view(line: Line, out: Path) -> Any:
    from vlafit.compare import Observer
    from vlafit.compare.arm_record import AFTER, ArmRecord
    from vlafit.compare.comparison import log_of

    class View(Observer):
        """Updates the progress line, and prints a line for each arm that this command ran."""

        def phase(self, name: str, arms: int) -> None:
            line.what, line.total, line.done = name, max(1, arms), 0

        def arm(self, name: str, record: ArmRecord, fresh: bool) -> None:
            line.update(line.done + 1, name)
            if not fresh:
                return
            figures = record.figures
            if figures is None:
                line.say(f"{name}: FAILED: {(record.error or '').strip()}\nlog: {log_of(out, name)}")
                return
            score, loss = figures.score(AFTER), figures.last()
            parts = [f"validation {number(loss)}" if loss is not None else "", str(score) if score else ""]
            line.say(f"{name}: {', '.join(part for part in parts if part)}")

    return View()


def describe(comparison: "Comparison") -> str:
    """Return the table and the verdict as text."""
    from vlafit.compare import summary
    from vlafit.compare.arm_record import AFTER
    from vlafit.compare.arms import rate

    verdict, failures = summary.verdict_of(comparison), summary.did_not_finish(comparison)
    rows = []
    for standing in comparison.standings:
        score, loss = standing.pooled(AFTER), list(standing.losses().values())
        figures = standing.figures
        state = "" if figures else "did not finish" if standing.strategy in failures else ""
        rows.append(
            (
                standing.strategy,
                "" if standing.lr is None else rate(standing.lr),
                size(max(f.trainable for f in figures)) if figures else "",
                "" if standing.peak is None else f"{standing.peak / 1e6:.0f} MB",
                number(standing.samples_per_s) if figures else "",
                number(sum(loss) / len(loss)) if loss else "",
                str(score or state),
            )
        )
    heads = ("strategy", "lr", "trained", "peak memory", "samples/s", "last loss", "success")
    lines = [table(heads, rows), *(f"{name} did not finish: {text}" for name, text in failures.items())]
    lines.append(verdict.sentence)
    if verdict.recommended:
        lines.append(f"recommended: {verdict.recommended}: {verdict.reason}")
    lines += [*verdict.notes, *summary.notes(comparison), *summary.caveats(comparison)]
    return "\n".join([*lines, f"report: {comparison.folder / 'compare.html'}"])
