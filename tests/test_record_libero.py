"""Scripted demonstrations of LIBERO: in LIBERO's own layout, from starts that no evaluation uses."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

pytest.importorskip("libero", reason="needs the extra libero (pip install 'vlafit[libero]')")

from vlafit import cli
from vlafit.datasets import Card, load_card, open_dataset
from vlafit.envs import EnvSpec, make
from vlafit.errors import ConfigError, SimulationError
from vlafit.files import sha256
from vlafit.record import record
from vlafit.rollout import load_protocol
from vlafit.rollout.protocol import require_unseen
from vlafit.types import Env

pytestmark = pytest.mark.sim

TASK = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
CARD = f"""
base = "libero-object-scripted"
name = "small"
path = "small"
[record]
tasks = ["{TASK}"]
episodes_per_task = 1
perturbed = 0.0
"""


def small_card(folder: Path) -> Card:
    path = folder / "small.toml"
    path.write_text(CARD)
    return load_card(path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    card = small_card(folder)
    try:
        report = record(card, folder / "small")
    except SimulationError as error:
        if "apt-get install" not in str(error):
            raise
        pytest.skip("no EGL here")
    assert report.episodes == 1
    return folder


@pytest.fixture(scope="module")
def env() -> Iterator[Env]:
    made = make(EnvSpec("libero", size=128, renderer="egl"))
    yield made
    made.close()


def test_the_file_has_the_datasets_of_liberos_own(recorded: Path) -> None:
    with h5py.File(recorded / "small" / f"{TASK}_demo.hdf5") as file:
        data = file["data"]
        sentence = json.loads(data.attrs["problem_info"])["language_instruction"]
        assert sentence == "pick up the alphabet soup and place it in the basket"
        assert data.attrs["macros_image_convention"] == "opengl"  # upside-down
        demo = data["demo_0"]
        steps = demo.attrs["num_samples"]
        shapes = {
            name: demo[name].shape[1:]
            for name in ("actions", "states", "obs/ee_pos", "obs/ee_ori", "obs/gripper_states",
                         "obs/joint_states", "obs/agentview_rgb", "obs/eye_in_hand_rgb")
        }  # fmt: skip
        assert all(len(demo[name]) == steps for name in shapes)
        assert list(shapes.values())[:1] == [(7,)] and shapes["obs/joint_states"] == (7,)
        assert shapes["obs/ee_pos"] == shapes["obs/ee_ori"] == (3,) and shapes["obs/gripper_states"] == (2,)
        assert shapes["obs/agentview_rgb"] == shapes["obs/eye_in_hand_rgb"] == (128, 128, 3)
        assert demo.attrs["expert"] == "scripted" and demo.attrs["seed"] >= 1000


def test_the_card_opens_it_upright_and_its_start_can_be_made_again(recorded: Path, env: Env) -> None:
    store = open_dataset(small_card(recorded))
    seed = store.episodes[0].seed
    assert seed is not None and store.episodes[0].task == TASK
    start = env.reset(TASK, seed)
    np.testing.assert_array_equal(store.state(0)[0], start.state)
    for camera, picture in start.images.items():
        np.testing.assert_array_equal(store.image(0, 0, camera), picture)
    with h5py.File(recorded / "small" / f"{TASK}_demo.hdf5") as file:
        np.testing.assert_array_equal(file["data/demo_0/states"][0], start.privileged["full_state"])


def test_an_evaluation_on_recorded_starts_is_refused_and_on_the_official_ones_it_is_not(
    recorded: Path,
) -> None:
    store = open_dataset(small_card(recorded))
    seeds = {TASK: {info.seed for info in store.episodes if info.seed is not None}}
    protocol = replace(load_protocol("libero-object-openpi"), tasks=(TASK,))
    require_unseen(protocol, 50, seeds)
    with pytest.raises(
        ConfigError, match=f"seeds of task '{TASK}' are also seeds of recorded demonstrations"
    ):
        require_unseen(replace(protocol, first_seed=1000), 50, seeds)


def test_a_finished_recording_is_kept_when_resumed(recorded: Path) -> None:
    (file,) = (recorded / "small").glob("*.hdf5")
    before = sha256(file)
    assert record(small_card(recorded), recorded / "small", resume=True).episodes == 1
    assert sha256(file) == before


def test_the_name_of_the_human_dataset_records_the_scripted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{TASK}_demo.hdf5").touch()  # so that nothing is recorded
    assert cli.main(["record", "libero-object", "--out", str(tmp_path), "--episodes", "1"]) == 2
    shown = capsys.readouterr()
    assert "human demonstrations" in shown.out and "libero-object-scripted" in shown.out
    assert "already holds a recording" in shown.err


def test_a_recording_from_starts_that_are_none_is_refused_before_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    path.write_text(CARD.replace("episodes_per_task = 1\n", "episodes_per_task = 9\nfirst_seed = 995\n"))
    with pytest.raises(ConfigError, match=r"record\.first_seed = 995: seeds below 1000"):
        record(load_card(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
