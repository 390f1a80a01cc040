"""`vlafit data check`, `convert`, `view` and `replay`: they judge, write or play a dataset."""

import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlafit import locks
from vlafit.cli.console import Line, table
from vlafit.cli.parser import Parser, within
from vlafit.errors import ConfigError

if TYPE_CHECKING:
    from vlafit.datasets import EpisodeStore
    from vlafit.datasets.checks import Finding
    from vlafit.datasets.selection import LeftOut

ABOUT = {
    "convert": "Write a dataset in another layout: LeRobot v3.0 (lerobot) or HDF5 as LIBERO has it (libero).",
    "view": "Draw an episode: a film strip with curves of state and action (PNG), or a video (MP4).",
    "replay": "Execute the recorded actions in the simulation and compare. Exit status: 0 all alike, 1 not.",
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
    if verb == "replay":
        parser.add_argument(
            "--env", default="", metavar="NAME", help="the simulation [the card's record.env]"
        )
        parser.add_argument("--protocol", default="", help="a protocol whose simulation to use")
        parser.add_argument(
            "--episodes", type=within(1, 10**9), default=0, metavar="N", help="the first N [all]"
        )


def run(verb: str, options: Namespace) -> int:
    """Run a verb on the dataset that it names."""
    from vlafit.datasets import open_dataset

    if verb == "convert":
        return _convert(open_dataset(options.path), options)
    return _view(options) if verb == "view" else _replay(options)


def check(store: "EpisodeStore", options: Namespace) -> int:
    """Print what is suspicious in a dataset, and write it as a page where one is asked for."""
    from vlafit.datasets import checksums
    from vlafit.datasets.checks import check_store, together

    checksums.require_same([store])
    pixels = not options.no_pixels
    if options.out:
        from vlafit.report import findings as page

        page.require_new(Path(options.out))
    frames = len(store.embodiment.cameras) * sum(info.length for info in store.episodes)
    with Line("frames", max(1, frames), on_stderr=True) as line:
        checked = check_store(store, pixels=pixels, progress=lambda done, _: line.update(done))
    if options.json:
        json.dump(checked.facts(store.card.name), sys.stdout, indent=2)
        print()
    else:
        print("\n".join(map(_line, checked.findings)) or "nothing suspicious was found")
        for names, test in together(checked.not_tested):
            where = f" ({test.where})" if test.where else ""
            print(f"not tested: {names}{where}: {test.reason}\n  needs: {test.needs}")
        for sentence in left_out(checked.left_out):
            print(sentence)
    if options.out:
        with Line("findings", max(1, len(checked.findings)), on_stderr=True) as line:
            written = page.write_findings(
                store,
                options.path,
                checked,
                Path(options.out),
                frames=pixels,
                progress=lambda done, _: line.update(done),
            )
        print(f"page: {written}", file=sys.stderr if options.json else sys.stdout)
    return 1 if any(finding.severity == "error" for finding in checked.findings) else 0


def left_out(episodes: "Sequence[LeftOut]", most: int = 5) -> list[str]:
    """Return a line for each of the first episodes that are left out, and one for the others."""
    lines = [f"left out: {one.id}: {one.reason}" for one in episodes[:most]]
    return lines + [f"and {len(episodes) - most} more left out"] * (len(episodes) > most)


def _line(finding: "Finding") -> str:
    where = finding.episode or "all episodes"
    at = "" if finding.step is None else f", step {finding.step}"
    return (
        f"{finding.severity}: {finding.kind}: {where}{at}: {finding.message}\n"
        f"  effect: {finding.effect}\n  fix: {finding.fix}"
    )


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
    with locks.creating(path, "vlafit data view"):
        draw(store, episode, path)
    info = store.episodes[episode]
    print(f"{path}: episode {info.id}, {info.length} steps: {info.instruction}")
    return 0


def _replay(options: Namespace) -> int:
    from vlafit import envs
    from vlafit.datasets import open_dataset
    from vlafit.record.replay import replay, spec_of
    from vlafit.rollout.protocol import load_protocol

    if options.env and options.protocol:
        raise ConfigError("--env and --protocol both name a simulation; give one")
    if options.episodes < 0:
        raise ConfigError(f"--episodes {options.episodes}: must be at least 1, or 0 for all")
    store = open_dataset(options.path)
    spec = load_protocol(options.protocol).env if options.protocol else spec_of(store.card, options.env)
    chosen = range(min(options.episodes or len(store.episodes), len(store.episodes)))
    env = envs.make(spec)
    try:
        with Line("episodes", len(chosen), on_stderr=True) as line:
            results = list(replay(store, env, chosen, line.update))
    finally:
        env.close()
    alike = sum(result.reproduced for result in results)
    if options.json:
        rows = [{**dataclasses.asdict(result), "reproduced": result.reproduced} for result in results]
        facts = {"dataset": store.card.name, "env": spec.name, "versions": dict(env.versions)}
        print(json.dumps({**facts, "reproduced": alike, "episodes": rows}, indent=2))
        return 0 if alike == len(results) else 1
    others = [result for result in results if not result.reproduced]
    if others:
        heads = ("episode", "steps", "success", "recorded", "first apart at", "furthest", "final")
        words = {True: "yes", False: "no", None: "unknown"}
        rows = [
            (
                r.episode,
                r.steps,
                words[r.success],
                words[r.recorded_success],
                "" if r.parted is None else r.parted,
                f"{r.furthest:.3g}",
                f"{r.final:.3g}",
            )
            for r in others[:20]
        ]
        print(table(heads, rows))
    versions = ", ".join(f"{name} {version}" for name, version in env.versions.items())
    succeeded = sum(result.success for result in results)
    print(
        f"{alike} of {len(results)} episodes reproduced in {spec.name} ({versions}): {succeeded} successes, "
        f"states at most {max((r.furthest for r in results), default=0.0):.3g} apart"
    )
    return 0 if alike == len(results) else 1
