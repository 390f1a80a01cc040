"""What a dataset declares and nothing follows is said: names that repeat, and LeRobot's splits."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlafit import cli
from vlafit.datasets import load_card, open_dataset
from vlafit.datasets.checks import check_declared
from vlafit.datasets.layouts.lerobot import Section
from vlafit.recipe import DataRecipe
from vlafit.train.data import declared_warnings, open_data

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lerobot_datasets" / "image"


@pytest.fixture
def change(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Returns a copy of a recorded LeRobot dataset of 5 episodes with another info.json."""

    def changed(how: Callable[[dict[str, Any]], object]) -> Path:
        folder = Path(shutil.copytree(FIXTURE, tmp_path / "set"))
        info = json.loads((folder / "meta" / "info.json").read_text())
        how(info)
        (folder / "meta" / "info.json").write_text(json.dumps(info))
        return folder

    return changed


def fingers(info: dict[str, Any]) -> None:
    """As public conversions of LIBERO have it: one name for both fingers."""
    names = info["features"]["observation.state"]["names"]
    names[-2:] = ["gripper", "gripper"]


@pytest.mark.case(
    section="data",
    report="two dimensions of a state or action have one name",
    user_has="public conversions of LIBERO to LeRobot: `gripper`, `gripper`",
    now="it trains; `data check` and the run's warnings name the dimensions",
)
def test_names_that_repeat_are_named(change: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = change(fingers)
    data = open_data(DataRecipe(cards=(str(folder),), validation=0.25), 0)
    (sentence,) = declared_warnings(data)
    assert "'set'" in sentence and "state: dimensions 5 and 6 are both 'gripper'" in sentence
    assert "robot.state.labels" in sentence
    cli.main(["data", "check", str(folder), "--no-pixels"])
    assert "repeated_names" in capsys.readouterr().out
    card = load_card(folder)
    state = replace(card.robot.state, labels=(*card.robot.state.labels[:-1], "finger"))
    assert not check_declared(open_dataset(replace(card, robot=replace(card.robot, state=state))))


@pytest.mark.case(
    section="data",
    report="the policy ignores one of its cameras",
    user_has="a card in which two cameras have the same `key`",
    now="it trains; `data check` and the run's warnings name the cameras and the key",
)
def test_cameras_that_are_read_from_one_key_are_named(
    change: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_dataset(load_card(change(lambda info: None)))
    first, *others = store.card.robot.cameras
    twice = (first, *(replace(camera, key=first.key) for camera in others))
    assert others and not check_declared(store)
    store = open_dataset(replace(store.card, robot=replace(store.card.robot, cameras=twice)))
    [finding] = check_declared(store)
    names = " and ".join(camera.name for camera in twice)
    assert f"cameras {names} are read from the same key, {first.key}" in finding.message
    assert finding.cameras == tuple(camera.name for camera in twice)


@pytest.mark.case(
    section="data",
    report="episodes of the test split are trained on",
    user_has="`splits` in LeRobot's info.json",
    now="as in LeRobot all are used; `data check` and the run's warnings say so, and how to choose",
)
def test_splits_that_are_not_followed_are_named(change: Callable[..., Path]) -> None:
    folder = change(lambda info: info.update(splits={"train": "0:4", "test": "4:5"}))
    data = open_data(DataRecipe(cards=(str(folder),), validation=0.25), 0)
    (sentence,) = declared_warnings(data)
    assert "train 0:4, test 4:5" in sentence and "not followed" in sentence
    assert "[lerobot] episodes" in sentence and "data.validation_sets" in sentence
    card = load_card(folder)
    chosen = replace(
        card, section=Section(episodes=(0, 1, 2, 3)), expect=replace(card.expect, episodes=4, frames=0)
    )
    assert not check_declared(open_dataset(chosen))


def test_a_split_of_all_episodes_is_none(change: Callable[..., Path]) -> None:
    assert not check_declared(open_dataset(FIXTURE))
    assert not check_declared(open_dataset(change(lambda info: info.pop("splits"))))
