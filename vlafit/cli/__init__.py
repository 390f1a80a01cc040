"""The command line: parse arguments, run one verb of the library, print the result.

Exit status: 0 done; 1 a part failed (an arm of a comparison, all trials of a sweep) and the rest is kept; 2
an error that the user can fix (one message on stderr); 130 interrupted.
"""

import errno
import importlib
import os
import re
import sys
import time
from collections.abc import Sequence

from vlafit.errors import ConfigError, VlafitError, did_you_mean

VERBS = {  # module of vlafit.cli.verbs -> its line of help
    "train": "fine-tune a policy from a recipe, evaluate it before and after, write a report",
    "compare": "compare tuning strategies: same data, noise and budget, several seeds, one report",
    "sweep": "search learning rate, rank or any other field with Optuna",
    "eval": "evaluate a checkpoint in simulation under a protocol",
    "data": "inspect and check a recorded dataset, print its statistics, write its card",
    "serve": "serve a checkpoint over websockets: to robots, openpi's client, vla-eval, vlafit eval --actor",
    "record": "record demonstrations of scripted experts",
    "report": "write the report page of a run or of a finished comparison again",
    "inspect": "show what a checkpoint contains, and what a tuning strategy would train",
    "export": "write a checkpoint for LeRobot, openpi or transformers, optionally merged or interpolated",
    "convert-pickle": "convert a pickle of tensors to safetensors, safely",
    "list": "list the shipped recipes, cards, protocols, strategies and checkpoints",
}
RESUMABLE = ("train", "eval", "record")
LONG = (*RESUMABLE, "compare", "sweep", "serve")  # verbs that go on when nobody reads their output any more
OF_THE_MACHINE = {
    getattr(errno, name)
    for name in ("ENAMETOOLONG", "EACCES", "EPERM", "ENOSPC", "EROFS", "EDQUOT", "EIO", "ELOOP", "ENOTDIR",
                 "EISDIR", "EMFILE", "ENFILE", "ESTALE")
}  # fmt: skip
NO_MEMORY = re.compile(r"allocate memory|out of memory", re.IGNORECASE)


def usage() -> str:
    """Return what `vlafit --help` prints."""
    verbs = "\n".join(f"  {verb:<16}{line}" for verb, line in VERBS.items())
    return (
        "usage: vlafit VERB ...\n\n"
        "Fine-tune pretrained vision-language-action policies, and measure the gain.\n\n"
        f"verbs:\n{verbs}\n\n"
        "See vlafit VERB --help. On several processes: accelerate launch -m vlafit VERB ..."
    )


def rank() -> int:
    """Return this process's rank in an `accelerate launch`; 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name) and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except VlafitError as error:
        _print_error(str(error))
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of a pipe (such as `head`) has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if error.errno not in OF_THE_MACHINE or error.filename is None:
            raise
        _print_error(
            f"{_short(str(error.filename))}: {error.strerror}; choose another path, or fix its "
            "permissions or free space"
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        reason = str(error).partition("\n")[0] or "MemoryError"
        _print_error(
            f"out of memory ({reason}); make the batch or the policy smaller, or check the sizes that the "
            "file declares"
        )
        return 2
    except KeyboardInterrupt:
        resumable = arguments and arguments[0] in RESUMABLE
        _print_error(
            "interrupted; continue with the same command and --resume" if resumable else "interrupted"
        )
        return 130


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
    from vlafit import parent
    from vlafit.cli import console

    parent.watch()
    # By default OpenMP threads spin while they wait. With another busy process, such as environments, that
    # made a training step on 2 cores up to 10 times slower; on an idle machine it gains nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with console.surviving_streams(verb in LONG), console.logging_to_stderr(main_process=rank() == 0):
        return importlib.import_module(f"vlafit.cli.verbs.{verb.replace('-', '_')}").run(rest)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vlafit")
    except PackageNotFoundError:
        return "(run from its source, not installed)"


def _short(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:100]}...{path[-60:]} ({len(path)} characters)"


def _print_error(message: str) -> None:
    """Print one error message, first from the main process, because usually all fail with the same error."""
    if rank() == 0:
        print(f"vlafit: {message}", file=sys.stderr)
    else:
        time.sleep(3)  # by then the launcher has stopped this process, unless only this one failed
        print(f"vlafit (process {rank()}): {message}", file=sys.stderr)
