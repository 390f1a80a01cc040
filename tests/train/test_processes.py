"""Processes of one run agree before the first step, and the loss of one is one sentence."""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.nn.parallel import DistributedDataParallel

from tests.train.test_two_processes import free_port
from tests.train.world import REPOSITORY
from vlafit import entry_points
from vlafit.errors import TrainingError
from vlafit.recipe import Recipe
from vlafit.train import data_files, processes
from vlafit.train.experiment import Experiment, build
from vlafit.train.prepare import identity
from vlafit.train.processes import Heartbeat, processes_asked_for

AGREE = """
import sys, torch, torch.distributed as dist
from vlafit.errors import TrainingError
from vlafit.train import processes
store = processes.connect()
dist.init_process_group("gloo")
rank = dist.get_rank()
with processes.together():
    try:
        names = ("data", "frames", "agreement", "code", "modules", "plan")
        differ = {name: f"{name} {rank}" for name in names}
        same = {"train.seed": 0}
        processes.require_equal({"optim.lr": 1e-4 * (1 + rank), **same, **differ}, torch.device("cpu"))
        print("agreed")
    except TrainingError as error:
        print("refused:", error)
    processes.require_equal({"optim.lr": 1e-4}, torch.device("cpu"))
    if rank == 1:
        import os
        os._exit(9)
    try:
        with processes.together():
            dist.barrier()
            dist.all_reduce(torch.ones(1))
    except TrainingError as error:
        print("lost:", error)
        os = __import__("os"); sys.stdout.flush(); os._exit(0)
"""


def start(code: str, world: int, port: int) -> list["subprocess.Popen[str]"]:
    shared = {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]


@pytest.mark.case(
    section="machines",
    report="strange results on several processes",
    user_has="different recipe, data, code or torch on one of them",
    now="refused before step 1, by the field's name",
)
def test_two_processes_with_different_recipes_are_refused_by_field_and_a_lost_one_is_one_sentence():
    first, second = start(AGREE, 2, free_port())
    heard, other = first.communicate(timeout=500)[0], second.communicate(timeout=500)[0]
    for said in (heard, other):
        assert "refused: the processes do not agree: optim.lr (process 1 differs from process 0)" in said, (
            said
        )
        assert "train.seed" not in said
        for name in ("data", "frames", "agreement", "code", "modules", "plan"):
            assert f"; {name} (process 1 differs from process 0)" in said
    assert second.returncode == 9
    assert "lost: process 0 of 2 lost another process" in heard and first.returncode == 0, heard


def compare_folders(folders: Sequence[tuple[str, Path]]) -> list[str]:
    """Return what each process says of (machine, folder of the run) pairs, refusals included."""
    store = HashStore()

    def ask(rank: int) -> str:
        machine, out = folders[rank]
        try:
            return processes.require_one_folder(out, store, rank, len(folders), machine)
        except TrainingError as error:
            return f"refused: {error}"

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(ask, range(len(folders))))


