"""`vlafit record CARD`: record demonstrations of scripted experts as the card's [record] section says."""

from collections.abc import Sequence
from pathlib import Path

from vlafit import shipped
from vlafit.cli.console import Line, duration, table
from vlafit.cli.parser import Parser, within
from vlafit.errors import ConfigError

ABOUT = """\
Record successful episodes of a scripted expert in the HDF5 layout that the card declares, one file per task.
Continue an interrupted recording with --resume."""


def run(arguments: Sequence[str]) -> int:
    """Record and print a table of the files."""
    parser = Parser("vlafit record", ABOUT)
    cards = ", ".join(shipped.names("card"))
    parser.add_argument("card", metavar="CARD", help=f"a data card, or a shipped one: {cards}")
    parser.add_argument("--out", metavar="DIR", help="folder of the data [the card's location]")
    parser.add_argument("--resume", action="store_true", help="keep the episodes already in DIR")
    parser.add_argument(
        "--episodes", metavar="N", type=within(1, 10**6), help="episodes of each task [the card's]"
    )
    parser.add_argument(
        "--workers", metavar="N", type=within(1, 1024), default=1, help="processes that run episodes [1]"
    )
    options = parser.read(arguments)

    from vlafit.datasets import load_card
    from vlafit.record import RecordProgress, record

    card = load_card(options.card)
    scripted = f"{card.name}-scripted"
    if card.record is None and scripted in shipped.names("card"):
        print(f"{card.name} is a dataset of human demonstrations; scripted ones are recorded as {scripted}")
        card = load_card(scripted)
    out = Path(options.out) if options.out else card.location()
    if shipped.PACKAGE in out.resolve().parents:
        raise ConfigError(
            f"card {card.name!r} locates its data inside the installed package, {out}, where nothing should "
            "be recorded; choose a folder with --out"
        )
    with Line("episodes", 1) as line:

        def progress(now: RecordProgress) -> None:
            line.total = now.wanted
            failed = f", {now.skipped} failed" if now.skipped else ""
            line.update(now.done, f"{now.task}{failed}")

        report = record(
            card,
            out,
            episodes_per_task=options.episodes,
            workers=options.workers,
            resume=options.resume,
            progress=progress,
        )
    rows = [(f.task, f.episodes, f.frames, len(f.skipped), f.path) for f in report.files]
    print(table(("task", "episodes", "frames", "expert failed", "file"), rows))
    print(f"{report.episodes} episodes, {report.frames} frames in {duration(report.seconds)}")
    return 0
