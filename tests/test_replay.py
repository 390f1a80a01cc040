"""Replaying recorded actions: what is reproduced, what is noticed, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("metaworld")

from vlafit import envs
from vlafit.cli import main
from vlafit.datasets import EpisodeStore, load_card, open_dataset
from vlafit.datasets.card import RowsCard
from vlafit.datasets.convert import CARD, convert
from vlafit.errors import DataError, EmbodimentError
from vlafit.record.replay import replay, spec_of
from vlafit.types import Env

pytestmark = pytest.mark.sim
SOME = (0, 1, 2, 60, 61)  # undisturbed and disturbed episodes of both tasks


@pytest.fixture(scope="module")
def store() -> EpisodeStore:
    return open_dataset("metaworld-faucet")


@pytest.fixture(scope="module")
def env(store: EpisodeStore):
    made = envs.make(spec_of(store.card))
    yield made
    made.close()


def test_the_recordings_that_ship_are_reproduced_bit_for_bit(store: EpisodeStore, env: Env):
    results = list(replay(store, env, SOME))
    assert [r.episode for r in results] == [store.episodes[n].id for n in SOME]
    assert all(r.success and r.reproduced and r.parted is None for r in results)
    assert all(r.furthest == 0.0 == r.final for r in results)


class _Changed(EpisodeStore):
    """The first episode with other actions."""

    def __init__(self, store: EpisodeStore, actions: np.ndarray) -> None:
        self.card, self.episodes, self._store = store.card, store.episodes, store
        self._actions = actions

    def state(self, episode: int):
        return self._store.state(episode)

    def actions(self, episode: int):
        return self._actions

    def image(self, episode: int, step: int, camera: str):
        raise AssertionError("a replay reads no frame")


def test_actions_that_lag_or_stand_still_are_noticed(store: EpisodeStore, env: Env):
    real = store.actions(0)
    lagging = _Changed(store, np.concatenate([real[:1], real[:-1]]))
    still = _Changed(store, real * 0)
    (late,), (idle,) = (list(replay(changed, env, [0])) for changed in (lagging, still))
    assert not late.reproduced and late.parted is not None and late.parted <= 12
    assert not idle.reproduced and not idle.success and idle.final > 0.05


def test_a_dataset_whose_start_cannot_be_restored_is_refused_saying_why(store: EpisodeStore, env: Env):
    without = _Changed(store, store.actions(0))
    without.episodes = tuple(replace(info, seed=None) for info in store.episodes)
    with pytest.raises(DataError, match="demo_0' records no seed.*cannot be restored"):
        replay(without, env, [0])
    other = _Changed(store, store.actions(0))
    other.episodes = tuple(replace(info, task="faucet-opn-v3") for info in store.episodes)
    with pytest.raises(DataError, match="'faucet-opn-v3'.*simulation"):
        replay(other, env, [0])
    shifted = _Changed(store, store.actions(0))
    shifted.card = replace(store.card, rows=RowsCard(action_shift=1))
    with pytest.raises(DataError, match="action_shift = 1"):
        replay(shifted, env, [0])
    slow = _Changed(store, store.actions(0))
    slow.card = replace(store.card, robot=replace(store.card.robot, hz=20.0))
    with pytest.raises(EmbodimentError, match=r"Hz: 20\.0 .*80\.0"):
        replay(slow, env, [0])
    with pytest.raises(DataError, match="no \\[record\\].*--env"):
        spec_of(replace(store.card, record=None))


def test_a_conversion_to_hdf5_is_replayed_as_its_source_and_one_to_lerobot_is_refused(
    env: Env, tmp_path: Path
):
    card = load_card("metaworld-faucet-open")
    skipped = tuple(f"*/demo_{n}" for n in range(2, 60))
    few = open_dataset(
        replace(card, episodes=replace(card.episodes, skip=skipped), expect=replace(card.expect, episodes=60))
    )
    convert(few, tmp_path / "files", "libero")
    results = list(replay(open_dataset(tmp_path / "files" / CARD), env, [0, 1]))
    assert all(r.reproduced and r.furthest == 0.0 for r in results)
    assert any("seeds" in sentence for sentence in convert(few, tmp_path / "rows", "lerobot"))
    with pytest.raises(DataError, match="records no seed"):
        replay(open_dataset(tmp_path / "rows" / CARD), env, [0])


def test_the_verb_counts_what_is_reproduced(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "replay", "metaworld-faucet", "--episodes", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["reproduced"] == 2 and facts["env"] == "metaworld"
    assert facts["versions"]["metaworld"] == "3.1.1"
    lerobot = "tests/fixtures/lerobot_datasets/image"
    assert main(["data", "replay", lerobot, "--env", "metaworld"]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert main(["data", "replay", lerobot]) == 2
    assert "--env" in capsys.readouterr().err
