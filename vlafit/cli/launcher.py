"""How this program was started beside others of its kind: what a run's record says, to be run again."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


def words() -> list[str]:
    """Return the words that go before `vlafit` on the command line: `accelerate launch ... -m`, or none."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return []
    import psutil  # of accelerate's own requirements

    try:
        parent = psutil.Process().parent()
        found = before_module(parent.cmdline()) if parent else []
    except psutil.Error:  # not ours to look at, or gone
        found = []
    return found or ["accelerate", "launch", "--num_processes", str(processes), "-m"]


def before_module(command: Sequence[str]) -> list[str]:
    """Return a launcher's words up to `-m`, its program by its bare name; none if it does not run vlafit."""
    places = [i for i, pair in enumerate(pairwise(command)) if pair == ("-m", "vlafit")]
    if not places:
        return []
    python, *rest = command[: places[0] + 1]
    program = [Path(rest[0]).name] if Path(rest[0]).is_absolute() else [Path(python).name, rest[0]]
    return [*program, *rest[1:]]
