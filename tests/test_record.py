"""Recording: the same bytes however it is played, safe against interruption, and exact about what it did."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

from tests.waiting import alive, wait_until
from vlafit import cli, locks
from vlafit.datasets import Card, RecordSpec, load_card, open_dataset
from vlafit.envs import EnvSpec, make
from vlafit.errors import ConfigError, DataError, EmbodimentError, SimulationError, VlafitError
from vlafit.files import sha256
from vlafit.record import RecordProgress, record
from vlafit.record.episode import is_perturbed, play, pushes
from vlafit.record.plan import plan_recording
from vlafit.record.workers import _Schedule

pytestmark = pytest.mark.sim
pytest.importorskip("metaworld")

CARD = """
name = "small"
layout = "libero"
path = "small"
[instruction]
source = "attrs"
[record]
env = "metaworld"
tasks = ["coffee-button-v3", "handle-press-v3"]
episodes_per_task = 2
perturbed = 0.5
hold_steps = 3
[robot]
name = "metaworld-sawyer"
hz = 80
control = "delta_position"
renderer = "ray"
[[robot.cameras]]
name = "workspace"
key = "obs/workspace_rgb"
height = 16
width = 16
[robot.state]
keys = ["obs/ee_pos", "obs/gripper_states"]
dimensions = 4
[robot.action]
keys = ["actions"]
dimensions = 4
"""
TASKS = ("coffee-button-v3", "handle-press-v3")
SPEC = RecordSpec("metaworld", TASKS, 2, perturbed=0.5, hold_steps=3)


def card_at(folder: Path, **changes: object) -> Card:
    path = folder / "small.toml"
    path.write_text(CARD)
    card = load_card(path)
    assert card.record is not None
    return replace(card, record=replace(card.record, **changes)) if changes else card


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    seen: list[RecordProgress] = []
    report = record(card_at(folder), folder / "small", progress=seen.append)
    assert report.episodes == 4 and len(report.files) == 2 and report.frames > 100
    assert [progress.done for progress in seen] == [1, 2, 3, 4]
    assert seen[-1].wanted == 4 and seen[-1].remaining_s == 0 and seen[0].remaining_s > 0
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def test_the_files_are_in_liberos_layout(recorded: Path) -> None:
    assert [path.name for path in sorted((recorded / "small").iterdir())] == [f"{t}_demo.hdf5" for t in TASKS]
    with h5py.File(recorded / "small" / "coffee-button-v3_demo.hdf5") as file:
        data = file["data"]
        assert data.attrs["env_name"] == "coffee-button-v3"
        sentence = json.loads(data.attrs["problem_info"])["language_instruction"]
        assert sentence == "press the button of the coffee machine"
        settings = json.loads(data.attrs["env_args"])
        assert (settings["renderer"], settings["size"], settings["cameras"]) == ("ray", 16, ["workspace"])
        assert settings["versions"]["mujoco"] and json.loads(data.attrs["skipped_seeds"]) == []
        assert list(data) == ["demo_0", "demo_1"] and data.attrs["num_demos"] == 2
        lengths = [data[name].attrs["num_samples"] for name in data]
        assert data.attrs["total"] == sum(lengths)
        assert [data[name].attrs["seed"] for name in data] == [1000, 1001]
        assert [bool(data[name].attrs["perturbed"]) for name in data] == [False, True]
        for name, steps in zip(data, lengths, strict=True):
            demo = data[name]
            frames = demo["obs/workspace_rgb"]
            assert frames.shape == (steps, 16, 16, 3) and frames.dtype == np.uint8 and frames.chunks is None
            assert demo["actions"].shape == (steps, 4) and np.abs(demo["actions"][:]).max() <= 1
            assert demo["obs/ee_pos"].shape == (steps, 3) and demo["obs/gripper_states"].shape == (steps, 1)
            assert demo["dones"][:].tolist() == [0] * (steps - 1) + [1]
            assert demo["rewards"][:].tolist() == [0] * (steps - 4) + [1] * 4  # success, and 3 steps held


def test_the_card_opens_what_it_recorded(recorded: Path) -> None:
    store = open_dataset(load_card(recorded / "small.toml"))
    assert [episode.task for episode in store.episodes] == [TASKS[0]] * 2 + [TASKS[1]] * 2
    assert store.episodes[0].instruction == "press the button of the coffee machine"
    env = make(EnvSpec("metaworld", size=16, cameras=("workspace",)))
    first = env.reset(TASKS[0], 1000)
    np.testing.assert_array_equal(store.image(0, 0, "workspace"), first.images["workspace"])  # upright, as is
    np.testing.assert_array_equal(store.state(0)[0], first.state)


def test_a_file_with_another_name_still_says_whose_seeds_it_holds(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    shutil.copy(recorded / "small.toml", tmp_path / "small.toml")
    for number, task in enumerate(TASKS):
        shutil.copy(recorded / "small" / f"{task}_demo.hdf5", tmp_path / "small" / f"mine_{number}.hdf5")
    store = open_dataset(load_card(tmp_path / "small.toml"))
    assert [(one.task, one.seed) for one in store.episodes][::2] == [(task, 1000) for task in TASKS]


def test_starts_of_evaluations_are_not_recorded(recorded: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vlafit.envs.metaworld.MetaWorld.recorded_from", 1001, raising=False)
    with pytest.raises(ConfigError, match=r"record\.first_seed = 1000: seeds below 1001 are the starts from"):
        record(load_card(recorded / "small.toml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_clean_labels_replayed_from_the_seed_succeed_again(recorded: Path) -> None:
    env = make(EnvSpec("metaworld", size=16, cameras=("workspace",)))
    with h5py.File(recorded / "small" / f"{TASKS[0]}_demo.hdf5") as file:
        demo = file["data/demo_0"]  # not perturbed: its labels are what was executed
        env.reset(TASKS[0], int(demo.attrs["seed"]))
        outcomes = [env.step(action, render=False)[1] for action in demo["actions"][:].astype(np.float32)]
        assert outcomes == demo["rewards"][:].astype(bool).tolist()


def test_two_processes_write_the_same_bytes_as_one(recorded: Path, tmp_path: Path) -> None:
    record(card_at(tmp_path), tmp_path / "again", workers=2)
    assert hashes(tmp_path / "again") == hashes(recorded / "small")


def heed_ctrl_c() -> None:
    """Background jobs of a shell ignore it, and so would all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("workers", "how"),
    [
        (1, signal.SIGKILL),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_recording_that_is_stopped_and_resumed_equals_one_made_at_once(
    recorded: Path, tmp_path: Path, workers: int, how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    card, out = card_at(tmp_path), tmp_path / "stopped"
    words = ["record", str(tmp_path / "small.toml"), "--out", str(out), "--workers"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vlafit", *words, str(workers)],
        cwd=Path(__file__).parents[1], preexec_fn=heed_ctrl_c, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: any(out.glob(".episodes-*/*/*.npz")), process)
    parts = list(out.glob(".episodes-*/*/*.npz"))
    its_workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(how)
    _, said = process.communicate()
    assert process.returncode == (-how if how == signal.SIGKILL else 130), said
    assert how == signal.SIGKILL or "interrupted; continue with the same command and --resume" in said
    assert not (out / f"{TASKS[1]}_demo.hdf5").exists()
    assert all(part.exists() for part in parts)  # what was finished is there
    with pytest.raises(DataError, match=r"stopped already holds a recording.*--resume"):
        record(card, out)
    wait_until(lambda: not any(map(alive, its_workers)))  # the killed process's workers notice and end
    capsys.readouterr()
    assert cli.main([*words, "1", "--resume"]) == 0
    assert f"{TASKS[1]}" in (shown := capsys.readouterr().out) and "4 episodes, " in shown
    assert hashes(out) == hashes(recorded / "small")
    assert record(card, out, resume=True).episodes == 4  # nothing left to do


@pytest.mark.case(
    section="machines",
    report="a segmentation fault at the end of a recording",
    user_has="a disk that fills up while `vlafit record` writes a task's file",
    now="one sentence that names the file; the episodes are kept for `--resume`",
)
def test_a_disk_that_is_full_when_a_file_is_written_is_named_and_the_episodes_are_kept(
    recorded: Path, tmp_path: Path
) -> None:
    card, out = card_at(tmp_path, tasks=TASKS[:1]), tmp_path / "full"
    file = out / f"{TASKS[0]}_demo.hdf5"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(DataError, match=rf"{file}: cannot be written .*continue with --resume"):
            record(card, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name[:10] for path in out.iterdir()] == [".episodes-"]
    assert len(list(out.glob(".episodes-*/*/*.npz"))) == 2
    record(card, out, resume=True)
    assert sha256(file) == sha256(recorded / "small" / file.name)


def test_ctrl_c_keeps_what_is_finished(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"

    def stop(progress: RecordProgress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(card_at(tmp_path), out, progress=stop)
    assert (out / f"{TASKS[0]}_demo.hdf5").exists() and not (out / f"{TASKS[1]}_demo.hdf5").exists()
    record(card_at(tmp_path), out, resume=True)
    assert hashes(out) == hashes(recorded / "small")


def test_an_episode_damaged_on_disk_is_played_again(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "damaged"

    def stop(progress: RecordProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(card_at(tmp_path), out, progress=stop)
    (part,) = out.glob(".episodes-*/*/*.npz")
    part.write_bytes(part.read_bytes()[:100])
    record(card_at(tmp_path), out, resume=True)
    assert hashes(out) == hashes(recorded / "small")


def test_resuming_with_other_settings_is_refused(recorded: Path, tmp_path: Path) -> None:
    for changes in ({"noise": 0.1}, {"hold_steps": 4}, {"episodes_per_task": 3}):
        with pytest.raises(DataError, match="recorded with other settings"):
            record(card_at(tmp_path, **changes), recorded / "small", resume=True)


def test_a_recording_is_made_by_one_command_at_a_time(recorded: Path, tmp_path: Path) -> None:
    with locks.exclusive(tmp_path / "out", "vlafit record"), pytest.raises(VlafitError, match="process"):
        record(card_at(tmp_path), tmp_path / "out")


def test_a_file_that_is_no_recording_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    theirs = out / f"{TASKS[0]}_demo.hdf5"
    theirs.write_bytes(b"something else")
    for resume in (False, True):
        with pytest.raises(DataError, match=theirs.name):
            record(card_at(tmp_path), out, resume=resume)
    assert theirs.read_bytes() == b"something else"


def test_seeds_that_the_expert_fails_are_skipped_and_listed(tmp_path: Path) -> None:
    """With a horizon that some starts need more than."""
    lengths = {}
    env = make(EnvSpec("metaworld", size=8, cameras=("workspace",)))
    for seed in range(1000, 1006):
        episode = play(env, replace(SPEC, hold_steps=0, perturbed=0), TASKS[1], seed)
        assert episode is not None
        lengths[seed] = len(episode.actions)
    horizon = sorted(lengths.values())[2]  # three of six are short enough
    card = card_at(tmp_path, tasks=(TASKS[1],), horizon=horizon, hold_steps=0, perturbed=0.0)
    report = record(card, tmp_path / "out")
    good = [seed for seed, length in lengths.items() if length <= horizon][:2]
    assert report.files[0].skipped == tuple(seed for seed in range(1000, good[1]) if seed not in good)
    with h5py.File(report.files[0].path) as file:
        assert [file[f"data/demo_{i}"].attrs["seed"] for i in (0, 1)] == good
        assert tuple(json.loads(file["data"].attrs["skipped_seeds"])) == report.files[0].skipped


def test_an_expert_that_never_succeeds_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=r"0 of \d+ episodes.* 3 steps"):
        record(card_at(tmp_path, horizon=3), tmp_path / "out", episodes_per_task=1)


@pytest.mark.parametrize("order", [1, -1])
def test_the_shortest_run_of_seeds_is_played_in_whatever_order_episodes_end(order: int) -> None:
    fails = {1001, 1003, 1005}
    schedule = _Schedule(["one"], replace(SPEC, tasks=("one",), episodes_per_task=4))
    enough = False
    while schedule.waiting:
        assert not enough
        under_way = [schedule.waiting.popleft() for _ in range(min(3, len(schedule.waiting)))]
        for task, seed in under_way[::order]:
            enough = schedule.ended(task, seed, seed not in fails)
    assert enough and sorted(schedule.outcomes["one"]) == list(range(1000, 1007))


def test_the_asked_share_of_episodes_is_perturbed_and_labels_stay_clean() -> None:
    spec = replace(SPEC, perturbed=0.3, noise=0.5)
    marked = [is_perturbed(spec, seed) for seed in range(1000, 1100)]
    assert sum(marked) == 30 and sum(marked[:10]) == 3
    assert not any(is_perturbed(replace(spec, perturbed=0.0), seed) for seed in range(1000, 1100))
    assert all(is_perturbed(replace(spec, perturbed=1.0), seed) for seed in range(1000, 1100))
    quiet, pushed = (pushes(spec, "a", 1000 + marked.index(value), 200) for value in (False, True))
    assert not quiet.any()
    assert 0.1 < (pushed != 0).any(axis=1).mean() < 0.8
    many = np.concatenate([pushes(spec, "a", 1000 + i, 200) for i, on in enumerate(marked) if on])
    assert 0.4 < many[many != 0].std() < 0.6
    assert not np.array_equal(pushed, pushes(spec, "b", 1000 + marked.index(True), 200))

    env = make(EnvSpec("metaworld", size=8, cameras=("workspace",)))
    every = replace(SPEC, perturbed=1.0, noise=0.5)
    seed = next(seed for seed in range(1000, 1100) if pushes(every, TASKS[0], seed, 10).any())
    clean, shaken = (play(env, s, TASKS[0], seed) for s in (replace(every, perturbed=0.0), every))
    assert clean is not None and shaken is not None
    assert not np.array_equal(clean.state[:25], shaken.state[:25])
    assert np.abs(shaken.actions).max() <= 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('layout = "libero"', 'layout = "robomimic"', "layout|robomimic"),
        ('key = "obs/workspace_rgb"', 'key = "image"', "such as 'obs/workspace_rgb' instead of 'image'"),
        ('key = "obs/workspace_rgb"', 'key = "obs/ee_pos"', "named twice: obs/ee_pos"),
        ("width = 16", "width = 24", r"square.*\(16, 24\)"),
        (
            'keys = ["actions"]',
            'keys = ["action"]',
            r"robot.action.keys of a recording must be \['actions'\]",
        ),
        ("[record]\n", "[record]\nhorizon = 499\n", "end after 500 steps"),
        ('"coffee-button-v3"', '"coffe-button-v3"', "did you mean 'coffee-button-v3'"),
        ("hz = 80", "hz = 20", "rate in Hz"),
        ('env = "metaworld"', 'env = "metawrld"', "did you mean 'metaworld'"),
        (
            'name = "workspace"\nkey = "obs/workspace_rgb"',
            'name = "front"\nkey = "obs/front_rgb"',
            "no camera 'front'",
        ),
    ],
)
def test_a_card_that_cannot_be_recorded_says_why(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    assert old in CARD
    path.write_text(CARD.replace(old, new))
    with pytest.raises((ConfigError, EmbodimentError, SimulationError), match=message):
        record(load_card(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_card_without_a_record_section_and_a_wrong_number_are_refused(tmp_path: Path) -> None:
    card = card_at(tmp_path)
    with pytest.raises(ConfigError, match=r"no \[record\] section"):
        record(replace(card, record=None), tmp_path / "out")
    with pytest.raises(ConfigError, match="episodes_per_task = 0"):
        record(card, tmp_path / "out", episodes_per_task=0)
    with pytest.raises(ConfigError, match="workers .*0.* -1"):
        record(card, tmp_path / "out", workers=-1)
    assert plan_recording(card, 7).record.episodes_per_task == 7


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_played(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot write to folder") as caught:
        record(card_at(tmp_path), tmp_path / "file" / "out")
    assert "file" in str(caught.value)
