"""An evaluation of several machines is, once merged, that of one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rollout.actors import Obedient, Trained
from vlafit.errors import ConfigError
from vlafit.rollout import Protocol, Shard, evaluate, merge

Make = Callable[..., Protocol]
TIMES = ("wall_s", "seconds")


def contents(folder: Path) -> tuple[list[dict], dict, dict, dict[str, bytes]]:
    """Records, result, header and films of an evaluation, without the times."""
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for values in (*lines, result):
        for key in TIMES:
            values.pop(key, None)
    films = {path.name: path.read_bytes() for path in sorted((folder / "videos").glob("*"))}
    return lines, result, json.loads((folder / "evaluation.json").read_text()), films


@pytest.fixture(scope="module")
def shards(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, played with different numbers of workers."""
    out = tmp_path_factory.mktemp("shards")
    for number, workers in ((1, 1), (2, 2)):
        got = evaluate(Obedient(), make(), out, workers=workers, videos=1, shard=Shard(number, 2))
        assert got.folder.name == f"shard-{number}-of-2" and got.overall.episodes == 4
    return out


def test_two_shards_merged_are_the_evaluation_of_one_machine(
    shards: Path, make: Make, tmp_path: Path
) -> None:
    evaluate(Obedient(), make(), tmp_path / "whole", workers=1, videos=1)
    copy = tmp_path / "merged"
    shutil.copytree(shards, copy)
    got = merge(copy)
    assert contents(copy) == contents(tmp_path / "whole")
    assert len(contents(copy)[3]) == 4 and (copy / "sheet.png").exists()  # an mp4 and a strip of each task
    assert contents(merge(copy).folder) == contents(copy)  # twice does no harm
    mute = Obedient()
    again = evaluate(mute, make(), copy, workers=1, videos=1)  # it is an evaluation like any other
    assert again.records == got.records and not mute.heard


def test_what_is_missing_or_of_another_evaluation_is_not_merged(
    shards: Path, make: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no folder shard-1-of-N"):
        merge(tmp_path)
    copy = tmp_path / "one"
    shutil.copytree(shards / "shard-1-of-2", copy / "shard-1-of-2")
    with pytest.raises(ConfigError, match="shard-2-of-2 is missing"):
        merge(copy)
    shutil.copytree(shards / "shard-2-of-2", copy / "shard-2-of-2")
    records = copy / "shard-2-of-2" / "episodes.jsonl"
    kept = records.read_text()
    records.write_text("".join(kept.splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="1 of 8 .*right, seed 103"):
        merge(copy)
    records.write_text(kept)
    header = copy / "shard-2-of-2" / "evaluation.json"
    header.write_text(header.read_text().replace('"Obedient"', '"Other"'))
    with pytest.raises(ConfigError, match="actor: Obedient .*Other"):
        merge(copy)
    assert not (copy / "result.json").exists()


def test_a_policys_batches_are_as_wide_in_a_shard_as_in_the_whole(make: Make, tmp_path: Path) -> None:
    actor = Trained()  # of width 4; its shard has only two episodes
    evaluate(actor, make(), tmp_path, workers=1, videos=0, shard=Shard(1, 4))
    identity = json.loads((tmp_path / "shard-1-of-4" / "evaluation.json").read_text())["identity"]
    assert identity["protocol"]["width"] == 4 and identity["shard"] == [1, 4]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1-2", "1/0", "half"])
def test_a_shard_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="shard"):
        Shard.parse(text)


def test_a_shard_without_an_episode_is_named_as_it_was_given(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--shard 9/9: there are only 8 episodes"):
        evaluate(Obedient(), make(), tmp_path / "out", shard=Shard(9, 9))
    assert not (tmp_path / "out").exists()
