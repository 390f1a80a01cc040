"""`vlafit eval CHECKPOINT --protocol P`: evaluate a checkpoint in simulation, with every episode recorded."""

import re
from collections.abc import Sequence
from pathlib import Path

from vlafit import shipped
from vlafit.cli.console import Line
from vlafit.cli.parser import Parser, add_trust
from vlafit.cli.places import checkpoint_folder

ABOUT = """\
Evaluate a checkpoint in simulation under a protocol. The same checkpoint, protocol and machine give the same
table for any number of workers. Continue an interrupted evaluation with --resume."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate and print the table."""
    protocols = ", ".join(shipped.names("protocol"))
    parser = Parser("vlafit eval", ABOUT)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run, or a shipped name")
    parser.add_argument("--protocol", required=True, help=f"a TOML file, or a shipped one: {protocols}")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the evaluation [runs/eval/CHECKPOINT/PROTOCOL]"
    )
    parser.add_argument("--resume", action="store_true", help="keep the episodes already in DIR")
    parser.add_argument("--trials", metavar="N", type=int, help="episodes of each task [the protocol's]")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=0, help="environment processes [one per core]"
    )
    parser.add_argument("--videos", metavar="N", type=int, default=2, help="filmed episodes of each task [2]")
    parser.add_argument(
        "--wrong-instruction", action="store_true", help="give each task its partner's instruction"
    )
    parser.add_argument(
        "--steps", metavar="N", type=int, default=0, help="steps of sampling [the policy's, 10]"
    )
    parser.add_argument("--device", default="", help="torch device [the GPU if there is one]")
    add_trust(parser)
    options = parser.read(arguments)

    folder = checkpoint_folder(options.checkpoint)
    protocol = shipped.find("protocol", options.protocol)
    out = Path(options.out) if options.out else default_out(Path(folder), protocol, options.wrong_instruction)
    from vlafit import rollout
    from vlafit.actor import load_actor

    # The line's total is known after the first episode; before that, workers start and weights load.
    with Line("episodes", 1) as line:
        successes = 0

        def progress(done: int, total: int, record: rollout.Record) -> None:
            nonlocal successes
            successes += record.success is True
            line.total = total
            line.update(done, f"{successes} successes")

        result = rollout.evaluate(
            load_actor(folder, steps=options.steps, device=options.device, trust=options.trust),
            protocol,
            out,
            workers=options.workers,
            trials=options.trials,
            videos=options.videos,
            resume=options.resume,
            wrong_instruction=options.wrong_instruction,
            progress=progress,
        )
    print(result)
    print(f"episodes, videos and contact sheet: {result.folder}")
    return 0


def default_out(checkpoint: Path, protocol: Path, wrong_instruction: bool) -> Path:
    """Return runs/eval/CHECKPOINT/PROTOCOL; a run's checkpoint is named after run and step."""
    parts = checkpoint.resolve().parts[-3:]
    name = f"{parts[0]}_{parts[2]}" if len(parts) == 3 and parts[1] == "checkpoints" else parts[-1]
    ending = "_wrong_instruction" if wrong_instruction else ""
    return Path("runs/eval") / re.sub(r"[^\w.-]", "_", name) / f"{protocol.stem}{ending}"
