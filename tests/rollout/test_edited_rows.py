"""A row of episodes.jsonl that was edited by hand is refused wherever rows are read."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.actors import Obedient
from vlafit import score
from vlafit.errors import ConfigError, VlafitError
from vlafit.report.evaluations import read_evaluation
from vlafit.rollout import Protocol, Shard, evaluate, merge
from vlafit.rollout.earlier import read_earlier
from vlafit.rollout.records import EpisodePlan, Record

Make = Callable[..., Protocol]
EPISODES, RESULT, HEADER = "episodes.jsonl", "result.json", "evaluation.json"
ROW = 1  # of task left, seed 101, trial 1; steps and replans as the dot went
EDITS: list[tuple[dict[str, Any], str]] = [
    ({"instruction": "go to the right"}, "instruction is 'go to the right', but .* 'go to the left'"),
    ({"instruction": ""}, "instruction is '', but .* 'go to the left'"),
    ({"instruction": "go to the left "}, "instruction is 'go to the left ', but .* 'go to the left'"),
    ({"trial": 0}, "trial is 0, but this seed is of trial 1"),
    ({"trial": -1}, "trial is -1, but this seed is of trial 1"),
    ({"seed": 102}, "seed is 102, but the seeds of this task are 100 to 101"),
    ({"seed": 99}, "seed is 99, but the seeds of this task are 100 to 101"),
    ({"task": "Left"}, "task is 'Left', but the evaluation's tasks are left, right"),
    ({"task": "right"}, "instruction is 'go to the left', but .* 'go to the right'"),
    ({"steps": 0}, "steps is 0, but the protocol's horizon is 20"),
    ({"steps": 21}, "steps is 21, but the protocol's horizon is 20"),
    ({"replans": 0}, "replans is 0, but"),
    ({"replans": 1}, "replans is 1, but .* at most 4 of each chunk"),
    ({"replans": 900}, "replans is 900, but"),
    ({"video": "../../secret.mp4"}, "video is '../../secret.mp4', but this episode's film is"),
    ({"wall_s": -3.0}, "wall_s is -3.0"),
    ({"wall_s": float("nan")}, "wall_s"),
    ({"action_change": -0.5}, "action_change is -0.5"),
    ({"seed": 101.0}, "seed: expected a whole number, got 101.0"),
    ({"success": 1}, "success: expected true or false, got 1"),
]


@pytest.fixture(scope="module")
def played(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation of four episodes, two shards of it, and one with the partner's sentences."""
    out = tmp_path_factory.mktemp("played")
    evaluate(Obedient(), make(trials=2), out / "whole", workers=1, videos=0)
    for number in (1, 2):
        write_shard(out / "whole", out / "shards" / f"shard-{number}-of-2", number)
    evaluate(Obedient(), make(trials=1), out / "wrong", workers=1, videos=0, wrong_instruction=True)
    return out


def write_shard(whole: Path, shard: Path, number: int) -> None:
    """Write one of two shards as their machines do, from what one machine played."""
    shard.mkdir(parents=True)
    header, result = (json.loads((whole / name).read_text()) for name in (HEADER, RESULT))
    header["identity"]["shard"] = result["shard"] = [number, 2]
    (shard / HEADER).write_text(json.dumps(header))
    lines = (whole / EPISODES).read_text().splitlines(keepends=True)[number - 1 :: 2]
    (shard / EPISODES).write_text("".join(lines))
    rows = list(map(json.loads, lines))
    for task, values in result["tasks"].items():
        of_task = score.score(row["success"] for row in rows if row["task"] == task)
        result["tasks"][task] = {"instruction": values["instruction"], **of_task.to_json()}
    result["overall"] = score.score(row["success"] for row in rows).to_json()
    (shard / RESULT).write_text(json.dumps(result))


def edit(folder: Path, number: int, change: dict[str, Any]) -> Path:
    file = folder / EPISODES
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[number] |= change
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.case(
    section="runs",
    report="an evaluation shows a success rate that its episodes do not have",
    user_has="a row of episodes.jsonl, or result.json, that was edited by hand",
    now="an error with file, line, field and both values; `--resume` plays a removed row again",
)
@pytest.mark.parametrize(("change", "message"), EDITS)
def test_an_edited_row_is_refused_and_names_line_and_both_values(
    played: Path, make: Make, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = Path(shutil.copytree(played / "whole", tmp_path / "whole"))
    file = edit(out, ROW, change)
    before = contents(out)
    message = f"{file}, line 2: .*{message}.*put the line back as it was, or remove it"
    for read in (
        lambda: evaluate(Obedient(), make(trials=2), out, workers=1, videos=0),
        lambda: evaluate(Obedient(), make(trials=2), out, workers=1, videos=0, retry_errors=True),
        lambda: read_earlier(out),
        lambda: read_evaluation("after", out),
    ):
        with pytest.raises(VlafitError, match=message):
            read()
    assert contents(out) == before


def test_the_refused_row_is_played_again_once_it_is_removed(played: Path, make: Make, tmp_path: Path) -> None:
    out = Path(shutil.copytree(played / "whole", tmp_path / "whole"))
    file = edit(out, ROW, {"instruction": "dance"})
    with pytest.raises(ConfigError, match="or remove it, and play the episode again with --resume"):
        evaluate(Obedient(), make(trials=2), out, workers=1, videos=0)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:ROW] + lines[ROW + 1 :]))
    again = evaluate(Obedient(), make(trials=2), out, workers=1, videos=0)
    rows = [json.loads(line) for line in (played / "whole" / EPISODES).read_text().splitlines()]
    assert [(r.seed, r.instruction, r.success, r.steps) for r in again.records] == [
        (row["seed"], row["instruction"], row["success"], row["steps"]) for row in rows
    ]


