"""data.statistics = "file": what a LeRobot dataset states of its rows, once that is true."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.datasets import lerobot_files
from tests.datasets.layouts import demos, in_file_order
from tests.train.agreement_world import start
from tests.train.world import tiny
from vlafit.datasets import EpisodeStore, load_card, open_dataset
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.recorded import check_recorded
from vlafit.datasets.write import card_text
from vlafit.errors import ConfigError, DataError, VlafitError

WRITTEN = Path("tests/fixtures/lerobot_datasets/image")  # by LeRobot, with quantiles


def started(data: Path, **choices: Any):
    shallow = {"max_tokens": 16, "vision": {"depth": 1}, "language": {"depth": 2}}
    policy = {"config": {**shallow, "state_dim": 8, "action_dim": 8}}
    return start(tiny(data, policy=policy, data={"statistics": "file", **choices}))


def rows(store: EpisodeStore) -> tuple[np.ndarray, np.ndarray]:
    numbers = range(len(store.episodes))
    return np.concatenate([store.state(n) for n in numbers]), np.concatenate(
        [store.actions(n) for n in numbers]
    )


def v21(folder: Path, **wrong: Any) -> Path:
    """A dataset of v2.1 with statistics by episode, as LeRobot 0.3 wrote them: without quantiles."""
    lerobot_files.write(folder, in_file_order(demos(3)), "v2.1")
    store = open_dataset(folder)
    lines = []
    for number in range(len(store.episodes)):
        stats = {}
        for key, values in (("observation.state", store.state(number)), ("action", store.actions(number))):
            table = {m: getattr(values, m)(axis=0).tolist() for m in ("min", "max", "mean", "std")}
            stats[key] = table | {"count": [len(values)]}
        lines.append({"episode_index": number, "stats": stats})
    for number, change in wrong.pop("changed", {}).items():
        lines[number]["stats"]["action"] |= change
    kept = [line for line in lines if line["episode_index"] not in wrong.get("without", ())]
    (folder / "meta" / "episodes_stats.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    return folder


def test_the_codec_normalises_by_the_numbers_of_the_file_and_the_agreement_says_so():
    begun = started(WRITTEN)
    stated = json.loads((WRITTEN / "meta" / "stats.json").read_text())
    (codec,) = begun.codecs
    for name, key in (("state", "observation.state"), ("action", "action")):
        for measure in ("mean", "std", "q01", "q99", "min", "max"):
            assert codec.statistics[name].array(measure).tolist() == stated[key][measure]
    assert codec.statistics["action"].count == 53
    (item,) = [item for item in begun.agreement.items if item.name == "statistics"]
    assert item.value == "of the dataset's file" and item.status == "chosen"
    assert "meta/stats.json, 53 rows, compared with the rows" in item.sides["dataset"]
    assert "q01" not in item.sides["dataset"]  # mean_std reads none


def test_quantiles_of_a_file_are_used_as_stated_and_said_to_be_no_quantiles_of_all_rows():
    (codec,) = (begun := started(WRITTEN, normalisation="quantile")).codecs
    stated = json.loads((WRITTEN / "meta" / "stats.json").read_text())
    assert codec.statistics["state"].array("q01").tolist() == stated["observation.state"]["q01"]
    (item,) = [item for item in begun.agreement.items if item.name == "statistics"]
    assert "q01 to q99 of action are not those of all rows" in item.sides["dataset"]


def test_statistics_by_episode_are_joined_by_their_rows(tmp_path: Path):
    folder = v21(tmp_path / "set")
    assert check_recorded(open_dataset(folder), Untested()) == []
    (codec,) = started(folder).codecs
    for name, values in zip(("state", "action"), rows(open_dataset(folder)), strict=True):
        statistics = codec.statistics[name]
        assert statistics.count == len(values) and statistics.q01 is None
        for measure in ("mean", "std", "min", "max"):
            room = 8 * np.finfo(np.float32).eps * np.abs(values).max()
            assert np.allclose(statistics.array(measure), getattr(values, measure)(axis=0), rtol=0, atol=room)


def test_columns_that_a_card_cuts_turns_and_scales_have_their_own_part(tmp_path: Path):
    card = load_card(str(v21(tmp_path / "set")))
    text = card_text(card).replace('keys = ["action"]', 'keys = ["action[:, 3]", "action[:, :2]"]')
    text = text.replace("dimensions = 4", "dimensions = 3\nscale = [-2, 1, 1]\noffset = [1, 0, 0]")
    (tmp_path / "my.toml").write_text(text)
    store = open_dataset(tmp_path / "my.toml")
    values = rows(store)[1]
    stated = store.recorded_statistics().columns["action"]
    room = 8 * np.finfo(np.float32).eps * np.abs(values).max()
    for measure in ("mean", "std", "min", "max"):
        assert np.allclose(stated[measure], getattr(values, measure)(axis=0), rtol=0, atol=room)
    assert check_recorded(store, Untested()) == []


def test_statistics_that_are_stale_are_an_error_that_names_file_columns_and_numbers(tmp_path: Path):
    folder = shutil.copytree(WRITTEN, tmp_path / "arm")
    path = folder / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    stats["action"]["mean"][2] += 0.5
    stats["observation.state"]["std"][0] *= 3
    path.write_text(json.dumps(stats))
    with pytest.raises(DataError) as caught:
        started(folder)
    stale = ("meta/stats.json is stale", "mean 0.4137 of action dimension 2", "std", "of state dimension 0")
    for fact in (*stale, 'data.statistics = "data"'):
        assert fact in str(caught.value)


def test_a_quantile_outside_of_every_episodes_is_stale(tmp_path: Path):
    folder = shutil.copytree(WRITTEN, tmp_path / "arm")
    path = folder / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    stats["action"]["q99"][1] = stats["action"]["min"][1] - 0.1
    path.write_text(json.dumps(stats))
    (finding,) = check_recorded(open_dataset(folder), Untested())
    assert "q99 -0.6138 of action dimension 1" in finding.message
    with pytest.raises(DataError, match="q99 -0.6138 of action dimension 1"):
        started(folder)


def _lost(folder: Path) -> Path:
    (folder / "meta" / "episodes_stats.jsonl").unlink()
    return folder


def _broken(folder: Path) -> Path:
    (folder / "meta" / "episodes_stats.jsonl").write_text('{"episode_index": 0, "stats"')
    return folder


def _skipping(folder: Path) -> Path:
    text = card_text(load_card(str(folder)))
    (folder / "my.toml").write_text(f'{text}\n[episodes]\nskip = ["episode_000001"]\n')
    return folder / "my.toml"


@pytest.mark.parametrize(
    ("make", "choices", "facts"),
    [
        (_lost, {}, ("neither meta/stats.json nor meta/episodes_stats.jsonl",)),
        (_broken, {}, ("episodes_stats.jsonl: cannot be read",)),
        (_skipping, {}, ("5 of its 6 episodes are used",)),
        (lambda f: f, {"normalisation": "quantile"}, ("no q01, q99 of all rows of state", '= "mean_std"')),
        (lambda f: v21(f.parent / "w", without=(2,)), {}, ("states nothing of episode 2",)),
        (lambda f: v21(f.parent / "w", changed={1: {"mean": ["a"]}}), {}, ("mean of action are no numbers",)),
        (lambda f: v21(f.parent / "w", changed={1: {"mean": [1.0]}}), {}, ("states no mean", "of action")),
        (lambda f: f, {"cards": ("set", "other")}, ("takes those of one dataset", "'set', 'other'")),
    ],
)  # fmt: skip
def test_what_a_file_cannot_give_is_an_error_that_says_what_to_do(
    make: Any, choices: dict[str, Any], facts: tuple[str, ...], tmp_path: Path
):
    folder = make(v21(tmp_path / "set"))
    if "cards" in choices:
        others = [replace(demo, actions=demo.actions[::-1].copy()) for demo in in_file_order(demos(3))]
        lerobot_files.write(tmp_path / "other", others, "v2.1")
        choices = {"cards": (str(tmp_path / "set"), str(tmp_path / "other"))}
    with pytest.raises(VlafitError) as caught:
        started(folder, **choices)
    for fact in (
        *facts,
        "data.statistics" if "cannot be read" not in facts[0] and "no numbers" not in facts[0] else "",
    ):
        assert fact in str(caught.value)


def test_relative_actions_and_layouts_without_statistics_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="relative to the state"):
        started(WRITTEN, relative="matching")
    with pytest.raises(DataError, match="layout 'libero' keeps no statistics"):
        started(Path("metaworld-faucet"))
