"""Rollouts that belong to a run: before, between, after, with the wrong instruction."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.world import assert_same, learned, metrics, tiny
from vlafit.cli.train_view import TrainView
from vlafit.errors import VlafitError
from vlafit.recipe import Recipe
from vlafit.report.facts import read_facts
from vlafit.train import run
from vlafit.train.callbacks import Callbacks

EVERYTHING = {"before": True, "after": True, "wrong_instruction": True, "every": 3, "every_trials": 1}
NAMES = ["after", "before", "step_000003", "step_000006", "wrong_instruction"]


@pytest.fixture(scope="module")
def judged(card: Path) -> Recipe:
    protocol = str(card.parent / "toy.toml")
    return tiny(
        card,
        eval={"protocol": protocol, **EVERYTHING},
        train={"save_every": 0, "validate_every": 0, "report": True},
    )


@pytest.fixture(scope="module")
def finished(judged: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "run"
    summary = run(judged, out)
    assert sorted(summary.success) == NAMES
    return out


class Episodes(Callbacks):
    """Counts episodes, and breaks off the run after `limit` of them."""

    def __init__(self, limit: int | None = None) -> None:
        self.count, self.limit, self.phases = 0, limit, []

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def episode(self, done: int, total: int, record: object) -> None:
        self.count += 1
        if self.count == self.limit:
            raise InterruptedError


def test_the_control_is_left_out_with_the_evaluation_that_it_belongs_to(
    judged: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = replace(judged.eval, before=False, after=False, every=0)
    quiet = replace(judged, eval=without, train=replace(judged.train, steps=1, report=False))
    summary = run(quiet, tmp_path / "run")
    assert summary.finished and not summary.success
    assert "eval.wrong_instruction is left out" in caplog.text
    assert not any("wrong_instruction" in line for line in read_facts(tmp_path / "run").missing)


def test_the_console_says_how_many_answers_of_a_token_policy_were_no_chunk(
    judged: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = {"family": "openvla", "size": "openvla-tiny", "config": {}}
    recipe = replace(
        judged,
        policy=replace(judged.policy, **policy),
        eval=replace(judged.eval, before=False, every=0, wrong_instruction=False),
        train=replace(judged.train, steps=1, report=False),
    )
    summary = run(recipe, tmp_path / "run")
    counted = json.loads((tmp_path / "run" / "eval" / "after" / "result.json").read_text())["invalid_answers"]
    assert counted["answers"] > 0 and summary.invalid["after"].to_json() == counted
    TrainView(tmp_path / "run").end(summary)
    said = capsys.readouterr().out
    assert f"success after: 0%; {counted['invalid']} of {counted['answers']} answers were no chunk" in said


def evaluations(out: Path) -> list[str]:
    return [key for event in metrics(out) for key in event if key.startswith("eval/")]


def test_every_evaluation_has_its_folder_and_its_metric(finished: Path) -> None:
    assert sorted(p.name for p in (finished / "eval").iterdir()) == NAMES
    for name in NAMES:
        result = json.loads((finished / "eval" / name / "result.json").read_text())
        assert result["overall"]["episodes"] == (2 if name.startswith("step") else 4)
        assert result["wrong_instruction"] == (name == "wrong_instruction")
    assert sorted(evaluations(finished)) == [f"eval/{name}/success" for name in NAMES]


def test_the_report_has_the_success_before_after_and_with_the_wrong_instruction(finished: Path) -> None:
    success = json.loads((finished / "report.json").read_text())["success"]
    assert {"before", "after", "wrong_instruction"} <= set(success)


def test_training_is_the_same_with_rollouts_and_without(
    finished: Path, judged: Recipe, tmp_path: Path
) -> None:
    run(
        replace(
            judged, eval=replace(judged.eval, protocol="", before=False, wrong_instruction=False, every=0)
        ),
        tmp_path / "run",
    )
    assert_same(learned(tmp_path / "run", 8), learned(finished, 8))


def test_a_resumed_run_repeats_no_episode(judged: Recipe, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InterruptedError):
        run(judged, out, callbacks=Episodes(5))  # 4 before training, 1 of the 2 at step 3
    again = Episodes()
    assert run(judged, out, resume=True, callbacks=again).finished
    assert again.count == 1 + 2 + 4 + 4
    with pytest.raises(InterruptedError):
        shutil.rmtree(out / "eval" / "wrong_instruction")
        run(judged, out, resume=True, callbacks=Episodes(2))
    last = Episodes()
    run(judged, out, resume=True, callbacks=last)
    assert last.count == 2
    assert sorted(evaluations(out)) == sorted(evaluations(finished))
    assert_same(learned(out, 8), learned(finished, 8))
    for name in NAMES:
        results = [json.loads((o / "eval" / name / "result.json").read_text()) for o in (out, finished)]
        assert results[0]["overall"] == results[1]["overall"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('tasks = ["left", "right"]', 'tasks = ["left", "rigth"]', "did you mean 'right'"),
        ("size = 16", "size = 32", "size of camera 'front'"),
        ("[swapped]\nleft", "[references]\nleft", "references"),
        ('[swapped]\nleft = "right"\nright = "left"\n', "", "no swapped instructions"),
    ],
)
def test_a_protocol_that_cannot_judge_the_policy_is_refused_before_training(
    card: Path, judged: Recipe, tmp_path: Path, old: str, new: str, says: str
) -> None:
    text = (card.parent / "toy.toml").read_text()
    assert old in text
    (tmp_path / "toy.toml").write_text(
        text.replace(old, new).replace(
            'left = "right"\nright = "left"' if "rigth" in new else "\0", 'left = "rigth"'
        )
    )
    recipe = replace(judged, eval=replace(judged.eval, protocol=str(tmp_path / "toy.toml"), before=False))
    with pytest.raises(VlafitError, match=says):
        run(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*")), "nothing is written, so the same command works once mended"


def test_rollouts_before_training_cannot_be_asked_for_afterwards(
    recipe: Recipe, whole: Path, judged: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    late = replace(recipe, eval=judged.eval)
    with pytest.raises(VlafitError, match=r"eval\.before = false.*step 0"):
        run(late, tmp_path / "run", resume=True)
