"""Start `python -m vlafit ...`, and environments, by a fork of a process that has imported what they need.

It takes 6 s of CPU less for each command, 0.5 s for each environment process, and 2 s where that simulates.
The command is a process of its own as any other: arguments, folder, environment, open files, session, signals
and exit status are those that Popen was asked for, and Popen's own methods work on it. Only its imports are
shared. So a command whose environment differs in what is read at the start is started as always; so is every
command where the server cannot fork, because it has threads or the system is not Linux.

The server runs `python -m tests.forked`: one for commands, one for environments, which never import torch.
For each command it forks a process that forks the command and ends; then the command belongs to the next
process above that adopts orphans, which the caller does for that moment.
"""

import ctypes
import fcntl
import gc
import importlib
import inspect
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests import few_steps, first_files

REPOSITORY = Path(__file__).parents[1]
MODULES = ("vlafit", "tests.train.launched")  # that may be run as `python -m MODULE`
ENVIRONMENT = re.compile(r"from vlafit\.envs\.worker import main; main\(\d+\)")  # of env_pool.py
SHARED = {
    "command": (  # what a training run imports
        "torch._dynamo", "torch._refs", "torch.fx.experimental.symbolic_shapes", "torch.distributed.fsdp",
        "accelerate", "h5py", "safetensors.torch", "vlafit.cli.console", "vlafit.cli.verbs.train",
        "vlafit.cli.train_view", "vlafit.train", "vlafit.rollout", "vlafit.report", "vlafit.policies.pi0",
        "vlafit.datasets.layouts.libero",
    ),
    "environment": ("vlafit.envs.worker", "vlafit.envs.metaworld", "metaworld.env_dict"),
}  # fmt: skip
READ_AT_START = (
    "PYTHON",
    "LC_",
    "LANG",
    "HF_",
    "TRANSFORMERS_",
    "TORCH",
    "ATEN_",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
)
NAMES = tuple(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]
STARTED = subprocess.Popen
STARTING = threading.Lock()
SERVERS: dict[tuple[Any, ...], "_Server"] = {}
FILES = (("p2cread", 0), ("c2pwrite", 1), ("errwrite", 2))
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER
ABOVE = 500  # numbers of open files that no command is given
LENGTH = 4  # bytes of a message's length


class ForkedPopen(subprocess.Popen):
    """Popen that has the server fork what it can."""

    def _execute_child(self, *values: Any) -> None:
        asked = dict(zip(NAMES, values, strict=True))
        env = dict(os.environ if asked["env"] is None else asked["env"])
        kind = _kind(asked)
        server = _server(kind, env) if kind else None
        if server is None:
            super()._execute_child(*values)
            return
        files = {number: asked[name] if asked[name] != -1 else number for name, number in FILES}
        files |= {number: number for number in asked["pass_fds"]}
        command = {
            "run": asked["args"][2],
            "words": [os.fspath(word) for word in asked["args"][3:]],
            "folder": os.fspath(asked["cwd"] or os.getcwd()),
            "environment": env,
            "files": list(files),
            "session": asked["start_new_session"],
        }
        self.pid = server.start(command, list(files.values()))
        self._child_created = True
        self._close_pipe_fds(*(asked[n] for n in NAMES if n in PIPES))


def _kind(asked: dict[str, Any]) -> str | None:
    """Return the kind of server for `python -m MODULE ...` or an environment; None for what none can do."""
    args = asked["args"]
    unusual = ("executable", "preexec_fn", "shell")
    if (
        sys.platform != "linux"
        or not isinstance(args, list)
        or args[:1] != [sys.executable]
        or any(asked[name] for name in unusual)
        or not os.path.isdir(asked["cwd"] or ".")
    ):
        return None
    if args[1] == "-m" and args[2] in MODULES:
        return "command"
    return "environment" if args[1] == "-c" and ENVIRONMENT.fullmatch(args[2]) else None


