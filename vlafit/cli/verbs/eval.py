"""`vlafit eval CHECKPOINT`: evaluate in simulation (--protocol) or on recorded episodes (--data)."""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlafit import shipped
from vlafit.cli.console import Line
from vlafit.cli.parser import EXECUTION_MODES, Parser, add_base, add_trust
from vlafit.cli.places import checkpoint_folder, default_out
from vlafit.cli.verbs.serve import read_token
from vlafit.errors import ConfigError

if TYPE_CHECKING:
    from vlafit.execution import Execution
    from vlafit.types import Actor

ABOUT = """\
Evaluate a checkpoint in simulation under a protocol (--protocol), or without a simulator: its actions against
those of recorded episodes that it has not learned (--data). The same checkpoint, options and machine give the
same numbers. Continue an interrupted evaluation with --resume."""
IN_SIMULATION = ("trials", "workers", "videos", "wrong_instruction", "execution", "replan", "delay")
ON_DATA = ("episodes", "samples", "draws")


def run(arguments: Sequence[str]) -> int:
    """Evaluate and print the table."""
    protocols = ", ".join(shipped.names("protocol"))
    parser = Parser("vlafit eval", ABOUT)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", help="a checkpoint, a run, or a shipped name"
    )
    parser.add_argument(
        "--actor", metavar="URL", help="instead: a policy that `vlafit serve` serves, ws://HOST:PORT"
    )
    parser.add_argument("--token-file", metavar="FILE", help="the token that its server asks for")
    parser.add_argument("--protocol", help=f"a TOML file, or a shipped one: {protocols}")
    parser.add_argument(
        "--data",
        metavar="CARD",
        help="instead: a data card, or a dataset that needs none (its folder or Hub id)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the evaluation [runs/eval/CHECKPOINT/PROTOCOL or DATASET]"
    )
    parser.add_argument("--resume", action="store_true", help="keep what is already answered in DIR")
    parser.add_argument("--trials", metavar="N", type=int, help="episodes of each task [the protocol's]")
    parser.add_argument("--workers", metavar="N", type=int, help="environment processes [one per core]")
    parser.add_argument("--videos", metavar="N", type=int, help="filmed episodes of each task [2]")
    parser.add_argument(
        "--wrong-instruction", action="store_true", help="give each task its partner's instruction"
    )
    parser.add_argument("--steps", metavar="N", type=int, help="steps of sampling [the policy's, 10]")
    parser.add_argument("--device", help="torch device [the GPU if there is one]")
    parser.add_argument(
        "--max-batch", metavar="N", type=int, help="observations in one call of the policy, padded to N [16]"
    )
    parser.add_argument(
        "--execution", choices=EXECUTION_MODES, help="how chunks are executed [chunk, as the protocol says]"
    )
    parser.add_argument("--replan", metavar="N", type=int, help="steps until it replans [the protocol's]")
    parser.add_argument("--delay", metavar="N", type=int, help="steps that pass before a chunk is there [0]")
    parser.add_argument(
        "--episodes", metavar="ID", nargs="+", help="with --data: the episodes [those held out from training]"
    )
    parser.add_argument(
        "--samples", metavar="N", type=int, help="with --data: observations of all episodes [64]"
    )
    parser.add_argument("--draws", metavar="N", type=int, help="with --data: seeds of noise of each [8]")
    add_base(parser)
    add_trust(parser)
    options = parser.read(arguments)
    _require_one_kind(options)
    if options.data is not None:
        from vlafit.cli.eval_data import evaluate_on_data

        return evaluate_on_data(options, *_actor(options))
    name, load = _actor(options)
    protocol = shipped.find("protocol", options.protocol)
    out = Path(options.out) if options.out else default_out(name, protocol, options.wrong_instruction)
    execution = _execution(options, protocol)
    from vlafit import rollout

    # The line's total is known after the first episode; before that, workers start and weights load.
    with Line("episodes", 1) as line:
        successes = 0

        def progress(done: int, total: int, record: rollout.Record) -> None:
            nonlocal successes
            successes += record.success is True
            line.total = total
            line.update(done, f"{successes} successes")

        result = rollout.evaluate(
            load(),
            protocol,
            out,
            workers=options.workers or 0,
            trials=options.trials,
            videos=2 if options.videos is None else options.videos,
            resume=options.resume,
            wrong_instruction=options.wrong_instruction,
            progress=progress,
            execution=execution,
        )
    print(result)
    print(f"episodes, videos and contact sheet: {result.folder}")
    return 0


def _require_one_kind(options: Namespace) -> None:
    """Raise ConfigError unless a simulation or recorded data is asked for, with its own options only."""
    if (options.protocol is None) == (options.data is None):
        raise ConfigError(
            "name how to evaluate: --protocol P in simulation, or --data CARD on recorded episodes; not both"
        )
    kind, others = ("--data", IN_SIMULATION) if options.data is not None else ("--protocol", ON_DATA)
    for name in others:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect with {kind}; leave it out")


def _actor(options: Namespace) -> tuple[Path, Callable[[], "Actor"]]:
    """Return what names the evaluation's folder, and how to get the actor."""
    if (options.checkpoint is None) == (options.actor is None):
        raise ConfigError("name what is evaluated: a checkpoint, or --actor ws://HOST:PORT; not both")
    if options.actor is None:
        if options.token_file:
            raise ConfigError("--token-file goes with --actor")
        folder = checkpoint_folder(options.checkpoint)
        base = checkpoint_folder(options.base, foreign=True) if options.base else None

        def load() -> "Actor":
            from vlafit.actor import load_actor

            return load_actor(
                folder,
                steps=options.steps or 0,
                width=options.max_batch or 16,
                device=options.device or "",
                trust=options.trust,
                base=base,
            )

        return Path(folder), load
    here = [f"--{name}" for name in ("steps", "device", "max_batch") if getattr(options, name) is not None]
    here += ["--trust"] * bool(options.trust) + ["--base"] * bool(options.base)
    if here:
        listed = ", ".join(here).replace("_", "-")
        raise ConfigError(f"{listed}: is decided where the policy is served; give it to `vlafit serve`")
    token = read_token(options.token_file) if options.token_file else ""

    def dial() -> "Actor":
        from vlafit.serve.client import connect

        return connect(options.actor, token=token)

    return Path(re.sub(r"\W+", "_", options.actor)), dial


def _execution(options: Namespace, protocol: Path) -> "Execution | None":
    if options.execution is None and options.replan is None and options.delay is None:
        return None
    from vlafit.execution import Execution
    from vlafit.rollout import load_protocol

    replan = load_protocol(protocol).replan if options.replan is None else options.replan
    return Execution(options.execution or "chunk", replan=replan, delay=options.delay or 0)
