"""Keep the processes of one run together: they agree before the first step, and notice when one is lost.

A collective may wait for a day, because the main process evaluates meanwhile. So a heartbeat, not a time-out
of collectives, finds a process that hangs: a thread of each process counts up in the launch's own store,
and a store that does not answer counts as the process that holds it.
"""

import gc
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from vlafit.errors import TrainingError, printable
from vlafit.files import parse_json

BEAT_S = 5.0
SILENT_S = 300.0  # longer than any library holds Python's lock, such as while it writes a checkpoint
CONNECT_S = 60.0
NUMBER_OPTIONS = ("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node")
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|gloo|nccl|socket timeout", re.IGNORECASE)
_BUSY = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_NEVER_CAME = re.compile(r"timed? ?out|clients joined|DistStoreError|DistNetworkError", re.IGNORECASE)


def require_launched() -> None:
    """Raise TrainingError if a launcher was asked for several processes, but this one was started alone.

    `accelerate launch --num_processes 2 --cpu`, for example, starts one process without a word.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    asked = processes_asked_for(_launcher_command())
    if asked > 1:
        raise TrainingError(
            f"the launcher was asked for {asked} processes, but started only this one: add --multi_gpu, or a "
            "configuration file for CPUs (vlafit list launcher), to `accelerate launch`, or ask for one"
        )


def processes_asked_for(launcher: Sequence[str]) -> int:
    """Return the number of processes in a launcher's command line; 0 if it has none."""
    for word, following in pairwise([*launcher, ""]):
        option, _, value = word.partition("=")
        value = value or following
        if option in NUMBER_OPTIONS and value.isdecimal():
            return int(value)
        if option in ("--config_file", "--config-file") and Path(value).is_file():
            match = re.search(
                r"^num_processes:\s*(\d+)", Path(value).read_text(encoding="utf-8"), re.MULTILINE
            )
            return int(match[1]) if match else 0
    return 0


def _launcher_command() -> list[str]:
    import psutil  # a requirement of accelerate

    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:  # access denied, or the parent has exited
        return []
    before = list(takewhile(lambda word: word != "vlafit", words))
    return before if any("accelerate" in word or "torchrun" in word for word in before) else []


def connect() -> Store | None:
    """Connect the processes of a launch within CONNECT_S, and return their store; None for one process.

    The store must live until the process group exists. Raises TrainingError saying what is in the way.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world == 1 or dist.is_initialized():
        return None
    where = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, world, timeout=timedelta(seconds=CONNECT_S))))
        store.set(f"vlafit/here/{rank}", "1")
        store.wait([f"vlafit/here/{r}" for r in range(world)], timedelta(seconds=CONNECT_S))
    except (RuntimeError, OSError, ValueError) as error:
        raise TrainingError(_why(error, where, world)) from error
    return store


def _why(error: Exception, where: str, world: int) -> str:
    text = f"{type(error).__name__} {error}"
    if _BUSY.search(text):
        return (
            f"{where} is in use by another program, perhaps another run; choose another port: "
            "accelerate launch --main_process_port PORT"
        )
    if _NEVER_CAME.search(text):
        return (
            f"not all {world} processes met at {where} within {CONNECT_S:.0f} s: one did not start or has "
            "ended (its own message tells why), or another program listens there; see the output of the "
            "other processes, or choose another port: accelerate launch --main_process_port PORT"
        )
    return f"the {world} processes could not connect at {where}: {str(error).splitlines()[0]}"


# ---------------------------------------------------------------------------------------------- agreement


def require_one_folder(out: Path, store: Store, rank: int, world: int, host: str) -> str:
    """Raise TrainingError, on every process, unless the processes of a machine were given the same folder.

    Machines may have folders of their own; returns a sentence about those whose paths differ, or "".
    """
    store.set(f"vlafit/out/{rank}", json.dumps([host, str(out.resolve())]))
    places = [parse_json(store.get(f"vlafit/out/{other}")) for other in range(world)]
    first: dict[str, int] = {}
    for other, (machine, path) in enumerate(places):
        before = first.setdefault(machine, other)
        if places[before][1] != path:
            raise TrainingError(
                f"process {before} has the run's folder {places[before][1]}, and process {other} {path}; "
                "only process 0 writes, so start all of them with the same --out, from the same folder"
            )
    others = [f"{path} on {machine}" for machine, path in places[1:] if path != places[0][1]]
    if not others:
        return ""
    return (
        f"the run is written to {places[0][1]} on {places[0][0]} only; {', '.join(dict.fromkeys(others))} is "
        "read to go on from a checkpoint, and nothing is written there"
    )


@cache
def code_hash(*folders: str) -> str:
    """Return a hash of the source of this package, which must be the same in every process.

    With `folders`, only of what is below these.
    """
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for folder in folders or (".",) for path in (root / folder).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def require_equal(items: Mapping[str, object], device: torch.device) -> None:
    """Raise TrainingError, on every process, naming the `items` whose values are not equal on all processes.

    Every process must call it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    names = hashlib.sha256("\n".join(items).encode()).digest()
    numbers = [len(items), _number(names), *(_number(repr(value).encode()) for value in items.values())]
    head = _gather(torch.tensor(numbers[:2], device=device))
    if not (head == head[0]).all():
        raise TrainingError(
            f"the processes run different programs, or recipes of different form: {_different(head)}"
        )
    values = _gather(torch.tensor(numbers[2:], device=device))
    different = [
        f"{name} ({_different(values[:, [column]])})"
        for column, name in enumerate(items)
        if not (values[:, column] == values[0, column]).all()
    ]
    if different:
        raise TrainingError(
            f"the processes do not agree: {'; '.join(different[:8])}. Start all of them with the same "
            "command, recipe, data and code"
        )


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "big")


