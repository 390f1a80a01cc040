"""`vlafit eval CHECKPOINT`: evaluate in simulation (--protocol) or on recorded episodes (--data)."""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlafit import shipped
from vlafit.cli import actor as actors
from vlafit.cli.console import Line, evaluation_table
from vlafit.cli.parser import EXECUTION_MODES, Parser, within
from vlafit.cli.places import checkpoint_folder, checkpoint_stays, default_out
from vlafit.cli.verbs.serve import read_token
from vlafit.config import LONGEST_S
from vlafit.credentials import checked_url
from vlafit.errors import ConfigError, shown_url

if TYPE_CHECKING:
    from vlafit.execution import Execution
    from vlafit.rollout import Result
    from vlafit.types import Actor

ABOUT = """\
Evaluate a checkpoint in simulation under a protocol (--protocol), or without a simulator: its actions against
those of recorded episodes that it has not learned (--data). The same checkpoint, options and machine give the
same numbers, for any number of workers, and from shards on several machines. Continue an interrupted
evaluation with --resume. The exit status is 3 if episodes ended in an environment error: the result is then
incomplete."""
IN_SIMULATION = (
    "trials",
    "workers",
    "videos",
    "wrong_instruction",
    "execution",
    "replan",
    "delay",
    "retry_errors",
    "timeout",
    "against",
    "stop_early",
    "shard",
    "env_python",
)
ON_DATA = (
    "episodes",
    "samples",
    "draws",
    "outside",
    "confirm_cameras",
    "confirm_frames",
    "confirm_conversion",
    "confirm_relative",
)
INCOMPLETE = 3  # exit status


def _parser() -> Parser:
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
        "--out",
        metavar="DIR",
        help="folder of the evaluation [runs/eval/CHECKPOINT/PROTOCOL or data-DATASET]",
    )
    parser.add_argument("--resume", action="store_true", help="keep what is already answered in DIR")
    parser.add_argument("--device", help="torch device [the GPU if there is one]")
    parser.add_argument(
        "--steps", metavar="N", type=within(1, 10**4), help="steps of sampling [the policy's, 10]"
    )
    _add_simulation(parser)
    _add_data(parser)
    actors.add_options(parser)
    return parser


def _add_simulation(parser: Parser) -> None:
    parser.add_argument(
        "--retry-errors", action="store_true", help="play episodes that ended in an error again"
    )
    parser.add_argument(
        "--trials", metavar="N", type=within(1, 10**5), help="episodes of each task [the protocol's]"
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=within(1, 1024),
        help="environment processes [one per core, as far as they fit into the memory]",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=within(0, LONGEST_S, float, above=True),
        help="seconds until an environment must answer [the protocol's]",
    )
    parser.add_argument(
        "--env-python",
        metavar="PATH",
        help="Python that runs the environments, with numpy and msgpack, without torch; or tcp://HOST:PORT, "
        "where `python -m vlafit.envs.host` runs them [the protocol's]",
    )
    parser.add_argument(
        "--against", metavar="RUN", help="compare with this evaluation or run at the starts that both played"
    )
    parser.add_argument(
        "--stop-early",
        action="store_true",
        help="with --against: end as soon as the two are told apart (5 %%)",
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="play only share I of N, in DIR/shard-I-of-N, on one of N machines"
    )
    parser.add_argument(
        "--merge", metavar="DIR", help="merge the shards in DIR into one evaluation, and play nothing"
    )
    parser.add_argument(
        "--videos", metavar="N", type=within(0, 10**5), help="filmed episodes of each task [2]"
    )
    parser.add_argument(
        "--wrong-instruction", action="store_true", help="give each task its partner's instruction"
    )
    parser.add_argument(
        "--max-batch",
        metavar="N",
        type=within(1, 2**12),
        help="observations in one call of the policy, padded to N [16, or as many as there are episodes]",
    )
    parser.add_argument(
        "--execution", choices=EXECUTION_MODES, help="how chunks are executed [chunk, as the protocol says]"
    )
    parser.add_argument(
        "--replan", metavar="N", type=within(1, 10**6), help="steps until it replans [the protocol's]"
    )
    parser.add_argument(
        "--delay", metavar="N", type=within(0, 10**6), help="steps that pass before a chunk is there [0]"
    )


def _add_data(parser: Parser) -> None:
    parser.add_argument(
        "--episodes", metavar="ID", nargs="+", help="with --data: the episodes [those held out from training]"
    )
    parser.add_argument(
        "--samples", metavar="N", type=within(1, 10**6), help="with --data: observations of all episodes [64]"
    )
    parser.add_argument(
        "--draws",
        metavar="N",
        type=within(2, 2**12),
        help="with --data: seeds of noise of each, at least 2 [8]",
    )
    parser.add_argument(
        "--outside",
        metavar="NAME",
        nargs="+",
        help="with --data: dimensions whose normalised values may be extreme, such as action.gripper",
    )
    parser.add_argument(
        "--confirm-cameras",
        metavar="NAME",
        nargs="+",
        help="with --data: cameras whose key in the card has another camera's name, and is right",
    )
    parser.add_argument(
        "--confirm-frames",
        action="store_true",
        help="with --data: the card turns or flips frames otherwise than the policy's did, and is right",
    )
    parser.add_argument(
        "--confirm-conversion",
        action="store_true",
        help="with --data: another scale, offset or action_shift than the policy's card has, and it is right",
    )
    parser.add_argument(
        "--confirm-relative",
        action="store_true",
        help="with --data: the card makes other actions relative than the policy learned; the policy's hold",
    )


