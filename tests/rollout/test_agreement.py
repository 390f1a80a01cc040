"""An evaluation keeps what policy and protocol say of the robot, and what was chosen."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rollout.actors import Obedient, Trained
from tests.rollout.toy_env import robot
from vlafit.cli.verbs.eval import show
from vlafit.errors import ConfigError
from vlafit.execution import Execution
from vlafit.rollout import Protocol, evaluate
from vlafit.rollout.evaluation_folder import EvaluationFolder

Make = Callable[..., Protocol]


def kept(folder: Path) -> dict[str, dict]:
    return {item["name"]: item for item in json.loads((folder / "result.json").read_text())["agreement"]}


def test_what_differs_and_what_was_chosen_is_kept_and_shown(
    protocol: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actor = Trained(replace(robot(renderer="camera"), control=""))
    result = evaluate(actor, protocol("left"), tmp_path, trials=2, workers=1, execution=Execution(replan=2))
    items = kept(tmp_path)
    assert items["renderer"]["status"] == "differs"
    assert items["renderer"]["sides"] == {"checkpoint": "camera", "protocol": "ray"}
    assert items["control mode"]["status"] == "assumed"
    assert (items["execution: replan"]["sides"], items["execution: replan"]["value"]) == (
        {"protocol": "4"},
        "2",
    )
    assert items["episodes of each task"]["value"] == "2"
    assert items.pop("state names")["reason"] == "neither side names them: same order"
    assert {item["status"] for item in items.values() if item["name"].startswith("state")} == {"same"}
    assert show(result) == 0
    shown = capsys.readouterr().out
    assert "execution: replan" in shown and "state dimensions" not in shown
    assert "agree on the other" in shown


def test_a_finished_evaluation_says_it_again_and_an_older_one_nothing(protocol: Make, tmp_path: Path) -> None:
    play = lambda: evaluate(Trained(), protocol("left"), tmp_path, workers=1)  # noqa: E731
    first = play()
    assert first.agreement and play().agreement == first.agreement
    header = tmp_path / "evaluation.json"
    content = json.loads(header.read_text())
    del content["environment"]["agreement"]
    header.write_text(json.dumps(content))
    assert play().agreement == ()
    content["environment"]["agreement"] = [{"name": "renderer", "status": "maybe"}]
    header.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="damaged"):
        EvaluationFolder(tmp_path, {}).read()


def test_nothing_is_said_of_an_actor_without_a_robot(protocol: Make, tmp_path: Path) -> None:
    evaluate(Obedient(), protocol("left"), tmp_path, workers=1)
    assert kept(tmp_path) == {}


def test_a_replan_interval_above_the_chunk_is_kept_and_said(
    protocol: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate(Trained(), protocol("left", replan=12), tmp_path / "protocol", trials=1, workers=1)
    evaluate(
        Trained(), protocol("left"), tmp_path / "option", trials=1, workers=1, execution=Execution(replan=12)
    )
    for name in ("protocol", "option"):
        item = kept(tmp_path / name)["replan"]
        assert item["sides"] == {"protocol": "12", "checkpoint": "a chunk of 8"} and item["value"] == "8"
        assert item["status"] == "differs" and "asked again after 8, not after replan = 12" in item["reason"]
    assert caplog.text.count("asked again after 8, not after replan = 12") == 2
