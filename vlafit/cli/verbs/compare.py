"""`vlafit compare RECIPE --strategies A,B,...`: which way of tuning to choose, with the evidence for it."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlafit import shipped
from vlafit.cli.console import Line, number, size, table
from vlafit.cli.parser import Parser
from vlafit.cli.recipes import given, numbers, read_recipe
from vlafit.errors import ConfigError

if TYPE_CHECKING:
    from vlafit.compare import Comparison, Options
    from vlafit.recipe import Recipe

ABOUT = """\
Train a recipe under several tuning strategies, each with several seeds, and report what that allows to say.
All arms have the same data order, validation noise and budget; with --lr-grid each strategy takes its own
best learning rate. Arms are ordinary runs in processes of their own below DIR/arms. A finished one is never
run again: the same command goes on with a comparison that was stopped. Fields of the recipe are options."""
USAGE = "--strategies A,B,... [--seeds N] [--lr-grid X,Y,...] [--budget-... N] [--jobs N] --out DIR"


def run(arguments: Sequence[str]) -> int:
    """Carry out or go on with a comparison, and say what came out.

    Returns 130 when a signal stopped it, 1 where an arm broke.
    """
    recipe, options, out = read(arguments)
    command = shlex.join(["vlafit", "compare", *arguments])
    from vlafit import compare

    with Line("arms", 1) as line:
        found = compare.run(recipe, options, out, command=command, observer=_view(line, out))
    compare.write(found)
    print(describe(found))
    if found.missing:
        print(f"stopped with {len(found.missing)} arms to go; the same command goes on")
        return 130
    if found.broken:
        names = ", ".join(record.name for record in found.broken)
        print(f"did not finish: {names}; the same command tries them again", file=sys.stderr)
        return 1
    return 0


def read(arguments: Sequence[str]) -> tuple["Recipe", "Options", Path]:
    """Return the recipe with budget and overrides in it, what to compare, and where."""
    recipe, options = read_recipe("compare", ABOUT, USAGE, arguments, _options)
    if given(arguments, "--strategy"):
        raise ConfigError("--strategy means nothing to compare; give --strategies")
    if options.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, is {options.seeds}")
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
    parser.add_argument("--strategies", metavar="A,B,...", required=True, help=f"TOML files, or of: {names}")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="seeds, from train.seed on [3]")
    parser.add_argument(
        "--lr-grid",
        metavar="X,Y,...",
        default="",
        help="learning rates to try for each strategy [the recipe's]",
    )
    parser.add_argument(
        "--lr-all-seeds",
        action="store_true",
        help="try the learning rates with all seeds, not the first alone",
    )
    parser.add_argument(
        "--budget-steps", metavar="N", type=int, help="optimiser steps of each arm [the recipe's]"
    )
    parser.add_argument(
        "--budget-samples", metavar="N", type=int, help="training samples of each arm instead"
    )
    parser.add_argument("--budget-seconds", metavar="S", type=float, help="training time of each arm instead")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="arms at once [1]")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the comparison")


def _view(line: Line, out: Path) -> Any:
    from vlafit.compare import Observer
    from vlafit.compare.record import AFTER, Record
    from vlafit.compare.run import log_of

    class View(Observer):
        """Moves the line, and leaves one behind for each arm that ended now."""

        def phase(self, name: str, arms: int) -> None:
            line.what, line.total, line.done = name, max(1, arms), 0

        def arm(self, name: str, record: Record, fresh: bool) -> None:
            line.update(line.done + 1, name)
            if not fresh:
                return
            found = record.figures
            if found is None:
                line.say(f"{name}: BROKE: {(record.error or '').strip()}\nlog: {log_of(out, name)}")
                return
            score, loss = found.score(AFTER), found.last()
            parts = [f"validation {number(loss)}" if loss is not None else "", str(score) if score else ""]
            line.say(f"{name}: {', '.join(part for part in parts if part)}")

    return View()


def describe(found: "Comparison") -> str:
    """Return the table and the verdict as text."""
    from vlafit.compare import summary
    from vlafit.compare.arms import rate
    from vlafit.compare.judge import AFTER

    verdict, why = summary.verdict_of(found), summary.did_not_finish(found)
    rows = []
    for one in found.standings:
        score, loss = one.pooled(AFTER), list(one.losses().values())
        rows.append(
            (
                one.strategy,
                "" if one.lr is None else rate(one.lr),
                size(max(f.trainable for f in one.figures)) if one.figures else "",
                "" if one.peak is None else f"{one.peak / 1e6:.0f} MB",
                number(one.samples_per_s) if one.figures else "",
                number(sum(loss) / len(loss)) if loss else "",
                str(score or ("" if one.figures else "did not finish" if one.strategy in why else "")),
            )
        )
    heads = ("strategy", "lr", "trained", "peak memory", "samples/s", "last loss", "success")
    lines = [table(heads, rows), *(f"{name} did not finish: {said}" for name, said in why.items())]
    lines.append(verdict.sentence)
    if verdict.recommended:
        lines.append(f"recommended: {verdict.recommended}: {verdict.reason}")
    lines += [*verdict.notes, *summary.notes(found), *summary.caveats(found)]
    return "\n".join([*lines, f"report: {found.folder / 'compare.html'}"])