def test_a_row_of_another_shard_is_not_merged(played: Path, make: Make, tmp_path: Path) -> None:
    out = Path(shutil.copytree(played / "shards", tmp_path / "shards"))
    file = edit(out / "shard-2-of-2", 0, {"seed": 100, "trial": 0})
    with pytest.raises(ConfigError, match=f"{file}, line 1: .*seed is 100, but the seeds .* are 101"):
        merge(out)
    with pytest.raises(ConfigError, match="seed is 100"):
        evaluate(Obedient(), make(trials=2), out, workers=1, videos=0, shard=Shard(2, 2))
    assert not (out / RESULT).exists()


def test_a_success_that_result_json_did_not_count_is_refused(
    played: Path, make: Make, tmp_path: Path
) -> None:
    first = json.loads((played / "shards" / "shard-1-of-2" / EPISODES).read_text().splitlines()[0])
    out = Path(shutil.copytree(played / "shards", tmp_path / "shards"))
    edit(out / "shard-1-of-2", 0, {"success": not first["success"]})
    with pytest.raises(ConfigError, match=r"result\.json: task left: (successes|failures) is 0, but .* 1"):
        merge(out)
    out = Path(shutil.copytree(played / "whole", tmp_path / "whole"))
    edit(out, 0, {"success": not first["success"]})
    for read in (
        lambda: evaluate(Obedient(), make(trials=2), out, workers=1, videos=0),
        lambda: read_earlier(out),
        lambda: read_evaluation("after", out),
    ):
        with pytest.raises(VlafitError, match=r"result\.json: task left: \w+ is \d, but .* \d"):
            read()


def test_steps_within_the_horizon_are_held_against_result_json(
    played: Path, make: Make, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(played / "whole", tmp_path / "whole"))
    rows = [json.loads(line) for line in (out / EPISODES).read_text().splitlines()]
    assert rows[ROW]["success"]
    steps = rows[ROW]["steps"]
    edit(out, ROW, {"steps": steps - 1 if steps % 4 != 1 else steps + 1})
    with pytest.raises(ConfigError, match=r"result\.json: task left: median_steps_to_success is"):
        evaluate(Obedient(), make(trials=2), out, workers=1, videos=0)


def test_the_tasks_own_sentence_is_an_edit_where_the_partners_was_given(
    played: Path, make: Make, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(played / "wrong", tmp_path / "wrong"))
    header = json.loads((out / HEADER).read_text())["environment"]
    assert header["partners"] == {"left": "go to the left", "right": "go to the right"}
    edit(out, 0, {"instruction": "go to the left"})
    with pytest.raises(ConfigError, match="'go to the left', but the protocol gives .* 'go to the right'"):
        evaluate(Obedient(), make(trials=1), out, workers=1, videos=0, wrong_instruction=True)


def test_a_controls_folder_of_an_earlier_version_is_resumed(played: Path, make: Make, tmp_path: Path) -> None:
    out = Path(shutil.copytree(played / "wrong", tmp_path / "wrong"))
    header = json.loads((out / HEADER).read_text())
    del header["environment"]["partners"]
    (out / HEADER).write_text(json.dumps(header))
    (out / EPISODES).write_text("")
    (out / RESULT).unlink()
    got = evaluate(Obedient(), make(trials=1), out, workers=1, videos=0, wrong_instruction=True)
    assert [record.instruction for record in got.records] == ["go to the right", "go to the left"]


def test_paraphrases_and_blank_sentences_are_known_without_the_environment(make: Make) -> None:
    says = {"left": ("to the left", "leftwards")}
    ways: list[tuple[dict[str, Any], list[str]]] = [
        ({"instruction": "paraphrase", "paraphrases": says}, ["to the left", "leftwards"]),
        ({"instruction": "blank"}, [".", "."]),
    ]
    for options, sentences in ways:
        protocol = make("left", trials=2, **options)
        identity = {"protocol": protocol.to_json(), "tasks": ["left"], "trials": 2}
        plan = EpisodePlan.of(identity, {})
        assert list(plan.sentences.values()) == sentences
        row = Record("left", 0, 100, "leftwards", True, 4, 1, 0.1)
        assert f"instruction is 'leftwards', but the protocol gives this episode {sentences[0]!r}" == (
            plan.fault(row)
        )
        assert not plan.fault(replace(row, instruction=sentences[0]))


