"""The command line: parse, call one verb of the library, print. Nothing here knows how a verb works.

Exit status: 0 done, 1 a part broke (an arm of a comparison, all trials of a sweep) and the rest is kept, 2
the user can mend it (one message on stderr), 130 interrupted.
"""

import importlib
import os
import sys
import time
from collections.abc import Sequence

from vlafit.errors import ConfigError, VlafitError, did_you_mean

VERBS = {  # module of vlafit.cli.verbs -> its line of help
    "train": "fine-tune a policy as a recipe says, evaluate it before and after, write the report",
    "compare": "compare tuning strategies: same data, noise and budget, several seeds, one report",
    "sweep": "search learning rate, rank or any other field with Optuna",
    "eval": "roll a checkpoint out under a protocol",
    "data": "inspect and check a recorded dataset, print its statistics, write its card",
    "record": "record demonstrations of scripted experts",
    "report": "write the report page of a run again",
    "inspect": "show what a checkpoint holds, and what a tuning strategy would train of it",
    "export": "write a checkpoint for LeRobot, openpi or transformers, merged or interpolated if asked",
    "convert-pickle": "turn a pickle of tensors into safetensors, safely",
    "list": "list the recipes, cards, protocols, strategies and checkpoints that ship",
}
RESUMABLE = ("train", "eval", "record")


def usage() -> str:
    """Return what `vlafit --help` prints."""
    verbs = "\n".join(f"  {verb:<16}{line}" for verb, line in VERBS.items())
    return (
        "usage: vlafit VERB ...\n\n"
        "Fine-tune pretrained vision-language-action policies, and show what it bought.\n\n"
        f"verbs:\n{verbs}\n\n"
        "vlafit VERB --help tells more. On several processes: accelerate launch -m vlafit VERB ..."
    )


def rank() -> int:
    """Return this process's number in an `accelerate launch`; 0 where there is one process alone."""
    return int(os.environ.get("RANK", "0"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name) and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except VlafitError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        resumable = arguments and arguments[0] in RESUMABLE
        _complain("interrupted; the same command with --resume goes on" if resumable else "interrupted")
        return 130
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"vlafit {_version()}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        raise ConfigError(f"there is no verb {verb!r}{did_you_mean(verb, VERBS)}")
    from vlafit.cli import console

    # OpenMP's threads spin while they wait by default; beside any other busy process (environments, say) that
    # made a training step on 2 cores up to 10 times slower, and it gains nothing when the machine is idle.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with console.logging_to_stderr(main_process=rank() == 0):
        return importlib.import_module(f"vlafit.cli.verbs.{verb.replace('-', '_')}").run(rest)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vlafit")
    except PackageNotFoundError:
        return "(run from its source, not installed)"


def _complain(message: str) -> None:
    """Print one message. Processes of a launch mostly fail alike, so the main one speaks first."""
    if rank() == 0:
        print(f"vlafit: {message}", file=sys.stderr)
    else:
        time.sleep(3)  # by then the launcher has stopped this one, unless it alone failed
        print(f"vlafit (process {rank()}): {message}", file=sys.stderr)
