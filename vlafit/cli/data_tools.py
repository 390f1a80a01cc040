"""`vlafit data convert`, `view` and `replay`: verbs that make or run something of a dataset."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from vlafit.cli.console import Line
from vlafit.cli.parser import Parser
from vlafit.errors import ConfigError

if TYPE_CHECKING:
    from vlafit.datasets import EpisodeStore

ABOUT = {
    "convert": "Write a dataset in another layout: LeRobot v3.0 (lerobot) or HDF5 as LIBERO has it (libero).",
    "view": "Draw an episode: a film strip with curves of state and action (PNG), or a video (MP4).",
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
    if verb == "view":
        parser.add_argument("--episode", default="0", metavar="N", help="number from 0, or id [0]")
        parser.add_argument("--out", required=True, metavar="FILE", help="the file to write, .png or .mp4")
        parser.add_argument("--video", action="store_true", help="an MP4 of all steps")


def run(verb: str, options: Namespace) -> int:
    """Run a verb on the dataset that it names."""
    from vlafit.datasets import open_dataset

    if verb == "convert":
        return _convert(open_dataset(options.path), options)
    return _view(options)


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


def _view(options: Namespace) -> int:
    from vlafit.datasets import open_dataset
    from vlafit.report.episode import draw_film, draw_strip, position_of

    path, suffix = Path(options.out), ".mp4" if options.video else ".png"
    if path.suffix.lower() != suffix:
        hint = "leave out --video" if options.video else "add --video for an MP4"
        raise ConfigError(f"--out {path}: the file must end in {suffix}; name it so, or {hint}")
    store = open_dataset(options.path)
    episode = position_of(store, options.episode)
    draw = draw_film if options.video else draw_strip
    draw(store, episode, path)
    info = store.episodes[episode]
    print(f"{path}: episode {info.id}, {info.length} steps: {info.instruction}")
    return 0
