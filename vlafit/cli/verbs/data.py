"""`vlafit data VERB PATH`: look at a recorded dataset, write its card, check it before it costs a GPU day."""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlafit.cli import data_tools
from vlafit.cli.console import table, wrapped
from vlafit.cli.parser import Parser, within
from vlafit.errors import ConfigError, did_you_mean
from vlafit.files import expand_user

if TYPE_CHECKING:
    from pathlib import Path

    from vlafit.datasets import EpisodeStore

ABOUT = {
    "inspect": "Show a dataset on one screen: layout, robot, cameras, tasks, episodes.",
    "card": "Write the data card of a dataset to stdout, each guess marked by a comment.",
    "stats": "Print the statistics of states and actions, taken from the rows.",
    "bench": "Measure how fast it is read here, and say which data.workers suits it.",
    "check": "Check a dataset. Exit status: 0 clean, 1 findings of severity error, 2 it cannot be opened.",
    **data_tools.ABOUT,
}
PATH = "a card, the name of one that ships, or a dataset: its path, URL, or id on the Hugging Face Hub"


def run(arguments: Sequence[str]) -> int:
    """Run one of the verbs of `vlafit data`."""
    verbs = "\n".join(f"  {verb:<9}{about}" for verb, about in ABOUT.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: vlafit data VERB PATH ...\n\n{verbs}\n\nPATH: {PATH}")
        raise SystemExit(0 if arguments else 2)
    verb, *rest = arguments
    if verb not in ABOUT:
        raise ConfigError(f"vlafit data has no verb {verb!r}{did_you_mean(verb, ABOUT)}")
    parser = Parser(f"vlafit data {verb}", ABOUT[verb])
    parser.add_argument("path", metavar="PATH", help=PATH)
    data_tools.add_arguments(verb, parser)
    if verb not in ("card", "convert", "view"):
        parser.add_argument("--json", action="store_true", help="print JSON")
    if verb == "check":
        parser.add_argument("--no-pixels", action="store_true", help="check columns only; decode no frame")
        parser.add_argument(
            "--out", metavar="FOLDER", help="a new folder: a page with a picture of each finding"
        )
    if verb == "stats":
        parser.add_argument(
            "--checksums", action="store_true", help="write the files' checksums, which runs compare"
        )
    if verb == "bench":
        parser.add_argument(
            "--seconds", type=within(0.1, 86_400, float), default=5.0, help="how long to read"
        )
    if verb in ("card", "inspect"):
        parser.add_argument(
            "--layout", default="", help="the layout, if it is not recognised: package.module"
        )
    options = parser.read(rest)
    if verb == "card":
        return _card(options.path, options.layout)
    if verb in data_tools.ABOUT:
        return data_tools.run(verb, options)
    from vlafit.datasets import open_dataset

    missing: Mapping[str, str] = {}
    if verb == "inspect":
        store, missing = _open_to_look(options.path, options.layout)
    else:
        store = open_dataset(options.path)
    if verb == "check":
        return data_tools.check(store, options)
    if verb == "bench":
        return _bench(store, options.json, options.seconds)
    if verb == "stats" and options.checksums:
        from vlafit.datasets import checksums

        print(f"checksums of {len(store.files())} files: {checksums.write(store)}", file=sys.stderr)
    facts = _inspect(store, missing) if verb == "inspect" else _stats(store)
    print(json.dumps(facts, indent=2) if options.json else _text(verb, facts))
    return 0


def _data(path: str) -> "Path | None":
    """Return the files or folder that `path` is, None if it is a card or a name."""

    from vlafit.datasets import remote

    if remote.is_url(path) and not path.endswith(".toml"):
        return None if remote.look_at(path) else remote.fetch(path)
    local = expand_user(path)
    return local if local.exists() and local.suffix != ".toml" else None


def _card(path: str, layout: str) -> int:
    from vlafit.datasets import describe, load_card
    from vlafit.datasets.load import describe_remote, is_remote
    from vlafit.datasets.write import card_text

    remote = is_remote(path)
    local = None if remote else _data(path)
    if remote or local is not None:
        draft = describe_remote(path, layout) if local is None else describe(local, layout)
        print(card_text(draft.card, draft.guesses, draft.missing), end="")
    else:
        print(card_text(load_card(path)), end="")
    return 0


def _open_to_look(path: str, layout: str) -> "tuple[EpisodeStore, Mapping[str, str]]":
    """Open a dataset, also one whose card would have to be completed; return what is missing in it."""
    from vlafit.datasets import describe, open_dataset, open_draft

    local = _data(path)
    if local is None:
        return open_dataset(path), {}
    draft = describe(local, layout)
    return open_draft(draft), draft.missing


def _inspect(store: "EpisodeStore", missing: Mapping[str, str]) -> dict[str, Any]:
    from vlafit.datasets.split import describe_groups

    robot, lengths = store.embodiment, [info.length for info in store.episodes]
    tasks: dict[str, int] = {}
    for info in store.episodes:
        tasks[info.instruction] = tasks.get(info.instruction, 0) + 1
    return {
        "name": store.card.name,
        "layout": store.card.layout,
        "files": len(store.files()),
        "episodes": len(lengths),
        "frames": sum(lengths),
        "episode_lengths": [min(lengths), sum(lengths) / len(lengths), max(lengths)] if lengths else [],
        "left_out": {left.id: left.reason for left in store.left_out},
        "filter_keys": store.filter_keys(),
        "missing": dict(missing),
        "robot": robot.name,
        "hz": None if "robot.hz" in missing else robot.hz,
        "control": robot.control,
        "cameras": {camera.name: list(camera.shape) for camera in robot.cameras},
        "state": {"dimensions": robot.state.shape[0], "labels": list(robot.state.labels)},
        "action": {"dimensions": robot.action.shape[0], "labels": list(robot.action.labels)},
        "tasks": tasks,
        "single": describe_groups(store),
    }


def _stats(store: "EpisodeStore") -> dict[str, Any]:
    from vlafit.datasets.statistics_cache import statistics_of

    statistics = statistics_of([store], [[info.id for info in store.episodes]], 1)
    robot = store.embodiment
    return {
        name: {"labels": list(feature.labels), **statistics[name].to_json()}
        for name, feature in (("state", robot.state), ("action", robot.action))
    }


def _text(verb: str, facts: dict[str, Any]) -> str:
    if verb == "stats":
        heads = ("column", "dimension", "mean", "std", "min", "q01", "q99", "max")
        rows = []
        for column, values in facts.items():
            for d in range(len(values["mean"])):
                label = values["labels"][d] if values["labels"] else str(d)
                rows.append((column, label, *_shown({name: values[name][d] for name in heads[2:]})))
        return table(heads, rows)
    short, mean, long = facts["episode_lengths"] or (0, 0, 0)
    lines = [
        f"{facts['name']}: layout {facts['layout']}, {facts['files']} files",
        f"{facts['episodes']} episodes, {facts['frames']} frames; {short} to {long} steps, mean {mean:.0f}",
        f"robot {facts['robot']}, {_rate(facts['hz'])}, control {facts['control'] or 'not in the files'}",
    ]
    lines += [f"camera {name}: {h}x{w}" for name, (h, w, _) in facts["cameras"].items()]
    for column in ("state", "action"):
        labels = ", ".join(facts[column]["labels"])
        line = f"{column}: {facts[column]['dimensions']} dimensions{f' ({labels})' if labels else ''}"
        lines += wrapped(line)
    tasks = sorted(facts["tasks"].items(), key=lambda item: -item[1])
    lines += [f"{count:>6} x {text}" for text, count in tasks[:10]]
    if len(tasks) > 10:
        lines.append(f"and {len(tasks) - 10} more instructions")
    if facts["single"]:
        lines.append(facts["single"])
    if facts["filter_keys"]:
        listed = ", ".join(f"{key} ({count})" for key, count in facts["filter_keys"].items())
        lines += wrapped(f"filter keys: {listed}; mask in [{facts['layout']}] of a card chooses one")
    left_out = list(facts["left_out"].items())
    lines += [f"left out: {episode}: {reason}" for episode, reason in left_out[:5]]
    if len(left_out) > 5:
        lines.append(f"and {len(left_out) - 5} more left out")
    lines += [f"the card must say {key}: {reason}" for key, reason in facts["missing"].items()]
    return "\n".join(lines)


def _shown(values: Mapping[str, float]) -> list[str]:
    """Return the statistics of a dimension, with the digits in which its values differ."""
    largest = max(abs(values["min"]), abs(values["max"]))
    spread = values["std"] or values["max"] - values["min"]
    more = math.floor(math.log10(largest / spread)) if 0 < spread <= largest < math.inf else 0
    digits = {name: 4 if name == "std" else min(4 + more, 17) for name in values}  # 17: all of a float64
    return [f"{value:.{digits[name]}g}" for name, value in values.items()]


def _rate(hz: float | None) -> str:
    return "rate not in the files" if hz is None else f"{hz:g} Hz"


def _bench(store: "EpisodeStore", as_json: bool, seconds: float) -> int:
    from vlafit.datasets.bench import cores, measure

    result, available = measure(store, seconds), cores()
    workers = result.workers(available)
    if as_json:
        facts = {**dataclasses.asdict(result), "samples_per_s": result.samples_per_s, "limit": result.limit}
        print(json.dumps({**facts, "cores": available, "workers": workers}, indent=2))
    else:
        each = 1000 / result.samples_per_s
        print(
            f"{result.samples_per_s:,.0f} samples/s in one process ({each:.2f} ms each, mostly "
            f"{result.limit}); {available} cores\n"
            f"data.workers = {workers}"
            + (" (handing samples over would cost more than reading them)" if not workers else "")
        )
    return 0
