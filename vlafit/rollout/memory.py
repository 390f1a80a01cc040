"""How many environments fit into the machine's memory, from what one was seen to take."""

import logging

import psutil

from vlafit.envs import host
from vlafit.envs.messages import Ready

log = logging.getLogger(__name__)

SHARE = 0.8  # of the free memory that environments may take; the rest is for the policy and what grows


def free_bytes() -> int:
    """Return the free memory of this machine, or of the container that it is."""
    return host.within_container(psutil.virtual_memory().available)


def places(ready: Ready, workers: int, cores: int, wanted: int, free: int) -> tuple[int, int]:
    """Return how many processes to start, and how many environments each has.

    `wanted` environments at most; `workers` processes, or one for each core where it is 0. What does not fit
    into the `free` bytes (beside the process that runs already) is left out: first environments of a process,
    then processes that were not asked for. An environment that cannot share a process has one of its own.
    """
    budget = SHARE * (free + ready.program_bytes + ready.env_bytes)
    processes = max(1, min(workers or cores, wanted))
    slots = -(-wanted // processes) if ready.shares_process else 1
    while slots > 1 and processes * (ready.program_bytes + slots * ready.env_bytes) > budget:
        slots -= 1
    fitting = max(1, int(budget // max(1, ready.program_bytes + ready.env_bytes)))
    if not workers and fitting < processes:
        log.warning(
            "%d environment processes instead of %d: one takes %d MB, and %d MB are free",
            fitting,
            processes,
            (ready.program_bytes + ready.env_bytes) >> 20,
            free >> 20,
        )
        processes = fitting
    return processes, slots
