"""A damaged evaluation or checkpoint is one message that names the file, and nothing is written."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rollout.actors import Obedient
from tests.rollout.test_checkpoint import save_checkpoint
from tests.rollout.toy_env import robot
from vlafit import cli
from vlafit.errors import VlafitError
from vlafit.rollout import Protocol, Shard, evaluate, merge
from vlafit.rollout.earlier import read_earlier

Make = Callable[..., Protocol]
HEADER, EPISODES, RESULT = "evaluation.json", "episodes.jsonl", "result.json"
HEADERS = [
    (HEADER, lambda text: text[: len(text) // 2]),
    (HEADER, lambda text: ""),
    (HEADER, lambda text: "[]"),
    (HEADER, lambda text: '{"identity": {}, "environment": {}}'),
    (HEADER, lambda text: text.replace('"protocol": {', '"protokol": {', 1)),
    (HEADER, lambda text: "\udcff" + text),
]
RECORDS = [
    (EPISODES, lambda text: text.replace("{", "[", 1)),
    (EPISODES, lambda text: text.replace('"seed": ', '"seed": "x', 1)),
    (EPISODES, lambda text: text.replace('"task"', '"tusk"', 1)),
    (EPISODES, lambda text: "3\n" + text),
    (EPISODES, lambda text: "\udcff" + text),
    (EPISODES, lambda text: re.sub(r'"steps": \d+', '"steps": 9999', text, count=1)),
    (EPISODES, lambda text: text + re.sub(r'"steps": (\d+)', r'"steps": 1', text.splitlines(True)[0])),
]
OF_SHARDS = [
    (HEADER, lambda text: text.replace('"first_seed"', '"first_sed"')),
    (HEADER, lambda text: text.replace('"versions": {', '"version": {')),
    (RESULT, lambda text: text[:40]),
    (RESULT, lambda text: text.replace('"seconds"', '"second"')),
]
CHECKPOINT = [
    ("policy.json", 0.5),
    ("policy.json", 0.0),
    ("codec.json", 0.5),
    ("model.safetensors", 0.5),
    ("model.safetensors", 0.0),
    ("manifest.json", 0.5),
    ("tokenizer/tokenizer.json", 0.5),
]


@pytest.fixture(scope="module")
def shards(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of one episode each."""
    out = tmp_path_factory.mktemp("shards")
    for number in (1, 2):
        evaluate(Obedient(), make("left", trials=2), out, workers=1, videos=0, shard=Shard(number, 2))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_bytes()
    after = change(before.decode()).encode(errors="surrogateescape")
    assert after != before
    path.write_bytes(after)


@pytest.mark.parametrize(("name", "change"), [*HEADERS, *RECORDS, *OF_SHARDS])
def test_a_damaged_shard_is_named_and_nothing_is_merged(
    shards: Path, tmp_path: Path, name: str, change: Callable[[str], str]
) -> None:
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    file = out / "shard-2-of-2" / name
    damage(file, change)
    before = contents(out)
    with pytest.raises(VlafitError) as raised:
        merge(out)
    assert str(file) in str(raised.value) or (name == HEADER and str(file.parent) in str(raised.value))
    assert contents(out) == before


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize(("name", "change"), [*HEADERS, *RECORDS])
def test_a_damaged_evaluation_is_not_resumed(
    shards: Path, make: Make, tmp_path: Path, name: str, change: Callable[[str], str], retry: bool
) -> None:
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    file = out / "shard-1-of-2" / name
    damage(file, change)
    before = contents(out)
    with pytest.raises(VlafitError) as raised:
        evaluate(
            Obedient(), make("left", trials=2), out, workers=1, videos=0, shard=Shard(1, 2), resume=True,
            retry_errors=retry,
        )  # fmt: skip
    assert str(file) in str(raised.value)
    assert contents(out) == before


@pytest.mark.parametrize(("name", "change"), [*HEADERS, *RECORDS])
def test_nothing_is_compared_with_a_damaged_evaluation(
    shards: Path, make: Make, tmp_path: Path, name: str, change: Callable[[str], str]
) -> None:
    earlier = Path(shutil.copytree(shards / "shard-1-of-2", tmp_path / "earlier"))
    damage(earlier / name, change)
    with pytest.raises(VlafitError) as raised:
        read_earlier(earlier)
    assert str(earlier / name) in str(raised.value)


@pytest.mark.parametrize("verb", ["eval", "serve"])
@pytest.mark.parametrize(("name", "share"), CHECKPOINT)
def test_a_damaged_checkpoint_is_one_message_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    share: float,
    verb: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = save_checkpoint(tmp_path / "checkpoint", robot()) / name
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    more = ["--protocol", "pusht"] if verb == "eval" else ["--port", "0"]
    assert cli.main([verb, "checkpoint", *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vlafit: ") and "Traceback" not in said
    assert "checkpoint" in said and name in said
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