def _at_start(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that Python and the shared imports read at their start."""
    return {k: v for k, v in environment.items() if k.startswith(READ_AT_START) and k != "OMP_WAIT_POLICY"}


class _Server:
    """The process that forks, and the socket to it."""

    def __init__(self, kind: str, env: dict[str, str]) -> None:
        self.link, theirs = socket.socketpair()
        self.guard = threading.Lock()
        command = [sys.executable, "-m", "tests.forked", kind, str(theirs.fileno())]
        self.process = STARTED(
            command, cwd=REPOSITORY, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.forks = self.link.recv(1) == b"1"

    def start(self, command: dict[str, Any], files: list[int]) -> int:
        """Have a command forked; return its process id, which is a child of this process."""
        message = json.dumps(command).encode()
        with self.guard:
            _adopt_orphans(True)
            try:
                socket.send_fds(self.link, [len(message).to_bytes(LENGTH)], files)
                self.link.sendall(message)
                return int.from_bytes(_exactly(self.link, LENGTH))
            finally:
                _adopt_orphans(False)


def _server(kind: str, env: dict[str, str]) -> _Server | None:
    """Return a server that shares what `env` decides at the start, or None where a fork cannot stand in.

    Commands have one, with this process's environment; environments have one for each that is asked for.
    """
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    if kind == "command" and _at_start(env) != _at_start(dict(own)):
        return None
    with STARTING:  # threads that ask at once share one
        key = (kind, *sorted(_at_start(env).items()))
        if key not in SERVERS:
            SERVERS[key] = _Server(kind, own if kind == "command" else env)
        return SERVERS[key] if SERVERS[key].forks else None


def _adopt_orphans(yes: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(ADOPT_ORPHANS, int(yes), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise EOFError("the server of tests/forked.py has ended")
        data += part
    return data


# ------------------------------------------------------------------------------------------------- the server


def main() -> None:
    """Import what commands share, then fork them; in a command's process, run it and return."""
    link = socket.socket(fileno=fcntl.fcntl(int(sys.argv[2]), fcntl.F_DUPFD_CLOEXEC, ABOVE))
    gc.disable()
    for name in SHARED[sys.argv[1]]:
        with suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    gc.freeze()
    gc.enable()
    if len(os.listdir("/proc/self/task")) != 1:
        return  # a fork would lose the other threads
    link.sendall(b"1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the caller, and with it this process
    command = _wait_for_command(link)
    link.close()
    if sys.argv[0] == "-c":
        exec(command["run"], {"__name__": "__main__"})
    else:
        few_steps.follow_environment()
        first_files.follow_environment()
        runpy.run_module(command["run"], run_name="__main__", alter_sys=True)


def _wait_for_command(link: socket.socket) -> dict[str, Any]:
    """Fork a process for each command, and return in that process only."""
    while True:
        head, files, _, _ = socket.recv_fds(link, LENGTH, 100)
        if not head:
            os._exit(0)
        command = json.loads(_exactly(link, int.from_bytes(head)))
        between = os.fork()
        if between:
            for file in files:
                os.close(file)
            os.waitpid(between, 0)
            continue
        between = os.getpid()
        if os.fork():
            os._exit(0)
        while os.getppid() == between:
            os.sched_yield()
        _become(command, files)
        link.sendall(os.getpid().to_bytes(LENGTH))
        return command


def _become(command: dict[str, Any], files: list[int]) -> None:
    """Take on the session, files, folder, environment and arguments of a command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if command["session"]:
        os.setsid()
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, ABOVE) for file in files]  # none of the numbers asked for
    for number, file in zip(command["files"], high, strict=True):
        os.dup2(file, number)
    for file in {*files, *high} - set(command["files"]):
        os.close(file)
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(command["environment"])
    code = command["run"] not in MODULES
    sys.path[0] = "" if code else command["folder"]
    sys.argv = ["-c" if code else command["run"], *command["words"]]


if __name__ == "__main__":
    main()
