"""Measure on this GPU every figure that the project states of GPUs, with the aim of each: one command.

    python -m benchmarks.gpu                # all, some 45 minutes on an H100; again: what is left
    python -m benchmarks.gpu --plan         # only the commands, with batches that fit this card, or 80 GB
    python -m benchmarks.gpu --out gpu --device cpu --tiny --only "pi0 acts"     # checks the script itself
    python -m benchmarks.gpu --write        # only writes the table of docs/gpus.md again, from --out

Run it in the repository's root. Each row is one of `benchmarks.train` or `benchmarks.act`, most important
first (`benchmarks/gpu_figures.py`), and is added to train.jsonl or act.jsonl in --out at once. A row that is
there for this card and commit is not measured again, so a stopped run goes on, and so does one whose --budget
of seconds was spent. A row that fails, or takes longer than --row-limit, has its error in the table and is
tried again by the next run; it ends no other. page.md in --out is the table of this card and commit; the
table of aims in docs/gpus.md is made of the newest row for each card.

Where a row names no batch, it is the largest whose forecast leaves 8 % of the card free. A row of the
forecast of memory that does not fit the card is left out, and the page says so. int8 and fp8 need torchao.
"""

import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import act, rows, train
from benchmarks.gpu_figures import FIGURES, FORECAST, FORECASTS, IDENTITY, Figure
from benchmarks.rows import Row
from vlafit import files

FREE = 0.08  # of the card, for what the forecast does not know
BATCHES = (1, 2, 4, 6, 8, 16, 24, 32, 48, 64)
MODULES = {"train": train, "act": act}
TINY = {
    "pi0": "pi0-tiny",
    "pi05": "pi05-small",
    "smolvla": "smolvla-tiny",
}  # pi05-tiny has no room for a prompt
COLUMNS = (
    "what", "command", "samples_per_s", "p50_ms", "p99_ms", "peak_gb", "forecast_error", "mfu", "kernels",
    "launches", "device_busy_ms", "difference", "aim", "met",
)  # fmt: skip
AIM_COLUMNS = ("what", "aim", "reached", "met")
DOCUMENT = Path("docs/gpus.md")
BEGIN, END = "<!-- written by python -m benchmarks.gpu --write -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Planned:
    """A row of the plan: its figure, its command, and its point; or why there is none."""

    figure: Figure
    command: str
    options: Namespace | None = None
    point: Row | None = None
    refused: str = ""


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the commands, and measure nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny policies and two steps, on any device")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this in it")
    parser.add_argument("--write", action="store_true", help=f"write the table of {DOCUMENT}, and end")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which no row is begun")
    parser.add_argument("--row-limit", type=float, default=900.0, help="seconds that a row may take [900]")
    parser.add_argument("--commit", default="", help="of the code, where its folder is no repository")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    options = parser.parse_args()
    if options.write:
        write_document(list(rows_in(options.out)))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available() and not options.plan:
        parser.error("no GPU is here; --device cpu --tiny checks the script itself")
    figures = [figure for figure in (*FIGURES, *FORECASTS) if options.only in figure.name]
    plan = planned_ahead(figures, options, memory_of(device))
    if options.plan:
        for one in plan:
            print(f"{one.figure.name}: {one.command}{f' ({one.refused})' if one.refused else ''}", flush=True)
        return 0
    facts = rows.machine(device, options.commit)
    done = {key(row): row for row in measured_before(options.out, facts)}
    so_far: list[Planned] = []
    for one in measured(plan, done, options):
        so_far.append(one)
        files.write_atomic(options.out / "page.md", page(so_far, figures, done, facts))
    print((options.out / "page.md").read_text())
    if device.type == "cuda" and not options.tiny:
        write_document(list(rows_in(options.out)))
    return 1 if any("error" in row for row in done.values()) else 0


