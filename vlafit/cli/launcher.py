"""Find the `accelerate launch ...` command that started this process, so that a run can record it."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


def words() -> list[str]:
    """Return the words before `vlafit` on the command line: `accelerate launch ... -m`, or none."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return []
    import psutil  # a requirement of accelerate

    try:
        parent = psutil.Process().parent()
        launcher = before_module(parent.cmdline()) if parent else []
    except psutil.Error:  # access denied, or the parent has exited
        launcher = []
    return launcher or ["accelerate", "launch", "--num_processes", str(processes), "-m"]


def before_module(command: Sequence[str]) -> list[str]:
    """Return a launcher's words up to `-m`, with its program's bare name; none if it does not run vlafit."""
    positions = [i for i, pair in enumerate(pairwise(command)) if pair == ("-m", "vlafit")]
    if not positions:
        return []
    python, *rest = command[: positions[0] + 1]
    program = [Path(rest[0]).name] if Path(rest[0]).is_absolute() else [Path(python).name, rest[0]]
    return [*program, *rest[1:]]
