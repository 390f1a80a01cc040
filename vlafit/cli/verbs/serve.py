"""`vlafit serve CHECKPOINT`: answer robots and evaluations over websockets."""

import stat
from collections.abc import Sequence
from pathlib import Path

from vlafit.cli import actor as actors
from vlafit.cli.console import evaluation_table
from vlafit.cli.parser import EXECUTION_MODES, Parser, within
from vlafit.cli.places import checkpoint_folder
from vlafit.config import LONGEST_S
from vlafit.credentials import MAKE_ONE, checked_token
from vlafit.errors import ConfigError

ABOUT = """\
Serve a checkpoint over websockets: to vlafit.connect and `vlafit eval --actor`, to openpi's client, and to
vla-eval, all on one port. /healthz and /metrics answer plain HTTP. SIGTERM and Ctrl-C stop it after the
requests in work are answered."""


def _parser() -> Parser:
    parser = Parser("vlafit serve", ABOUT)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run, or a name that ships")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1]")
    parser.add_argument(
        "--port", metavar="N", type=within(0, 65_535), default=8000, help="port; 0: a free one [8000]"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="what clients must know; needed where others can reach the host"
    )
    parser.add_argument(
        "--max-batch",
        metavar="N",
        type=within(1, 2**12),
        default=1,
        help="observations in one call of the policy, always padded to N; the number of robots, say [1]",
    )
    parser.add_argument(
        "--max-clients", metavar="N", type=within(1, 10_000), default=64, help="connections at a time [64]"
    )
    parser.add_argument(
        "--max-frame",
        metavar="MIB",
        type=within(1, 4096),
        default=32,
        help="largest frame that is read [32 MiB]",
    )
    parser.add_argument(
        "--max-rate",
        metavar="HZ",
        type=within(0.001, 10**6, float),
        default=1000.0,
        help="frames a second of one client [1000]",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=within(0, LONGEST_S, float, above=True),
        default=30.0,
        help="seconds until an answer must be there [30]",
    )
    parser.add_argument(
        "--map",
        metavar="KEY=NAME",
        action="append",
        default=[],
        help="a key of openpi's or vla-eval's observations = a camera of the robot, or state; repeatable",
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="scale frames of openpi's and vla-eval's that have another size than the robot's cameras",
    )
    parser.add_argument(
        "--execution",
        choices=EXECUTION_MODES,
        default="chunk",
        help="for clients that take one action at a time (vla-eval) [chunk]",
    )
    parser.add_argument(
        "--replan",
        metavar="N",
        type=within(1, 10**6),
        default=0,
        help="steps until they replan [the whole chunk]",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=within(1, 10**4),
        default=0,
        help="steps of sampling [the policy's, 10]",
    )
    parser.add_argument(
        "--seed", metavar="N", type=within(0, 2**63 - 1), default=0, help="of the sampling noise [0]"
    )
    parser.add_argument("--device", default="", help="torch device [the GPU if there is one]")
    actors.add_options(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Serve until a signal comes."""
    options = _parser().read(arguments)

    names = _names(options.map)
    token = read_token(options.token_file) if options.token_file else ""
    from vlafit.execution import Execution
    from vlafit.serve.options import Options

    def settings(chunk: int) -> Options:
        replan = options.replan or chunk or 1
        return Options(
            host=options.host,
            port=options.port,
            token=token,
            max_clients=options.max_clients,
            max_frame=options.max_frame * 2**20,
            max_rate=options.max_rate,
            timeout_s=options.timeout,
            names=names,
            resize=options.resize,
            execution=Execution(options.execution, replan=replan),
        )

    settings(1)  # before the weights are loaded: options that cannot be are refused at once
    folder = checkpoint_folder(options.checkpoint, foreign=True)
    from vlafit.serve.describe import describe
    from vlafit.serve.server import run as serve

    actor = actors.load(
        folder,
        options,
        steps=options.steps,
        width=options.max_batch,
        seed=options.seed,
        device=options.device,
    )
    if actor.points and actor.agreement is None:
        print(evaluation_table(actor.points))
    described = describe(actor)

    def ready(address: str) -> None:
        robot = described.embodiment
        print(
            f"serving {folder} for {robot.name} at {address}; cameras {', '.join(described.required)}",
            flush=True,
        )

    serve(actor, described, settings(described.chunk), ready)
    print("stopped; every request in work was answered")
    return 0


def _names(pairs: Sequence[str]) -> dict[str, str]:
    from vlafit.agreement.camera_map import hands

    names: dict[str, str] = {}
    for pair in pairs:
        key, equals, name = pair.partition("=")
        if not key or not equals or not name:
            raise ConfigError(f"--map {pair!r} is not KEY=NAME, as in observation/image=agentview")
        if key in names:
            raise ConfigError(f"--map gives {key!r} twice")
        sent, used = hands(key), hands(name)
        if len(sent) == len(used) == 1 and sent != used:
            raise ConfigError(
                f"--map {pair}: the key {key!r} names the {min(sent)} hand, the camera {name!r} the "
                f"{min(used)} one; exchange the names, or send the "
                "frames under a key that names the hand of the camera"
            )
        names[key] = name
    return names


def read_token(file: str) -> str:
    """Read a token: the text of a file that only its owner may read. Raises ConfigError."""
    path = Path(file)
    try:
        token = checked_token(path.read_text(encoding="utf-8"), f"--token-file {path}")
        mode = path.stat().st_mode
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--token-file {path}: is not UTF-8 text, at byte {error.start} (it is not shown); {MAKE_ONE}"
        ) from None
    except OSError as error:
        raise ConfigError(f"--token-file {path}: cannot be read: {error.strerror or error}") from error
    if len(token) < 16:
        raise ConfigError(
            f"--token-file {path}: the token has {len(token)} characters; it needs at least 16; {MAKE_ONE}"
        )
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        raise ConfigError(f"--token-file {path}: other users can read it; chmod 600 {path}")
    return token
