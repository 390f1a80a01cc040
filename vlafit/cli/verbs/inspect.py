"""`vlafit inspect CHECKPOINT`: show its content, whether it is whole, and what a strategy would train."""

import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlafit import shipped
from vlafit.cli.console import agreement_table, plan_table, size, table
from vlafit.cli.memory import bare, forecast_facts, forecast_text
from vlafit.cli.parser import (
    Parser,
    add_base,
    add_config,
    add_embodiment,
    add_format,
    add_trust,
    settings,
    within,
)
from vlafit.cli.places import base_folder, checkpoint_folder
from vlafit.entry_points import is_module
from vlafit.errors import ConfigError

if TYPE_CHECKING:
    from vlafit.agreement import Agreement
    from vlafit.checkpoints import Declaration, Loaded
    from vlafit.codec import Codec
    from vlafit.nn.policy import Policy
    from vlafit.recipe import Recipe
    from vlafit.train.checkpoint_codec import CodecChoice

ABOUT = """\
Show what a checkpoint of any program holds: its format and family, what becomes of every tensor, its parts,
its robot and its prompt, and the memory that it takes; with --strategy, which of its tensors that strategy
would train, and the optimiser state; with --batch, too, a forecast of the memory to train it, and the
settings that fit GPUs of 16 to 141 GB; with --data, what a data card and the checkpoint agree on. Only
headers are read; --whole loads every number, too. A policy family has no numbers: its --size shows what a
strategy would train from fresh weights."""


def run(arguments: Sequence[str]) -> int:
    """Print what a checkpoint holds."""
    options = _parser().read(arguments)
    if options.batch is not None and (options.batch < 1 or not options.strategy):
        raise ConfigError(f"--batch {options.batch}: needs --strategy S, and at least 1 sample")
    if options.protocol and not options.data:
        raise ConfigError("--protocol is compared with a data card: give --data CARD, too")

    config = settings(options.config)
    if is_family(options.checkpoint):
        return _inspect_family(options, config)
    if options.size:
        raise ConfigError(_no_family(options.checkpoint))
    folder = checkpoint_folder(options.checkpoint, foreign=True)
    from vlafit import checkpoints
    from vlafit.train import checkpoint_codec

    look = checkpoints.load_all if options.whole else checkpoints.inspect_all
    base = base_folder(options.base) if options.base else None
    place = checkpoints.place(folder).path
    # A tokenizer is judged as training does; `--format` names a program whose files nothing else recognises.
    as_trained = options.data or (options.tokenizer and not options.format)
    recipe = _recipe(folder, base, options, config) if as_trained else None
    choice = None if recipe is None else checkpoint_codec.choose(recipe, place)
    every = look(
        folder,
        config=config,
        base=base,
        dtype=options.dtype,
        format=options.format,
        trust=options.trust,
        tokenizer=options.tokenizer if choice is None else choice.passed,
        assets=options.assets,
    )
    loaded = every.of(options.embodiment)
    facts = describe(loaded)
    if every.codecs is not None and loaded.codec is None:
        if options.data:
            every.codecs.choose(where=str(folder), option="--embodiment NAME, the one to compare")
        facts["embodiments"] = [_robot(codec) for codec in every.codecs]
    if recipe is not None and choice is not None:
        _require_trainable(recipe, loaded, place, choice)
    facts["to_train"] = needed_to_train(loaded, place, base) if every.codecs is None else []
    facts |= _to_train(loaded.policy, loaded.codec, options)
    agreement = None
    if recipe is not None and choice is not None and options.data:
        agreement = _agree(loaded, recipe, choice.declared, options)
        facts["agreement"] = json.loads(agreement.to_json())
    if options.json:
        print(json.dumps({"checkpoint": str(folder), **facts}, indent=2))
    else:
        print(as_text(facts))
        if agreement is not None:
            print(f"\n{agreement_table(agreement)}")
    if agreement is None or not agreement.conflicts:
        return 0
    for fix, alike in groupby(agreement.conflicts, key=lambda item: item.fix):
        print(f"conflict: {'; '.join(item.name for item in alike)}: {fix}", file=sys.stderr)
    return 1