def measured(plan: Iterable[Planned], done: dict[str, Row], options: Namespace) -> Iterator[Planned]:
    """Yield each row of the plan, whose row is in `done` then, unless the budget was spent before it."""
    began, spent = time.perf_counter(), False
    for number, one in enumerate(plan, 1):
        spent = spent or bool(options.budget and time.perf_counter() - began > options.budget)
        if one.point is not None and one.options is not None and key(one.point) not in done and not spent:
            print(f"row {number}: {one.figure.name}", flush=True)
            (done[key(one.point)],) = MODULES[one.figure.benchmark].measure_all([one.point], one.options)
        yield one
    if spent:
        print("--budget is spent: the same command measures the rest", flush=True)


def planned_ahead(figures: Sequence[Figure], options: Namespace, memory: float) -> Iterator[Planned]:
    """Yield the plan's rows in their order; forecasts of later ones are made while others are measured."""
    if options.tiny:
        yield from (planned(figure, options, memory) for figure in figures)
        return
    workers = max(1, min(6, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        made = [pool.submit(planned, figure, options, memory) for figure in figures]
        for future in made:
            yield future.result()


def planned(figure: Figure, options: Namespace, memory: float) -> Planned:
    """Return the row's command, and its point as its benchmark reads it."""
    words = figure.words.split()
    if options.tiny:
        words = [TINY.get(word, word) for word in words]
        words += [] if "--sizes" in words else ["--sizes", "pi0-tiny"]
        words += ["--warm-up", "1", *(["--steps", "2"] if figure.benchmark == "train" else ["--calls", "2"])]
    command = f"python -m benchmarks.{figure.benchmark} {' '.join(words)}"
    module = MODULES[figure.benchmark]
    try:
        if figure.benchmark == "train" and "--batch" not in words:
            words += ["--batch", "3" if options.tiny else str(largest_batch(words, memory))]
            command = f"{command} {' '.join(words[-2:])}"
        run = ["--device", options.device, "--out", str(options.out / f"{figure.benchmark}.jsonl")]
        run += ["--commit", options.commit] if options.commit else []
        parsed = module.parser().parse_args([*words, *run, "--row-limit", str(options.row_limit)])
        (point,) = module.points_of(parsed)
        if figure in FORECASTS and not options.tiny:
            needed = train.forecast_of(point).total
            if needed > (1 - FREE) * memory:
                return Planned(figure, command, refused=f"{needed / 1e9:.1f} GB by its forecast do not fit")
    except (Exception, SystemExit) as error:  # of any kind: the other rows go on
        return Planned(figure, command, refused=f"cannot be planned: {type(error).__name__}: {error}")
    return Planned(figure, command, parsed, point)


def largest_batch(words: list[str], memory: float) -> int:
    """Return the largest of BATCHES that the forecast lets fit; 1 where none does, whose row then says so."""

    def too_large(batch: int) -> bool:
        (point,) = train.points_of(train.parser().parse_args([*words, "--batch", str(batch)]))
        return train.forecast_of(point).total > (1 - FREE) * memory

    return BATCHES[max(0, bisect_left(BATCHES, True, key=too_large) - 1)]


def memory_of(device: torch.device) -> float:
    """Return the bytes of the device; where there is no GPU, those of a card of 80 GB."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 80e9
    return float(torch.cuda.get_device_properties(device).total_memory)


def rows_in(out: Path) -> Iterator[Row]:
    """Yield the rows in `out`. A line that a stopped run wrote in part is named and left out."""
    for path in (out / "train.jsonl", out / "act.jsonl"):
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                print(f"{path}: line {number} was not written to its end; it is left out", file=sys.stderr)
                continue
            yield row


def measured_before(out: Path, facts: Row) -> Iterator[Row]:
    """Yield the rows in `out` that were measured without an error on this card with this commit."""
    for row in rows_in(out):
        if "error" not in row and all(row.get(fact) == facts[fact] for fact in ("card", "commit")):
            yield row


def key(row: Row) -> str:
    """Return what a row was asked to measure, as text."""
    asked = (
        "size strategy shape batch recompute states copies set limit warm_up device dtype mode steps calls"
    )
    return json.dumps([row.get(name) for name in asked.split()])


def page(plan: Sequence[Planned], figures: Sequence[Figure], done: Mapping[str, Row], facts: Row) -> str:
    """Return the table of what was measured on this card, in Markdown, and what was not."""
    shown: list[Row] = []
    missing: list[str] = []
    for one in (*plan, *(Planned(figure, "") for figure in figures[len(plan) :])):
        row = None if one.point is None else done.get(key(one.point))
        if row is None:
            missing.append(f"- {one.figure.name}: {one.refused or 'not measured yet'}")
            continue
        aims = one.figure.aims
        said = {"what": one.figure.name, "command": f"`{one.command}`"}
        said["aim"] = "; ".join(aim.words for aim in aims)
        said["met"] = "; ".join(aim.met(row) or "-" for aim in aims)
        shown.append(row | said)
    dated = ", ".join(str(facts[name]) for name in ("card", "torch", "commit", "date"))
    parts = ["# Figures of this GPU", dated, rows.table(shown, COLUMNS)]
    parts += ["Without a row:", "\n".join(missing)] if missing else []
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------- the table of the documents


def write_document(measured: Sequence[Row], document: Path = DOCUMENT) -> None:
    """Write the table of aims between its two marks in the document."""
    text = document.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"{document}: has no place for the table, between {BEGIN.strip()} and {END.strip()}")
    files.write_atomic(document, f"{before}{BEGIN}{aims_table(measured)}{END}{after}")


def aims_table(measured: Sequence[Row]) -> str:
    """Return what was reached of each aim, by card and date, in Markdown: the newest row of each card."""
    wanted = [
        (figure.name, aim, newest_by_card(figure, measured))
        for figure in FIGURES
        for aim in figure.aims
        if aim != FORECAST
    ]
    wanted.append(("memory, without compiling: the largest error", FORECAST, worst_forecasts(measured)))
    lines = []
    for name, aim, found in wanted:
        of_its_cards = [row for row in found if aim.met(row)]
        if of_its_cards:
            reached = [f"{row[aim.column]:.3g} ({_card(row)}, {_day(row)})" for row in of_its_cards]
            met = ", ".join(dict.fromkeys(aim.met(row) for row in of_its_cards))
            lines.append({"what": name, "aim": aim.words, "reached": "; ".join(reached), "met": met})
    return f"{rows.table(lines, AIM_COLUMNS)}\n"


def _card(row: Row) -> str:
    return str(row["card"]).removeprefix("NVIDIA ").split(" 80GB")[0]


def _day(row: Row) -> str:
    return str(row["date"]).split()[0]


def newest_by_card(figure: Figure, measured: Sequence[Row]) -> list[Row]:
    """Return the newest row of each card that measured the figure."""
    module = MODULES[figure.benchmark]
    (point,) = module.points_of(module.parser().parse_args(figure.words.split()))
    found: dict[str, Row] = {}
    for row in sorted(measured, key=lambda row: str(row["date"])):
        same = all(asked(row, name) == asked(point, name) for name in IDENTITY)
        if same and "error" not in row and row.get("device") != "cpu":
            found[row["card"]] = row
    return list(found.values())


def asked(row: Row, name: str) -> object:
    """Return a field of a point; rows before it had `copies` were pinned."""
    return row.get(name, "pinned" if name == "copies" and "strategy" in row else None)


def worst_forecasts(measured: Sequence[Row]) -> list[Row]:
    """Return, for each card, the row without train.compile whose memory its forecast misses most."""
    worst: dict[str, Row] = {}
    for row in measured:
        if "forecast_error" in row and "error" not in row and not any("compile" in s for s in row["set"]):
            before = worst.setdefault(row["card"], row)
            if abs(row["forecast_error"]) > abs(before["forecast_error"]):
                worst[row["card"]] = row
    return list(worst.values())


if __name__ == "__main__":
    sys.exit(main())
