"""End a child process that trains when the process that started it has gone, however that ended.

The parent gives the child a pipe as standard input and never writes to it: the pipe ends with the parent,
even if that is killed.
"""

import os
import signal
import subprocess
import threading

VARIABLE = "VLAFIT_PARENT_ON_STDIN"  # set by a parent whose end is to be noticed
STDIN = subprocess.PIPE


def watch() -> None:
    """If the parent asked for it, send this process SIGTERM when the parent has gone: it saves and ends.

    The variable is removed: processes that this one starts have another parent.
    """
    if os.environ.pop(VARIABLE, None) is not None:
        threading.Thread(target=_wait, name="parent", daemon=True).start()


def _wait() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
