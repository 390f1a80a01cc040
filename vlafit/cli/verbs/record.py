"""`vlafit record CARD`: demonstrations of scripted experts, as the card's [record] section asks."""

from collections.abc import Sequence
from pathlib import Path

from vlafit import shipped
from vlafit.cli.console import Line, duration, table
from vlafit.cli.parser import Parser
from vlafit.errors import ConfigError

ABOUT = """\
Record successful episodes of a scripted expert into the HDF5 layout that the card declares: one file a task.
A recording that was stopped goes on with --resume."""


def run(arguments: Sequence[str]) -> int:
    """Record and print what came out."""
    parser = Parser("vlafit record", ABOUT)
    cards = ", ".join(shipped.names("card"))
    parser.add_argument("card", metavar="CARD", help=f"a data card, or one that ships: {cards}")
    parser.add_argument("--out", metavar="DIR", help="folder of the data [where the card looks for it]")
    parser.add_argument("--resume", action="store_true", help="keep the episodes that DIR holds already")
    parser.add_argument("--episodes", metavar="N", type=int, help="episodes of each task [the card's]")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=1, help="processes that play episodes [1]"
    )
    options = parser.read(arguments)

    from vlafit.datasets import load_card
    from vlafit.record import RecordProgress, record

    card = load_card(options.card)
    out = Path(options.out) if options.out else card.location()
    if shipped.PACKAGE in out.resolve().parents:
        raise ConfigError(
            f"card {card.name!r} finds its data inside the installed package, {out}, which is no place to "
            "record in; choose a folder with --out"
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