def _parser() -> Parser:
    parser = Parser("vlafit inspect", ABOUT)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run, a name that ships, or a policy family"
    )
    parser.add_argument("--size", default="", help="of a policy family: its size")
    strategies = ", ".join(shipped.names("strategy"))
    parser.add_argument("--strategy", help=f"a TOML file, or one that ships: {strategies}")
    add_base(parser)
    add_embodiment(parser)
    parser.add_argument(
        "--batch",
        metavar="N",
        type=within(1, 2**16),
        help="with --strategy: forecast the memory to train N samples a step",
    )
    parser.add_argument(
        "--cameras",
        metavar="N",
        type=within(1, 1024),
        default=0,
        help="with --batch: cameras [the checkpoint's, or 3]",
    )
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="with --batch: of the products [bf16]"
    )
    add_config(parser)
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="of a codec that the checkpoint's statistics make"
    )
    parser.add_argument(
        "--assets", metavar="NAME", help="which of the checkpoint's statistics (policy.assets of a recipe)"
    )
    add_format(parser)
    add_trust(parser)
    parser.add_argument("--dtype", default="float32", help="to estimate memory for: float32 or bfloat16")
    parser.add_argument("--whole", action="store_true", help="load it: hashes and every number are checked")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--data", metavar="CARD", help="compare it with a data card; exit status 1 if they conflict"
    )
    parser.add_argument("--protocol", metavar="P", help="with --data: compare the robot of a protocol, too")
    return parser


def is_family(name: str) -> bool:
    """Return whether `name` is a policy family, and neither a file nor a checkpoint that ships."""
    from vlafit.policies import families, installed

    if Path(name).exists() or name in shipped.names("checkpoint"):
        return False
    return name in families() or name in installed() or is_module(name)


def _no_family(name: str) -> str:
    """Return why --size has no effect with what is no policy family."""
    from vlafit.policies import families, family

    if not Path(name).exists():
        for other in families():
            sizes = [size for size in family(other).SIZES if size == name or size.startswith(f"{name}-")]
            if sizes:
                return (
                    f"{name!r} is a size of the policy family {other}: vlafit inspect {other} --size "
                    f"{' or '.join(sizes)}"
                )
    return (
        f"--size is of a policy family, and {name!r} is none (is its folder on PYTHONPATH?); a "
        "checkpoint has a size of its own"
    )


def _inspect_family(options: Namespace, config: dict[str, Any] | None) -> int:
    """Print the parts of a policy family with fresh weights, and what a strategy would train of it."""
    from vlafit import checkpoints
    from vlafit.policies import build_family, family

    refused = [
        n for n in ("base", "format", "trust", "whole", "data", "tokenizer", "assets") if getattr(options, n)
    ]
    if refused:
        raise ConfigError(f"--{refused[0]} has no effect with a policy family; leave it out")
    given = checkpoints.parse_config(config)
    for name in given.tables:
        given.refuse(name, f"policy family {options.checkpoint!r}", "it is for checkpoints, which have files")
    sizes = list(family(options.checkpoint, trust=(options.checkpoint,)).SIZES)
    chosen = options.size or (sizes[0] if len(sizes) == 1 else "")
    if not chosen and not config:
        raise ConfigError(f"policy family {options.checkpoint!r}: name a --size: {', '.join(sizes)}")
    policy = build_family(options.checkpoint, chosen, config, device="meta")
    size_text = f", size {chosen}" if chosen else ""
    facts = {
        "load": f"policy family {options.checkpoint}{size_text}: fresh weights, no checkpoint",
        **describe_policy(policy),
        **_to_train(policy, None, options),
    }
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return 0