def _gather(own: torch.Tensor) -> torch.Tensor:
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).cpu()


def _different(rows: torch.Tensor) -> str:
    others = [str(rank) for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
    return f"process {', '.join(others)} differs from process 0"


# ------------------------------------------------------------------------------------- loss of a process


@contextmanager
def together(lose: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within this block the loss of another process is one TrainingError, or ends this one (`lose`).

    A process whose connection broke is noticed at once, one that hangs after SILENT_S.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield
        return
    rank, world = dist.get_rank(), dist.get_world_size()
    heart = Heartbeat(_client(), rank, world, lose or _end)
    heart.start()
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(f"{type(error).__name__} {error}"):
            raise
        raise TrainingError(
            f"process {rank} of {world} lost another process, which has ended; its own message tells why "
            "(killed without one: usually out of memory). The same command with --resume continues"
        ) from error
    finally:
        heart.stop()


@contextmanager
def group_kept_longest() -> Iterator[None]:
    """Keep the group of processes until nothing else made in this block holds it.

    `Accelerator.end_training` leaves the group to whoever holds it last. Where that was the wrapper of a
    policy (DDP's Reducer), its destructor waited, with Python's lock held, for a thread of gloo that wanted
    the lock: now and then a finished run never ended. The group's own destructor gives the lock away.
    """
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    try:
        yield
    finally:
        gc.collect()  # wrappers are in circles of references
        del group


def _client() -> TCPStore:
    """Return a connection of its own: a call that waits in the main one would hold it."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "29500"))
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=CONNECT_S))


def _end(message: str) -> None:
    sys.stderr.write(f"vlafit: {printable(message)}\n")
    sys.stderr.flush()
    os._exit(2)  # the main thread waits in a collective, which nothing can interrupt


class Heartbeat:
    """Counts up in the launch's store, and calls `lose` when another process stopped to.

    A call to the store of a process that is stopped never returns, and no time-out ends it. So one thread
    calls, and another, which never does, watches that one.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        lose: Callable[[str], None],
        *,
        beat_s: float = BEAT_S,
        silent_s: float = SILENT_S,
    ) -> None:
        self._store, self._rank, self._world, self._lose = store, rank, world, lose
        self._beat_s, self._allowed = beat_s, max(1, round(silent_s / beat_s))
        self._stopped = threading.Event()
        self._answers = 0  # of the store
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._watch = threading.Thread(target=self._watch_store, name="heartbeat of the store", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()
        self._watch.start()

    def stop(self) -> None:
        """End, and wait for the threads, unless the store holds one."""
        self._stopped.set()
        self._thread.join(timeout=self._beat_s)
        self._watch.join(timeout=self._beat_s)

    def _watch_store(self) -> None:
        last, silent = 0, 0
        while not self._stopped.wait(self._beat_s):
            now = self._answers
            last, silent = now, silent + 1 if now == last else 0
            if silent > self._allowed and self._thread.is_alive() and not self._stopped.is_set():
                self._lose(self._silence("0", " (or the launcher, if it holds the store of the launch)"))
                return

    def _silence(self, others: str, more: str = "") -> str:
        return (
            f"process {others} of {self._world}{more} has given no sign of life for "
            f"{self._allowed * self._beat_s:.0f} s (stopped, swapping, or its machine is gone); "
            "stop the launch, then continue with the same command and --resume"
        )

    def _run(self) -> None:
        # Beats of this process are counted, not seconds: a clock may jump, and a stopped machine wakes up.
        last, silent = [0] * self._world, [0] * self._world
        while not self._stopped.wait(self._beat_s):
            try:
                self._store.add(f"vlafit/beat/{self._rank}", 1)
                now = [self._store.add(f"vlafit/beat/{rank}", 0) for rank in range(self._world)]
            except RuntimeError:  # the store's process, usually the main one, is gone
                now = list(last)
            self._answers += 1
            for rank in range(self._world):
                silent[rank] = 0 if now[rank] != last[rank] else silent[rank] + 1
            last = now
            lost = [rank for rank in range(self._world) if silent[rank] > self._allowed]
            if lost and not self._stopped.is_set():
                others = ", ".join(str(rank) for rank in lost if rank != self._rank) or "0"
                self._lose(self._silence(others))
                return
