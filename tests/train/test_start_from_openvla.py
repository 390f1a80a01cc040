"""`vlafit train` and `vlafit inspect --data` make one codec of a folder that holds statistics of datasets."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.checkpoints.test_openvla import CAMERAS, UNTOLD, write
from tests.train.agreement_world import recipe_of, start
from vlafit import cli
from vlafit.codec.tokenizer import train_word_tokenizer
from vlafit.errors import CodecError, ConfigError, VlafitError
from vlafit.recipe import Recipe

OPENPI = Path(__file__).parents[1] / "fixtures" / "openpi_pi0"
CONFIG = UNTOLD | CAMERAS
CARD = """
name = "bowls"
layout = "libero"
path = "bowls"
instruction = {{ source = "attrs" }}
[robot]
name = "arm"
hz = 10.0
control = "delta_pose"
state = {{ keys = ["obs/at"], dimensions = {state} }}
action = {{ keys = ["actions"], dimensions = {action} }}
"""


def write_card(folder: Path, cameras: tuple[str, ...], state: int, action: int) -> Path:
    """Write a dataset of values within [-0.1, 0.1], but for a gripper of 0 and 1, and its card."""
    (folder / "bowls").mkdir(parents=True)
    drawn = np.random.default_rng(0)
    with h5py.File(folder / "bowls" / "reach_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "put the bowl on the plate"})
        for number in range(4):
            group = data.create_group(f"demo_{number}")
            rows = drawn.uniform(-0.1, 0.1, (12, action)).astype(np.float32)
            rows[:, -1] = np.arange(12) % 2
            group.create_dataset("actions", data=rows)
            group.create_dataset("obs/at", data=drawn.uniform(-0.1, 0.1, (12, state)).astype(np.float32))
            for name in cameras:
                group.create_dataset(f"obs/{name}", data=drawn.integers(0, 256, (12, 16, 16, 3), np.uint8))
    text = CARD.format(state=state, action=action) + "".join(
        f'[[robot.cameras]]\nname = "{name}"\nkey = "obs/{name}"\nheight = 16\nwidth = 16\n'
        for name in cameras
    )
    (folder / "bowls.toml").write_text(text)
    return folder / "bowls.toml"


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_card(tmp_path_factory.mktemp("data"), ("front", "wrist"), 8, 7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OFT's folder, with statistics that are as wide as the data's values."""
    folder = write(tmp_path_factory.mktemp("oft") / "whole")
    (name,) = values = json.loads((folder / "dataset_statistics.json").read_text())
    for column in ("action", "proprio"):
        one = values[name][column]
        low, high = np.full(len(one["mean"]), -0.1), np.full(len(one["mean"]), 0.1)
        numbers = {"mean": 0 * low, "std": high / 2, "q01": low, "q99": high, "min": low, "max": high}
        one.update({key: number.tolist() for key, number in numbers.items()})
    (folder / "dataset_statistics.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of about the embedding's size."""
    folder = tmp_path_factory.mktemp("words")
    train_word_tokenizer([f"number {n} and {n * n}" for n in range(400)], 500).save(folder)
    return str(folder)


def recipe(card: Path, folder: Path, words: str, statistics: str = "checkpoint", **policy: Any) -> Recipe:
    made = recipe_of(card, folder, {"resize": True}, statistics=statistics)
    return replace(made, policy=replace(made.policy, **{"config": CONFIG, "tokenizer": words, **policy}))


def inspect(card: Path, folder: Path, *more: str, config: dict[str, Any] = CONFIG) -> int:
    options = [part for key, value in config.items() for part in ("--config", f"{key}={json.dumps(value)}")]
    return cli.main(["inspect", str(folder), "--data", str(card), *options, *more])


def with_another_set(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder)
    values = json.loads((folder / "dataset_statistics.json").read_text())
    (folder / "dataset_statistics.json").write_text(json.dumps(values | {"other": values["tiny_no_noops"]}))
    return folder


@pytest.mark.case(
    section="checkpoints",
    report="`inspect` says yes, `train` says that a tokenizer lacks, which the recipe names",
    user_has="an OpenVLA folder with the statistics of one dataset",
    now="its only statistics are used, and the agreement says so; both verbs decide alike",
)
def test_the_only_statistics_of_a_folder_need_no_choice(
    card: Path, whole: Path, words: str, capsys: pytest.CaptureFixture
):
    for statistics in ("checkpoint", "data"):
        initial = start(recipe(card, whole, words, statistics))
        assert "statistics of tiny_no_noops" in initial.report
    items = {item.name: item for item in start(recipe(card, whole, words)).agreement.items}
    assert "'tiny_no_noops'" in items["statistics"].sides["checkpoint"]
    assert inspect(card, whole, "--tokenizer", words) == 0
    said = capsys.readouterr().out
    assert "'tiny_no_noops'" in said and "policy.tokenizer" in said


def test_several_statistics_are_named_by_both_verbs_with_the_option_that_chooses(
    card: Path, whole: Path, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = with_another_set(whole, tmp_path / "several")
    facts = ("tiny_no_noops, other", "policy.assets", "--assets")
    for given in (CONFIG, UNTOLD):
        with pytest.raises(VlafitError) as caught:
            start(recipe(card, folder, words, config=given))
        assert all(fact in str(caught.value) for fact in facts) and "tokenizer" not in str(caught.value)
    assert inspect(card, folder, "--tokenizer", words) == 2
    said = capsys.readouterr().err
    assert all(fact in said for fact in facts)
    assert start(recipe(card, folder, words, assets="other")).codec.embodiment.name == "arm"
    assert inspect(card, folder, "--tokenizer", words, "--assets", "other") == 0
    start(recipe(card, folder, words, "data", config=UNTOLD))  # no statistics of the folder are used


def test_the_options_that_give_a_tokenizer_are_named(card: Path, whole: Path, capsys: pytest.CaptureFixture):
    facts = ("policy.tokenizer", "--policy.tokenizer", "--tokenizer")
    with pytest.raises(VlafitError) as caught:
        start(recipe(card, whole, ""))
    assert all(fact in str(caught.value) for fact in facts)
    assert inspect(card, whole) == 2
    said = capsys.readouterr().err
    assert all(fact in said for fact in facts)
    assert inspect(card, whole, config=UNTOLD) == 0
    needed = capsys.readouterr().out.partition("a recipe needs")[2]
    assert 'data.statistics = "data", or policy.config.openvla.cameras; policy.tokenizer' in needed


def test_inspect_refuses_a_tokenizer_that_train_refuses(
    card: Path, whole: Path, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    train_word_tokenizer(["put the bowl on the plate"], 300).save(tmp_path / "small")
    small = str(tmp_path / "small")
    with pytest.raises(CodecError, match="not the tokenizer of these weights"):
        start(recipe(card, whole, small))
    assert inspect(card, whole, "--tokenizer", small) == 2
    assert "not the tokenizer of these weights" in capsys.readouterr().err
    own = shutil.copytree(whole, tmp_path / "own")
    shutil.copy(Path(words) / "tokenizer.json", own)
    with pytest.raises(ConfigError, match=r"policy\.tokenizer .* has no effect"):
        start(recipe(card, own, words))
    assert inspect(card, own, "--tokenizer", words) == 2
    assert "has no effect" in capsys.readouterr().err
    start(recipe(card, own, ""))
    start(recipe(card, own, "", "data", config=UNTOLD))  # said to hold no tokenizer
    assert inspect(card, own) == 0


def test_openpis_options_of_a_codec_go_with_statistics_of_the_data(tmp_path: Path, words: str):
    card = write_card(tmp_path, ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), 8, 7)
    told = {"vision.heads": 2, "chunk": 6, "codec.relative": [True] * 6 + [False]}
    made = recipe(card, OPENPI, words, "data", config=told)
    with pytest.raises(VlafitError) as caught:
        start(made)
    assert "no tokenizer" not in str(caught.value) and "relative" in str(caught.value)
