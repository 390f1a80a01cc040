"""Which episodes an evaluation chooses: those that neither the run nor those before it learned from."""

import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.train.world import tiny, write_dots
from vlafit import config
from vlafit.checkpoints import Learned, Lineage
from vlafit.datasets import EpisodeStore, open_dataset
from vlafit.datasets.content import content_of, recognise
from vlafit.datasets.convert import convert
from vlafit.errors import ConfigError
from vlafit.offline import choose_episodes
from vlafit.train.data import Data, open_data


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dots(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def data(card: Path) -> Data:
    recipe = tiny(card)
    return open_data(recipe.data, recipe.train.seed)


def history(data: Data) -> Lineage:
    return Lineage().followed_by("", data.learned, {}, data.contents)


@pytest.fixture(scope="module")
def checkpoint(card: Path, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files of a run's checkpoint that say what it learned from."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "recipe.toml").write_text(config.dump(tiny(card)))
    history(data).write(folder)
    return folder


def changed(card: Path, to: Path, **replaced: str) -> EpisodeStore:
    """Open a copy of the dataset whose card, and file names, differ."""
    shutil.copytree(card.parent, to)
    text = (to / card.name).read_text()
    for old, new in {'name = "dots"': 'name = "other"', **replaced}.items():
        assert old in text
        text = text.replace(old, new)
    (to / card.name).write_text(text)
    for path in (to / "dots").iterdir():
        path.rename(path.with_name(f"renamed_{path.name}"))
    return open_dataset(to / card.name)


TEXT = {'source = "attrs"': 'source = "card"\ntext = "go"'}
SCALED = {'keys = ["actions"], dimensions = 2': 'keys = ["actions"], dimensions = 2, scale = [1.0, 1.001]'}


@pytest.mark.case(
    section="data",
    report="an evaluation on recorded data is too good",
    user_has="the training data under another card, file name, sentence, action scale or layout",
    now="episodes that the policy learned from are recognised by their states or actions, and left out",
)
@pytest.mark.parametrize("change", [{}, TEXT, SCALED])
def test_training_episodes_are_recognised_in_another_file_under_another_card(
    change: dict[str, str], card: Path, data: Data, checkpoint: Path, tmp_path: Path
) -> None:
    store = changed(card, tmp_path / "copy", **change)
    chosen = choose_episodes(store, checkpoint)
    assert len(chosen.evaluated) == len(data.validation[0]) == 2 and len(chosen.training) == 6
    held_out = [content_of(data.stores[0], data.stores[0].index(i)) for i in data.validation[0]]
    for identity in chosen.evaluated:
        assert any(set(content_of(store, store.index(identity))) & set(one) for one in held_out)
    assert chosen.why.startswith("2 of the dataset's 8 episodes") and "not known" not in chosen.why
    named = choose_episodes(store, checkpoint, [chosen.training[0], chosen.evaluated[0]])
    assert named.learned and "learned from 1 of them" in named.why and "not known" not in named.why


def test_training_episodes_are_recognised_after_a_conversion(
    card: Path, checkpoint: Path, tmp_path: Path
) -> None:
    store = open_dataset(card)
    convert(store, tmp_path / "lerobot", "lerobot")
    chosen = choose_episodes(open_dataset(tmp_path / "lerobot" / "card.toml"), checkpoint)
    assert (len(chosen.evaluated), len(chosen.training)) == (2, 6)


def test_what_the_base_learned_from_is_not_evaluated_on(card: Path, data: Data, tmp_path: Path) -> None:
    other = write_dots(tmp_path / "other", seed=5)
    recipe = tiny(other)
    later = open_data(recipe.data, recipe.train.seed)
    (tmp_path / "recipe.toml").write_text(config.dump(recipe))
    past = history(data)
    past.followed_by("base", later.learned, {}, later.contents).write(tmp_path)
    chosen = choose_episodes(open_dataset(card), tmp_path)
    assert chosen.training == data.training[0] and chosen.evaluated == data.validation[0]
    assert choose_episodes(later.stores[0], tmp_path).evaluated == later.validation[0]
    # A run on the same data that holds out others than the run before it.
    again = tiny(card, train={"seed": 4})
    second = open_data(again.data, 4)
    assert second.validation != data.validation
    (tmp_path / "recipe.toml").write_text(config.dump(again))
    past.followed_by("base", second.learned, {}, second.contents).write(tmp_path)
    left = set(second.validation[0]) & set(data.validation[0])
    if left:
        assert set(choose_episodes(open_dataset(card), tmp_path).evaluated) == left
    else:
        with pytest.raises(ConfigError, match="learned from all its episodes"):
            choose_episodes(open_dataset(card), tmp_path)


def test_an_evaluation_never_claims_what_is_not_known(card: Path, data: Data, tmp_path: Path) -> None:
    store = open_dataset(card)
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.toml").write_text(config.dump(tiny(card, train={"seed": 4})))
    for lineage in (
        None,  # another program's checkpoint
        Lineage(datasets=(Learned("elsewhere", "00", 1, 1),)),  # a run before episodes were recorded
        replace(history(data), complete=False, episodes=("0" * 16,), datasets=(Learned("x", "00", 1, 1),)),
    ):
        if lineage is not None:
            lineage.write(other)
        chosen = choose_episodes(store, other)
        assert len(chosen.evaluated) == 8 and chosen.training == ()
        assert "not known" in chosen.why and "learned from others" not in chosen.why
        assert "not known" in choose_episodes(store, other, [store.episodes[0].id]).why
    replace(history(data), episodes=("0" * 16,), datasets=(Learned("x", "00", 1, 1),)).write(other)
    assert choose_episodes(store, other).why == (
        "All of the dataset: the policy learned from no episode with these states or actions."
    )
    Lineage(datasets=(Learned("dots", "00", 1, 1),)).write(other)
    with pytest.raises(ConfigError, match="'dots'.*other rows or episodes"):
        choose_episodes(store, other)


def test_a_column_that_many_episodes_share_recognises_none_of_them(tmp_path: Path) -> None:
    card = write_dots(tmp_path, episodes=2, tasks=("left",))
    with h5py.File(tmp_path / "dots" / "left_demo.hdf5", "r+") as file:
        for number in range(2):  # a clock as the state, as long in every episode
            group = file[f"data/demo_{number}"]
            for name in ("actions", "obs/front"):
                rows = group[name][:6]  # type: ignore[index]
                del group[name]  # type: ignore[attr-defined]
                group[name] = rows  # type: ignore[index]
            del group["obs/at"]  # type: ignore[attr-defined]
            group["obs/at"] = np.repeat(np.arange(6, dtype=np.float32)[:, None], 2, axis=1)  # type: ignore[index]
    store = open_dataset(card)
    first, second = content_of(store, 0), content_of(store, 1)
    assert first[0] == second[0] and first[1] != second[1]
    assert recognise(store, {first[0]}) == ()
    assert recognise(store, set(first)) == (store.episodes[0].id,)