def run(arguments: Sequence[str]) -> int:
    """Evaluate and print the table."""
    options = _parser().read(arguments)
    if options.merge is not None:
        if list(arguments) not in (["--merge", options.merge], [f"--merge={options.merge}"]):
            raise ConfigError("--merge takes no other option: the shards say what was evaluated")
        return _merge(Path(options.merge))
    _require_one_kind(options)
    if options.data is not None:
        from vlafit.cli.eval_data import evaluate_on_data
        from vlafit.offline import WIDTH

        name, load = _actor(options)
        with checkpoint_stays(name):
            return evaluate_on_data(options, name, lambda: load(options.max_batch or WIDTH))
    name, load = _actor(options)
    protocol = shipped.find("protocol", options.protocol)
    out = Path(options.out) if options.out else default_out(name, protocol, options.wrong_instruction)
    from vlafit import rollout

    played = rollout.load_protocol(protocol)
    execution = _execution(options, played.replan)
    if options.env_python is not None:
        played = played.played_in(options.env_python)
    shard = rollout.Shard.parse(options.shard) if options.shard else None

    # The line's total is known after the first episode; before that, workers start and weights load.
    with Line("episodes", 1) as line:
        successes = 0

        def progress(done: int, total: int, record: rollout.Record) -> None:
            nonlocal successes
            successes += record.success is True
            line.total = total
            line.update(done, f"{successes} successes")

        folder = out / shard.folder if shard else out
        width = options.max_batch or rollout.policy_width(
            played, folder, trials=options.trials, wrong_instruction=options.wrong_instruction
        )
        result = rollout.evaluate(
            load(width),
            played,
            out,
            workers=options.workers or 0,
            trials=options.trials,
            videos=2 if options.videos is None else options.videos,
            resume=options.resume or options.retry_errors,
            wrong_instruction=options.wrong_instruction,
            progress=progress,
            execution=execution,
            timeout_s=options.timeout,
            retry_errors=options.retry_errors,
            shard=shard,
            against=options.against,
            stop_early=options.stop_early,
        )
    return show(result)


def _merge(folder: Path) -> int:
    from vlafit import rollout

    return show(rollout.merge(folder))


def show(result: "Result") -> int:
    """Print a result and return the exit status."""
    if result.agreement:
        print(evaluation_table(result.agreement))
    print(result)
    print(f"episodes, videos and contact sheet: {result.folder}")
    if (failures := result.folder / "failures.png").is_file():
        print(f"failures that were filmed, like ones together: {failures}")
    if result.overall.errors:
        print("play the episodes that ended in an error again with --retry-errors")
        return INCOMPLETE
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


def _actor(options: Namespace) -> tuple[Path, "Callable[[int], Actor]"]:
    """Return what names the evaluation's folder, and how to get the actor, given the width of its batches."""
    if (options.checkpoint is None) == (options.actor is None):
        raise ConfigError("name what is evaluated: a checkpoint, or --actor ws://HOST:PORT; not both")
    if options.actor is None:
        if options.token_file:
            raise ConfigError("--token-file goes with --actor")
        folder = checkpoint_folder(options.checkpoint, foreign=True)

        def load(width: int) -> "Actor":
            return actors.load(
                folder, options, steps=options.steps or 0, width=width, seed=0, device=options.device or ""
            )

        return Path(folder), load
    here = [
        f"--{name}"
        for name in ("steps", "device", "max_batch", "recipe")
        if getattr(options, name) is not None
    ]
    here += ["--embodiment"] * bool(options.embodiment) + ["--compile"] * options.compile
    here += ["--dtype"] * (options.dtype != "float32") + ["--quantise"] * bool(options.quantise)
    here += ["--trust"] * bool(options.trust) + ["--base"] * bool(options.base) + actors.adapting(options)
    if here:
        listed = ", ".join(here).replace("_", "-")
        raise ConfigError(f"{listed}: is decided where the policy is served; give it to `vlafit serve`")
    token = read_token(options.token_file) if options.token_file else ""

    def dial(width: int) -> "Actor":
        """The server has chosen the width."""
        from vlafit.serve.client import connect

        return connect(options.actor, token=token)

    return Path(re.sub(r"\W+", "_", shown_url(checked_url(options.actor, "--actor")))), dial


def _execution(options: Namespace, replan: int) -> "Execution | None":
    """Return how chunks are executed by the options; None as the protocol says, whose replan is given."""
    if options.execution is None and options.replan is None and options.delay is None:
        return None
    from vlafit.execution import Execution

    chosen = replan if options.replan is None else options.replan
    return Execution(options.execution or "chunk", replan=chosen, delay=options.delay or 0)
