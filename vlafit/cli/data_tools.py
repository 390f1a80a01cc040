"""`vlafit data convert`, `view` and `replay`: verbs that make or run something of a dataset."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from vlafit.cli.console import Line
from vlafit.cli.parser import Parser

if TYPE_CHECKING:
    from vlafit.datasets import EpisodeStore

ABOUT = {
    "convert": "Write a dataset in another layout: LeRobot v3.0 (lerobot) or HDF5 as LIBERO has it (libero).",
}


def add_arguments(verb: str, parser: Parser) -> None:
    """Add what a verb takes beside PATH."""
    if verb == "convert":
        parser.add_argument("out", metavar="OUT", help="the new folder")
        parser.add_argument("--to", required=True, metavar="LAYOUT", help="lerobot or libero")
        parser.add_argument(
            "--video",
            default="",
            metavar="CODEC",
            help="h264 or av1: LeRobot with video, which is lossy [PNG]",
        )


def run(verb: str, options: Namespace) -> int:
    """Run a verb on the dataset that it names."""
    from vlafit.datasets import open_dataset

    return _convert(open_dataset(options.path), options)


def _convert(store: "EpisodeStore", options: Namespace) -> int:
    from vlafit.datasets.convert import CARD, convert

    out = Path(options.out)
    total = len(store.embodiment.cameras) * sum(info.length for info in store.episodes)
    with Line("frames", max(1, total), on_stderr=True) as line:
        lost = convert(store, out, options.to, video=options.video, progress=line.update)
    print(f"{out}: {len(store.episodes)} episodes, read back and compared; its card is {out / CARD}")
    if store.left_out:
        print(f"left out, as by the old card: {len(store.left_out)} episodes")
    for sentence in lost:
        print(f"not kept: {sentence}")
    return 0
