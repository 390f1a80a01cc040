"""A sweep whose workers, or which itself, are killed."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.train.world import REPOSITORY, tiny, write_dots
from tests.waiting import alive, wait_until
from vlafit import config, sweep
from vlafit.errors import VlafitError
from vlafit.sweep.study import Dimension, Study
from vlafit.sweep.worker import run_trials

SEARCH = {"optim.lr": Dimension(low=1e-4, high=1e-2, log=True)}


@pytest.fixture
def one(tmp_path: Path) -> sweep.Sweep:
    """A sweep of two trials of 60 steps in a new folder."""
    train = {"steps": 60, "validate_every": 20, "save_every": 20}
    recipe = tiny(write_dots(tmp_path), train=train, optim={"ema": 0.0, "warmup_steps": 0})
    return sweep.Sweep(recipe, Study(SEARCH, trials=2, startup=2), tmp_path / "out")


def test_workers_that_always_die_are_given_up_with_the_place_of_their_log(one: sweep.Sweep) -> None:
    lines: list[str] = []
    dies = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    with pytest.raises(VlafitError, match="2 of 2 trials .*worker 0 .*6 times.*SIGKILL") as raised:
        sweep.run(one, "study.toml", workers=2, worker_command=lambda: dies, tell=lines.append)
    assert str(one.folder / "logs" / "worker-0.log") in str(raised.value)
    assert len(lines) == 12 and all("died: ended by SIGKILL" in line for line in lines)


@pytest.mark.slow
def test_a_worker_that_is_given_up_costs_nothing_if_the_others_end_all_trials(one: sweep.Sweep) -> None:
    quick = replace(one, study=replace(one.study, trials=1))
    done: list[str] = []

    def command() -> list[str]:
        if not done:  # this process plays the other worker
            done.append("")
            run_trials(quick, done.append)
        return [sys.executable, "-c", "raise SystemExit(1)"]

    assert sweep.run(quick, "study.toml", workers=2, worker_command=command)


@pytest.mark.slow
def test_workers_end_with_a_sweep_that_is_killed_and_the_same_command_resumes_it(
    one: sweep.Sweep, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(config.dump(one.recipe))
    (tmp_path / "study.toml").write_text(
        'trials = 2\n[search]\n"optim.lr" = { low = 1e-4, high = 1e-2, log = true }\n'
    )
    words = ["sweep", "tiny.toml", "--study", "study.toml", "--workers", "2", "--out", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "vlafit", *words]
    with open(tmp_path / "log", "wb") as log:
        killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    metrics = [tmp_path / "out" / "trials" / name / "run" / "metrics.jsonl" for name in ("0000", "0001")]
    try:
        wait_until(lambda: any(path.is_file() for path in metrics), killed)
        workers = [child.pid for child in psutil.Process(killed.pid).children()]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        wait_until(lambda: "worker" in (tmp_path / "log").read_text(), killed)  # "worker N died": restarted
        workers = [child.pid for child in psutil.Process(killed.pid).children()]
    finally:
        killed.kill()
        killed.wait()
    wait_until(lambda: not any(map(alive, workers)))
    resumed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    trials = sweep.read(replace(one, folder=tmp_path / "out")).trials
    assert [trial.state for trial in trials] == ["whole", "whole"]