@pytest.mark.parametrize("key", ["horizon", "first_seed", "replan"])
def test_a_header_whose_protocol_was_edited_is_refused(played: Path, tmp_path: Path, key: str) -> None:
    out = Path(shutil.copytree(played / "whole", tmp_path / "whole"))
    header = json.loads((out / HEADER).read_text())
    header["identity"]["protocol"][key] += 1
    (out / HEADER).write_text(json.dumps(header))
    for read in (lambda: read_earlier(out), lambda: read_evaluation("after", out)):
        with pytest.raises(VlafitError, match=r"evaluation\.json: protocol_sha256 is .*, but its"):
            read()


def test_a_header_without_instructions_gets_them_from_the_environment(
    played: Path, make: Make, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(played / "whole", tmp_path / "whole"))
    header = json.loads((out / HEADER).read_text())
    (out / HEADER).write_text(json.dumps({**header, "environment": {}}))
    edit(out, 0, {"instruction": "dance"})
    (out / RESULT).unlink()
    with pytest.raises(ConfigError, match="line 1: .*instruction is 'dance', but .* 'go to the left'"):
        evaluate(Obedient(), make(trials=2), out, workers=1, videos=0)


def test_result_and_header_of_different_evaluations_are_told(played: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(played / "whole", tmp_path / "whole"))
    result = json.loads((out / RESULT).read_text())
    (out / RESULT).write_text(json.dumps({**result, "actor": "Other"}))
    with pytest.raises(VlafitError, match=r"result\.json: actor is Other, but .* says Obedient"):
        read_evaluation("after", out)


NUMBERS: list[tuple[str, Any, str]] = [
    ("overall.successes", 3, "overall: successes is 3, but by the counts of its tasks it is"),
    ("overall.rate", 0.99, "overall: rate is 0.99, but by the counts of its tasks it is"),
    ("overall.low", 0.9, "overall: low is 0.9, but"),
    ("overall.high", "1.0", "overall: high is 1.0, but"),
    ("tasks.left.rate", 0.99, "task left: rate is 0.99, but that of its counts it is"),
    ("tasks.left.low", 0.98, "task left: low is 0.98, but"),
    ("tasks.right.high", 0.999, "task right: high is 0.999, but"),
    ("tasks.left.median_steps_to_success", 2.0, "task left: median_steps_to_success is 2.0, but"),
    ("complete", False, "complete is False, but 0 episodes ended in an environment error"),
    ("protocol.name", "other", "protocol_sha256 is .*, but that of its protocol 'other' is"),
    ("protocol.trials", 9, "protocol_sha256 is .*, but that of its protocol"),
    ("protocol.horizon", 30, "protocol_sha256 is .*, but that of its protocol"),
    ("trials", 9, "trials is 9, but evaluation.json says 2"),
    ("actor", "checkpoint sha256:of-another", "actor is checkpoint sha256:of-another, but evaluation.json"),
]


def set_value(file: Path, key: str, value: Any) -> None:
    """Write another value into a JSON file."""
    values = json.loads(file.read_text())
    *path, last = key.split(".")
    part = values
    for name in path:
        part = part[name]
    assert last in part and part[last] != value
    part[last] = value
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(("key", "value", "message"), NUMBERS)
def test_a_number_of_result_json_that_the_episodes_do_not_have_is_refused(
    played: Path, make: Make, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    out = Path(shutil.copytree(played / "whole", tmp_path / "whole"))
    set_value(out / RESULT, key, value)
    before = contents(out)
    for read in (
        lambda: evaluate(Obedient(), make(trials=2), out, workers=1, videos=0),
        lambda: read_earlier(out),
        lambda: read_evaluation("after", out),
    ):
        with pytest.raises(VlafitError, match=rf"result\.json: .*{message}"):
            read()
    assert contents(out) == before
    (out / RESULT).unlink()
    again = evaluate(Obedient(), make(trials=2), out, workers=1, videos=0)
    assert again.overall.to_json() == json.loads((played / "whole" / RESULT).read_text())["overall"]


@pytest.mark.parametrize(("key", "value", "message"), [n for n in NUMBERS if n[0] not in ("actor", "trials")])
def test_it_is_refused_without_evaluation_json_too(
    played: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    out = Path(shutil.copytree(played / "whole", tmp_path / "whole"))
    (out / HEADER).unlink()
    read_evaluation("after", out)
    set_value(out / RESULT, key, value)
    with pytest.raises(VlafitError, match=rf"result\.json: .*{message}"):
        read_evaluation("after", out)


def test_more_trials_than_episodes_are_refused(played: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(played / "whole", tmp_path / "whole"))
    (out / HEADER).unlink()
    set_value(out / RESULT, "trials", 9)
    with pytest.raises(VlafitError, match=r"result\.json: trials is 9: 18 episodes, but it counts 4"):
        read_evaluation("after", out)