def _to_train(policy: "Policy", codec: "Codec | None", options: Namespace) -> dict[str, Any]:
    """Return what the strategy would train, and the forecast of its memory, as far as they are asked for."""
    from vlafit import tuning

    if not options.strategy:
        return {}
    plan = tuning.preview(bare(policy), tuning.load_strategy(options.strategy))
    facts: dict[str, Any] = {"strategy": {"name": plan.strategy.name, "table": plan.rows()}}
    if len(plan.strategy.stages) > 1:
        facts["strategy"]["stages"] = [
            {"name": stage.name, "begins": str(stage.begin or "step 0"), "table": plan.at(number).rows()}
            for number, stage in enumerate(plan.strategy.stages)
        ]
    if options.batch is not None:
        facts["memory"] = forecast_facts(policy, codec, options)
    return facts


def _recipe(
    folder: Path | str, base: Path | str | None, options: Namespace, config: dict[str, Any] | None
) -> "Recipe":
    """Return the recipe without [adapt] that trains the checkpoint with these options (on their card)."""
    from vlafit.recipe import DataRecipe, PolicyRecipe, Recipe

    policy = PolicyRecipe(
        checkpoint=str(folder),
        config=dict(config or {}),
        base=str(base or ""),
        tokenizer=options.tokenizer or "",
        assets=options.assets or "",
    )
    return Recipe(policy=policy, data=DataRecipe(cards=(options.data,) if options.data else ()))


def _require_trainable(recipe: "Recipe", loaded: "Loaded", path: Path, choice: "CodecChoice") -> None:
    """Raise the error of training where the codec, or --tokenizer, cannot be used as the options say."""
    from vlafit.train import checkpoint_codec

    has_codec, fresh = loaded.codec is not None, loaded.report.fresh
    if loaded.codec is not None:
        own = not choice.makes_codec
        checkpoint_codec.require_effect(recipe, loaded.codec, path, own_tokenizer=own)
    if has_codec or choice.named is not None:  # else `needed_to_train` says that there is none
        checkpoint_codec.require_tokenizer(recipe, loaded.policy, path, choice, fresh, has_codec)


def _agree(loaded: "Loaded", recipe: "Recipe", declared: "Declaration", options: Namespace) -> "Agreement":
    """Return what the checkpoint and a data card agree on, as the `recipe` would find it."""
    from vlafit import rollout
    from vlafit.agreement import EVALUATION, Item, protocol_items, replan_items
    from vlafit.datasets import load_card, open_dataset
    from vlafit.execution import Execution
    from vlafit.train import readings, reconcile

    card = load_card(options.data)
    agreement = reconcile.agree_on(recipe, card, loaded.codec, declared)
    if not card.location().exists():
        item = Item("dataset files", {"dataset": "not here"}, "", "assumed", "the files were not compared")
        agreement = readings.of_card(recipe, card, loaded.codec, declared, agreement.with_items([item]))
    elif loaded.codec is not None:
        agreement = reconcile.outlook(
            recipe,
            loaded.codec,
            agreement,
            loaded.policy.needs(),
            loaded.report.chunk,
            loaded.report.owner,
            declared,
        )
    else:
        open_dataset(card)  # so that files that are not what the card says are named first
        agreement = readings.of_card(recipe, card, None, declared, agreement)
    if protocol := options.protocol:
        execution = Execution(replan=rollout.load_protocol(protocol).replan)
        agreement = agreement.with_items(
            [
                *protocol_items(card.embodiment, rollout.robot_of(protocol), protocol),
                *replan_items(execution, loaded.policy.needs().chunk, EVALUATION),
            ]
        )
    return agreement


def needed_to_train(loaded: "Loaded", path: Path, base: Path | str | None) -> list[str]:
    """Return the settings of a recipe without which training refuses this checkpoint."""
    from vlafit import checkpoints
    from vlafit.train.tokenizer import of_family

    if loaded.codec is not None:
        return []
    declared = checkpoints.declaration(path, base)
    named, needed = declared.named_statistics, []
    if named:
        needed.append(f'data.statistics = "data", or policy.assets = one of {", ".join(named)}')
    elif declared.codec_options or not checkpoints.wants_tokenizer(path, base):
        more = f", or {declared.codec_options}" if declared.codec_options else ""
        needed.append(f'data.statistics = "data"{more}')
    if loaded.policy.needs().prompt is not None and declared.own_tokenizer is None:
        name = f" ({declared.tokenizer} in its files)" if declared.tokenizer else of_family(loaded.policy)
        needed.append(f"policy.tokenizer{name}")
    return [*needed, *(f"adapt.robot = true, because {text}" for text in declared.conversions)]


