"""The same demonstrations in two datasets, or twice in one, are found by what they hold."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.datasets.layouts import card, demos, in_file_order, robomimic_card, write_libero, write_robomimic
from tests.train.world import tiny
from vlafit.datasets import Card, EpisodeStore, open_dataset
from vlafit.datasets.leaks import Repeat, repeats, require_apart, require_once
from vlafit.datasets.write import card_text
from vlafit.errors import DataError
from vlafit.train.data import open_data
from vlafit.train.episode_warnings import line_break_warnings, repeat_warnings

EVERYTHING = in_file_order(demos(3))


def chosen(store: EpisodeStore, name: str = "") -> tuple[str, EpisodeStore, list[str]]:
    return name or store.card.name, store, [info.id for info in store.episodes]


@pytest.fixture
def original(tmp_path: Path) -> Card:
    return card(write_libero(tmp_path / "set", EVERYTHING))


def written(made: Card, path: Path) -> str:
    path.write_text(card_text(made))
    return str(path)


@pytest.mark.case(
    section="data",
    report="a dataset counts twice, or is trained on and validated on",
    user_has="a copy of a dataset, under another name or in another layout, beside it in `data.cards`",
    now="an error with the number of episodes and both names, before training",
)
@pytest.mark.parametrize("other", ["copy", "renamed files", "layout"])
def test_a_copy_of_a_dataset_beside_it_is_refused_whatever_its_name_or_layout(
    other: str, original: Card, tmp_path: Path
) -> None:
    copy = replace(original, name="copy", path=str(tmp_path / "copy"))
    if other == "layout":
        copy = robomimic_card(write_robomimic(tmp_path / "copy", EVERYTHING), name="copy")
    else:
        shutil.copytree(tmp_path / "set", tmp_path / "copy")
    if other == "renamed files":  # other tasks, so another draw of what is held out
        for file in (tmp_path / "copy").iterdir():
            file.rename(file.with_name(f"again_{file.name}"))
    cards = (written(original, tmp_path / "a.toml"), written(copy, tmp_path / "b.toml"))
    says = r"4 training episodes of card 'copy' are those of card 'small' .*count twice.*data\.weights"
    if other == "renamed files":
        says = r"training episodes of card 'copy' are those of card 'small'"
    for weights in ({}, {"small": 0.5, "copy": 0.5}):
        recipe = replace(tiny(tmp_path).data, cards=cards, weights=weights)
        with pytest.raises(DataError, match=says):
            open_data(recipe, 0)
    if other != "renamed files":  # two views of one recording, of which the same episodes are held out
        open_data(replace(recipe, embodiments={"small": "one", "copy": "two"}), 0)


def test_a_copy_with_other_instructions_is_said_and_counts(original: Card, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    words = replace(original.instruction, source="card", text="do it in other words")
    copy = replace(original, name="copy", path=str(tmp_path / "copy"), instruction=words)
    cards = (written(original, tmp_path / "a.toml"), written(copy, tmp_path / "b.toml"))
    data = open_data(replace(tiny(tmp_path).data, cards=cards), 0)
    (sentence,) = repeat_warnings(data)
    assert "card 'copy': 4 training episodes are copies of episodes of card 'small'" in sentence
    assert "with another instruction" in sentence


def test_an_instruction_with_a_line_break_is_said(original: Card, tmp_path: Path) -> None:
    recipe = tiny(tmp_path).data
    broken = replace(original.instruction, source="card", text="turn it on\nthen off")
    for words, count in ((broken, 1), (replace(broken, text="turn it on\n"), 0)):
        card = written(replace(original, instruction=words), tmp_path / "words.toml")
        found = line_break_warnings(open_data(replace(recipe, cards=(card,)), 0))
        assert len(found) == count
        assert all("holds a line break ('turn it on\\nthen off' of " in one for one in found)


def test_copies_within_a_dataset_are_said(original: Card, tmp_path: Path) -> None:
    with h5py.File(next((tmp_path / "set").glob("*stove*")), "a") as file:
        file.copy("data/demo_0", "data/demo_3")
    recipe = replace(tiny(tmp_path).data, cards=(written(original, tmp_path / "a.toml"),), validation=0.0)
    (sentence,) = repeat_warnings(open_data(recipe, 0))
    assert "1 training episodes are copies of others ('turn_on_the_stove_demo/demo_3' of" in sentence


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"gripper": None}, True),  # another unit of the state: the actions tell
        ({"actions": None}, True),
        ({"gripper": None, "actions": None}, False),
        ({"wrist": None}, True),  # one camera is enough
        ({"wrist": None, "front": None}, False),  # the same motion in another scene
    ],
)
def test_an_episode_is_known_by_either_column_and_by_any_camera(
    change: dict[str, None], same: bool, tmp_path: Path
) -> None:
    one = EVERYTHING[2]
    values = {name: (getattr(one, name) * 2 + 40).astype(getattr(one, name).dtype) for name in change}
    stores = [
        open_dataset(card(write_libero(tmp_path / name, [demo]), name=name))
        for name, demo in (("a", one), ("b", replace(one, **values)))
    ]
    found = list(repeats(map(chosen, stores)))
    assert len(found) == same
    if same:
        ids = stores[0].episodes[0].id
        assert found == [Repeat("b", ids, "a", ids, whole=not {"gripper", "actions"} & {*change})]
        with pytest.raises(DataError, match="would validate what was trained on"):
            require_apart([chosen(stores[0])], [chosen(stores[1])])
    else:
        require_apart([chosen(stores[0])], [chosen(stores[1])])
    if not change:
        with pytest.raises(DataError, match="1 training episodes of b are those of a"):
            require_once(map(chosen, stores))


def test_a_copy_whose_frames_went_through_a_lossy_video_is_known(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = EVERYTHING[2]
    noise = {
        name: np.clip(frames + rng.normal(0, 1, frames.shape), 0, 255).round().astype(np.uint8)
        for name, frames in (("front", one.front), ("wrist", one.wrist))
    }
    stores = [
        open_dataset(card(write_libero(tmp_path / name, [demo]), name=name))
        for name, demo in (("a", one), ("b", replace(one, **noise)))
    ]
    assert len(list(repeats(map(chosen, stores)))) == 1


@pytest.mark.parametrize("change", [{"rotate": 180}, {"flip": "vertical"}, {"channels": "bgr"}])
def test_a_copy_whose_card_reads_its_frames_otherwise_is_known(
    change: dict[str, Any], original: Card, tmp_path: Path
) -> None:
    cameras = tuple(replace(camera, **({"rotate": 0} | change)) for camera in original.robot.cameras)
    copy = replace(original, name="copy", robot=replace(original.robot, cameras=cameras))
    stores = [open_dataset(made) for made in (original, copy)]
    assert len(list(repeats(map(chosen, stores)))) == len(EVERYTHING)


def test_pictures_that_show_nothing_are_compared_exactly(tmp_path: Path) -> None:
    one = EVERYTHING[2]
    stores = []
    for level in (7, 8):
        flat = np.full_like(one.front, level)
        shown = card(write_libero(tmp_path / str(level), [replace(one, front=flat, wrist=flat)]))
        stores.append(open_dataset(replace(shown, name=str(level))))
    assert not list(repeats(map(chosen, stores)))


def test_a_state_that_all_episodes_share_makes_none_the_same(tmp_path: Path) -> None:
    """A clock as the state, and a scene in which nothing moves."""
    clock, frames = np.arange(4.0)[:, None].repeat(3, 1), EVERYTHING[0].front[:4]
    same = {"position": clock, "gripper": clock[:, :2], "front": frames, "wrist": frames}
    alike = [replace(demo, actions=demo.actions[:4], **same) for demo in [*EVERYTHING, EVERYTHING[1]]]
    store = open_dataset(card(write_libero(tmp_path / "set", alike)))
    (found,) = repeats([chosen(store)])
    assert found.whole and {found.episode, found.first} == {
        info.id
        for n, info in enumerate(store.episodes)
        if (store.actions(n) == EVERYTHING[1].actions[:4].astype(np.float32)).all()
    }
