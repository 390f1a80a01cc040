"""Every verb for real, on a toy robot: train, inspect, eval, report; what each prints and writes."""

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests.train.world import assert_same, learned, tiny, write_dots
from vlafit import cli, config
from vlafit.cli.verbs.eval import default_out
from vlafit.pointers import in_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run made by `vlafit train`, evaluated before and after; what it printed is in printed.txt."""
    home = tmp_path_factory.mktemp("home")
    card = write_dots(home)
    evaluations = {
        "protocol": str(home / "toy.toml"),
        "before": True,
        "after": True,
        "wrong_instruction": True,
    }
    recipe = tiny(card, eval=evaluations, train={"report": True})
    (home / "tiny.toml").write_text(config.dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        with redirect_stdout(StringIO()) as printed:
            assert cli.main(["train", "tiny.toml", "--train.steps", "6"]) == 0
        (home / "printed.txt").write_text(printed.getvalue())
        yield home / "runs" / "tiny"


def test_train_writes_the_run_and_says_what_it_does(run):
    shown = Path("printed.txt").read_text()
    assert "6 training episodes, 2 held out, from dots" in shown
    assert "everything else  full" in shown
    assert (
        "training 6/6" in shown
        and "evaluation before 4/4" in shown
        and "evaluation wrong instruction" in shown
    )
    assert "success after: " in shown
    assert f"report: {Path('runs/tiny/report.html')}" in shown
    facts = json.loads((run / "run.json").read_text())
    assert facts["command"] == "vlafit train tiny.toml --train.steps 6"
    saved = (run / "recipe.toml").read_text()
    assert "steps = 6" in saved


def test_the_saved_recipe_can_be_run_again(run, capsys):
    words = ["--out", "runs/again", "--eval.protocol", "", "--eval.before", "false"]
    assert cli.main(["train", "runs/tiny/recipe.toml", *words, "--eval.wrong_instruction", "false"]) == 0
    assert "training 6/6" in capsys.readouterr().out
    assert_same(learned(Path("runs/again"), 6), learned(run, 6))


def test_a_second_run_in_the_same_folder_is_refused(run, capsys):
    assert cli.main(["train", "tiny.toml", "--train.steps", "6"]) == 2
    said = capsys.readouterr().err
    assert "runs/tiny already holds a run" in said and "--resume" in said


def test_inspect_shows_a_run_by_its_folder_or_its_pointers(run, capsys):
    for name in ("runs/tiny", "runs/tiny/checkpoints/last", "runs/tiny/checkpoints/step_000006"):
        assert cli.main(["inspect", name, "--strategy", "expert"]) == 0
        shown = capsys.readouterr().out
        assert "step_000006" in shown and "robot    dot, 10 Hz, delta_position" in shown
        assert "strategy expert" in shown and "frozen" in shown


def test_inspect_gives_json(run, capsys):
    assert cli.main(["inspect", "runs/tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == sum(part["parameters"] for part in facts["parts"].values())
    assert facts["embodiment"]["name"] == "dot"


def test_a_folder_that_is_no_checkpoint_says_so(run, capsys):
    Path("empty").mkdir()
    assert cli.main(["inspect", "empty"]) == 2
    assert "empty: no checkpoint: none of model.safetensors" in capsys.readouterr().err
    assert cli.main(["eval", "empty", "--protocol", "pusht", "--out", "out"]) == 2
    assert "empty: no checkpoint: none of model.safetensors" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_pointer_to_nowhere_says_so(run, capsys):
    folder = Path("broken/checkpoints")
    folder.mkdir(parents=True)
    (folder / "last.json").write_text('{"step": 1, "path": "step_000001"}')
    assert cli.main(["inspect", "broken"]) == 2
    assert "broken/checkpoints/step_000001" in capsys.readouterr().err
    away = str(Path(run).resolve() / "checkpoints" / "step_000002")
    for content in ("{", '{"path": 3}', json.dumps({"path": away}), '{"path": "../../run"}'):
        (folder / "last.json").write_text(content)
        assert cli.main(["inspect", "broken"]) == 2
        assert "last.json: damaged" in capsys.readouterr().err


def test_a_run_that_was_killed_before_it_pointed_to_its_checkpoint_is_known_by_the_newest(tmp_path):
    for step in (2, 10):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step:06d}" / "policy.json").write_text("{}")
    assert in_run(tmp_path) == tmp_path / "checkpoints" / "step_000010"
    (tmp_path / "lerobot" / "²").mkdir(parents=True)
    assert in_run(tmp_path / "lerobot") is None


def test_eval_prints_the_table_and_goes_on_where_it_stopped(run, capsys):
    words = ["eval", "runs/tiny", "--protocol", "toy.toml", "--workers", "1", "--videos", "0"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert "all tasks" in first and "runs/eval/tiny_step_000006/toy" in first
    assert cli.main(words) == 2
    assert "already holds an evaluation" in capsys.readouterr().err
    assert cli.main([*words, "--resume"]) == 0
    assert first.splitlines()[-4:] == capsys.readouterr().out.splitlines()[-4:]


def test_eval_names_its_folder_after_run_checkpoint_and_protocol():
    step = Path("/a/runs/quick/checkpoints/step_000100")
    assert default_out(step, Path("x/faucet.toml"), False) == Path("runs/eval/quick_step_000100/faucet")
    assert default_out(Path("base"), Path("data-faucet"), False) == Path("runs/eval/base/data-faucet")
    assert default_out(Path("base"), Path("p.toml"), True) == Path("runs/eval/base/p_wrong_instruction")


def test_report_is_written_again(run, capsys):
    (run / "report.html").unlink()
    assert cli.main(["report", "runs/tiny"]) == 0
    assert capsys.readouterr().out.strip() == "runs/tiny/report.html"
    assert (run / "report.html").is_file()


def test_a_card_without_a_record_section_cannot_be_recorded(run, capsys):
    assert cli.main(["record", "dots.toml"]) == 2
    assert "has no [record] section" in capsys.readouterr().err


def test_eval_splits_an_evaluation_merges_it_and_compares_it_with_a_run(run, capsys):
    words = ["eval", "runs/tiny", "--protocol", "toy.toml", "--workers", "1", "--videos", "0"]
    for share in ("1/2", "2/2"):
        assert cli.main([*words, "--out", "runs/split", "--shard", share]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "--merge", "runs/split"]) == 0
    merged = capsys.readouterr().out
    assert cli.main([*words, "--out", "runs/split", "--resume", "--against", "runs/tiny"]) == 0
    compared = capsys.readouterr().out
    assert merged.splitlines()[:4] == compared.splitlines()[:4]  # the table: nothing is played again
    assert "against runs/tiny/eval/after, at 4 shared starts" in compared
    assert "here only 0, there only 0" in compared  # it is the same policy from the same starts
    for wrong, fact in ((["--merge", "a", "--out", "b"], "takes no other option"), (["--shard", "3"], "1/4")):
        assert cli.main(["eval", *wrong] if "--merge" in wrong else [*words, *wrong]) == 2
        assert fact in capsys.readouterr().err


def test_an_incomplete_evaluation_has_an_exit_status_of_its_own(capsys):
    from vlafit.cli.verbs.eval import show
    from vlafit.rollout import Result
    from vlafit.score import Score

    for errors, status in ((0, 0), (1, 3)):
        score = Score(1, 2, errors)
        assert show(Result(Path("runs/a"), "toy", {"left": score}, score, (), (), 1.0)) == status
        assert ("--retry-errors" in capsys.readouterr().out) == bool(errors)