def describe(loaded: "Loaded") -> dict[str, Any]:
    """Return the facts that `vlafit inspect` shows, as plain values."""
    codec = loaded.codec
    return {
        "load": loaded.report.text(),
        "report": loaded.report.facts(),
        **describe_policy(bare(loaded.policy)),
        **(_robot(codec) if codec else {"embodiment": None, "codec": None}),
    }


def _robot(codec: "Codec") -> dict[str, Any]:
    from vlafit.codec.described import learned

    return {
        "embodiment": dataclasses.asdict(codec.embodiment),
        "codec": dataclasses.asdict(codec.config),
        "learned": learned(codec),
    }


def describe_policy(policy: "Policy") -> dict[str, Any]:
    """Return a bare policy's family, its parts and their sizes."""
    from vlafit.policies import model_of

    tensors = dict(policy.named_parameters())
    parts: dict[str, dict[str, int]] = {}
    for info in policy.parts():
        row = parts.setdefault(info.part, {"tensors": 0, "parameters": 0, "layers": info.layers})
        row["tensors"] += 1
        row["parameters"] += tensors[info.name].numel()
        row["layers"] = max(row["layers"], info.layers)
    return {
        "family": model_of(policy.config),
        "parameters": sum(t.numel() for t in tensors.values()),
        "parts": parts,
    }


def as_text(facts: dict[str, Any]) -> str:
    """Return `describe`'s facts for reading."""
    parts: list[tuple[object, ...]] = [
        (name, part["layers"] or "", part["tensors"], size(part["parameters"]))
        for name, part in facts["parts"].items()
    ]
    tensors = sum(part["tensors"] for part in facts["parts"].values())
    parts.append(("total", "", tensors, size(facts["parameters"])))
    lines = [facts["load"], ""]
    lines += [table(("part", "layers", "tensors", "parameters"), parts), ""]
    for one in (facts, *facts.get("embodiments", ())):
        robot, codec = one.get("embodiment"), one.get("codec")
        if not (robot and codec):
            continue
        cameras = ", ".join(f"{c['name']} {c['shape'][0]}x{c['shape'][1]}" for c in robot["cameras"])
        lines += [
            f"robot    {robot['name']}, {robot['hz']:g} Hz, {robot['control']}",
            f"cameras  {cameras}; pixels by {robot['renderer'] or 'unknown'}",
            f"state    {_column(robot['state'])}",
            f"action   {_column(robot['action'])}; chunks of {codec['chunk']}",
            f"codec    {codec['normalisation']}, prompt {codec['prompt']} of {codec['max_tokens']} tokens, "
            f"images {codec['image_size']}x{codec['image_size']}",
            *(f"learned  {text}" for text in one.get("learned") or ()),
        ]
    if needed := facts.get("to_train"):
        lines.append(f"to train it, a recipe needs {'; '.join(needed)}")
    if "strategy" in facts:
        lines += ["", f"strategy {facts['strategy']['name']}"]
        for stage in facts["strategy"].get("stages", ()):
            lines += ["", f"stage {stage['name']}, from {stage['begins']}", plan_table(stage["table"])]
        if "stages" not in facts["strategy"]:
            lines.append(plan_table(facts["strategy"]["table"]))
    if "memory" in facts:
        lines += forecast_text(facts["memory"])
    return "\n".join(lines)


def _column(feature: dict[str, Any]) -> str:
    labels = f" ({', '.join(feature['labels'])})" if feature["labels"] else ""
    return f"{feature['shape'][0]}{labels}{' in ' + feature['unit'] if feature['unit'] else ''}"
