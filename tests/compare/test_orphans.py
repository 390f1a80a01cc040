"""Runs that a comparison or a sweep has started do not outlive it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.train.world import REPOSITORY
from tests.waiting import alive, wait_until
from vlafit import parent

CHILD = """
import signal, sys
from pathlib import Path
from vlafit import parent
signal.signal(signal.SIGTERM, lambda *_: (Path("saved").touch(), sys.exit(130)))
parent.watch()
Path("child").write_text(str(__import__("os").getpid()) + "\\n")
while True:
    signal.pause()
"""
PARENT = """
import sys
from pathlib import Path
from vlafit.compare.process import Processes
Processes(1).run([sys.executable, "-c", sys.argv[1]], Path("log"))
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def test_a_run_saves_and_ends_when_the_command_that_started_it_is_killed(tmp_path: Path) -> None:
    command = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], cwd=tmp_path, env=ENVIRONMENT)
    file = tmp_path / "child"
    try:
        wait_until(lambda: file.is_file() and file.read_text().endswith("\n"), command)
    finally:
        command.kill()
        command.wait()
    child = int(file.read_text())
    try:
        wait_until(lambda: not alive(child))
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)
    assert (tmp_path / "saved").is_file(), "it was asked to save before it ended"


def test_every_verb_notices_that_its_parent_has_gone(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "vlafit", "train", "quickstart", "--out", str(tmp_path / "run")]
    orphan = subprocess.run(
        words, env=ENVIRONMENT | {parent.VARIABLE: "1"}, stdin=subprocess.DEVNULL, timeout=60
    )
    assert orphan.returncode in (-signal.SIGTERM, 130)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