@pytest.mark.case(
    section="machines",
    report="the run's folder is not where one process was told to write",
    user_has="`--out` differs between the processes of a machine",
    now="refused before step 1, with both folders; machines may have folders of their own, which a line says",
)
def test_processes_of_a_machine_with_different_folders_are_refused_with_both(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for said in compare_folders([("a", here), ("a", here), ("a", there)]):
        assert f"process 0 has the run's folder {here}, and process 2 {there}" in said
        assert "the same --out" in said and said.startswith("refused")


def test_one_folder_by_two_names_is_one_and_machines_may_have_their_own(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    link = tmp_path / "link"
    link.symlink_to(here)
    assert compare_folders([("a", here), ("a", link)]) == ["", ""]
    first, second = compare_folders([("a", here), ("b", there)])
    assert first == second and not first.startswith("refused")
    assert f"written to {here} on a only; {there} on b is read" in first


@pytest.mark.slow
@pytest.mark.case(
    section="machines",
    report="the launch hangs at its start",
    user_has="a busy port, or a process that never came",
    now="one sentence after at most a minute",
)
def test_a_busy_port_is_one_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code = "from vlafit.train import processes\nprocesses.connect()"
        said = _first(code, port)
    assert f"127.0.0.1:{port} is in use" in said and "--main_process_port" in said


def _first(code: str, port: int) -> str:
    first, second = start(code, 2, port)
    said = first.communicate(timeout=500)[0]
    second.kill()
    second.communicate()
    return said


@pytest.mark.slow
@pytest.mark.case(
    section="machines",
    report="the launch hangs in training",
    user_has="a process that died, was stopped or lost its machine",
    now="one sentence: at once if it died, after 5 minutes of silence otherwise",
)
def test_a_process_that_gives_no_sign_of_life_is_lost_and_one_that_does_is_not():
    store = HashStore()
    lost: list[str] = []
    heart = Heartbeat(store, 0, 2, lost.append, beat_s=0.05, silent_s=1.0)
    other = Heartbeat(store, 1, 2, lost.append, beat_s=0.002, silent_s=1000)
    other.start()
    heart.start()
    until = time.monotonic() + 60
    while store.add("vlafit/beat/0", 0) < 20 and time.monotonic() < until and not lost:
        store.wait(["vlafit/beat/0"], timedelta(seconds=1))
    beats = store.add("vlafit/beat/0", 0)
    other.stop()
    heart._thread.join(timeout=60)
    assert beats >= 20, "lost while both gave signs of life"
    assert lost and "process 1 of 2" in lost[0] and "--resume" in lost[0]


class Held:
    """A store whose process was stopped: no call returns before `release` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def add(self, key: str, amount: int) -> int:
        self.release.wait()
        return 0


def test_a_store_that_does_not_answer_is_the_loss_of_the_process_that_holds_it():
    held, lost, told = Held(), [], threading.Event()

    def lose(said: str) -> None:
        lost.append(said)
        told.set()

    heart = Heartbeat(cast(Store, held), 1, 2, lose, beat_s=0.01, silent_s=0.1)
    heart.start()
    assert told.wait(60), "process 1 stays silent for ever"
    held.release.set()
    heart.stop()
    assert len(lost) == 1 and "process 0 of 2 " in lost[0] and "--resume" in lost[0]


STOPPED = """
import os, sys, time
from vlafit.train import processes
import torch, torch.distributed as dist
processes.BEAT_S, processes.SILENT_S = 0.2, 4.0
processes.Heartbeat.__init__.__kwdefaults__.update(beat_s=0.2, silent_s=4.0)
store = processes.connect()
dist.init_process_group("gloo")
with processes.together():
    dist.barrier()
    print("met", flush=True)
    while True:
        dist.all_reduce(torch.ones(1))
        time.sleep(0.01)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_lost_also_where_it_holds_the_store(victim: int) -> None:
    started = start(STOPPED, 2, free_port())
    try:
        for process in started:
            assert process.stdout is not None
            assert any(line == "met\n" for line in process.stdout)
        os.kill(started[victim].pid, signal.SIGSTOP)
        said = started[1 - victim].communicate(timeout=120)[0]
        assert f"process {victim} of 2" in said and "no sign of life" in said
        assert started[1 - victim].returncode == 2
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("accelerate launch --num_processes 4 -m", 4),
        ("accelerate launch --num-processes=2 -m", 2),
        ("torchrun --nproc_per_node 8", 8),
        ("accelerate launch -m", 0),
        ("accelerate launch --config_file two.yaml -m", 2),
    ],
)
def test_the_number_of_processes_that_a_launcher_was_asked_for(
    words: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text("compute_environment: LOCAL_MACHINE\nnum_processes: 2\n")
    assert processes_asked_for(words.split()) == number


@pytest.mark.slow
@pytest.mark.case(
    section="machines",
    report="several processes asked for, one runs",
    user_has="`accelerate launch` without `--multi_gpu`",
    now="refused",
)
def test_a_launcher_that_starts_one_process_of_several_is_reported():
    code = (
        "import subprocess, sys\n"  # stands for `accelerate launch`, which starts its program likewise
        "sys.exit(subprocess.call([sys.executable, '-c', 'from vlafit.train import processes\\n"
        "processes.require_launched()']))"
    )
    words = [
        sys.executable,
        "-c",
        code,
        "accelerate",
        "launch",
        "--num_processes",
        "2",
        "-m",
        "vlafit",
        "train",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
    assert "asked for 2 processes, but started only this one" in done.stderr


def test_the_hash_of_the_code_covers_every_module():
    assert processes.code_hash() == processes.code_hash() and len(processes.code_hash()) == 64


def test_what_the_processes_of_a_run_compare_covers_frames_agreement_and_modules_from_outside(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    experiment = build(recipe, torch.device("cpu"))
    facts = data_files.facts(experiment.data)

    def different(of: Experiment = experiment, files: Mapping[str, Mapping[str, int]] = facts) -> set[str]:
        here, there = identity(experiment, facts, None), identity(of, files, None)
        return {key for key in here if here[key] != there[key]}

    assert different() == set()
    assert different(files={"dots": {**facts["dots"], "newest_ns": 1}}) == set(), "a copy has another time"
    assert different(files={"dots": {**facts["dots"], "bytes": 1}}) == {"frames"}
    assert different(replace(experiment, agreement=None)) == {"agreement"}
    copies = [tmp_path / name / "step_000004" for name in ("here", "there", "again")]
    for copy, weights in zip(copies, (1, 2, 1), strict=True):  # of a run's folder on two machines
        (copy / "training").mkdir(parents=True)
        (copy / "training" / "state.json").write_text(f'{{"sha256": "{weights}"}}')
    states = [identity(experiment, facts, path)["checkpoint that goes on"] for path in (None, *copies)]
    assert len(set(states)) == 3 and states[1] == states[3]
    (tmp_path / "own_layout.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(entry_points, "_OUTSIDE", {})
    before = identity(experiment, facts, None)
    entry_points.import_outside("own_layout", "layout")
    between = identity(experiment, facts, None)
    (tmp_path / "own_layout.py").write_text("changed = True")
    after = identity(experiment, facts, None)
    assert before["modules"] != between["modules"] != after["modules"]


def test_the_wrapper_of_a_policy_goes_before_the_group_of_processes_does() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    gone: list[str] = []

    def train() -> None:
        wrapper = DistributedDataParallel(torch.nn.Linear(2, 2))
        wrapper.itself = wrapper  # pyright: ignore[reportAttributeAccessIssue]  # a circle, as hooks make one
        weakref.finalize(wrapper, gone.append, "wrapper")
        weakref.finalize(dist.group.WORLD, gone.append, "group")
        dist.destroy_process_group()  # as Accelerator.end_training does

    gc.disable()
    try:
        with processes.group_kept_longest():
            train()
        assert gone[:1] == ["wrapper"]
    finally:
        gc.enable()
