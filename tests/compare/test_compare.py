"""A comparison for real on a toy robot: what it runs, keeps, refuses and reports."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_report import Strict
from vlafit import compare, config
from vlafit.cli.verbs import compare as verb
from vlafit.cli.verbs import report as report_verb
from vlafit.cli.verbs.compare import describe, read
from vlafit.compare import arm_record, arms, stored, summary
from vlafit.compare.arm_record import HELD_OUT, ArmRecord
from vlafit.compare.arms import Options, with_budget
from vlafit.compare.page import page
from vlafit.compare.process import Processes, reason
from vlafit.errors import ConfigError, VlafitError
from vlafit.recipe import Recipe
from vlafit.shipped import find

BROKEN = '[[rule]]\nmode = "full"\nlr = 1e38\n'  # the loss is no number after a step
MISFIT = '[[rule]]\nselect = { pattern = "nothing.*" }\nmode = "full"\n\n[[rule]]\nmode = "frozen"\n'
GRID = (1e-3, 1e-2)
LOW, HIGH = "expert-lr0.001-seed3", "expert-lr0.01-seed3"


class Seen(compare.Observer):
    """Notes which arms were run, and which had ended before."""

    def __init__(self) -> None:
        self.fresh: list[str] = []
        self.kept: list[str] = []

    def arm(self, name: str, record: ArmRecord, fresh: bool) -> None:
        (self.fresh if fresh else self.kept).append(name)


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A strategy's file that works, and one under which training breaks."""
    folder = tmp_path_factory.mktemp("strategies")
    shutil.copy(find("strategy", "expert"), folder / "expert.toml")
    (folder / "broken.toml").write_text(BROKEN)
    return str(folder / "expert.toml"), str(folder / "broken.toml")


@pytest.fixture(scope="module")
def options(strategies: tuple[str, str]) -> Options:
    return Options(strategies, seeds=(3,), lr_grid=GRID, jobs=2)


@pytest.fixture(scope="module")
def done(recipe: Recipe, options: Options, tmp_path_factory: pytest.TempPathFactory) -> compare.Comparison:
    """A whole comparison, one of whose strategies breaks; tests only read it."""
    found = compare.run(
        recipe, options, tmp_path_factory.mktemp("compare") / "out", command="vlafit compare x"
    )
    compare.write(found)
    return found


@pytest.fixture
def out(done: compare.Comparison, tmp_path: Path) -> Path:
    """A copy of its folder for tests that go on with it."""
    return Path(shutil.copytree(done.folder, tmp_path / "out"))


def arm(done: compare.Comparison, name: str) -> ArmRecord:
    return next(record for record in done.records if record.name == name)


# ---------------------------------------------------------------------------------------------- what it runs


def test_an_arm_is_an_ordinary_run_whose_figures_are_kept(done: compare.Comparison) -> None:
    run = done.folder / "arms" / HIGH
    assert {"recipe.toml", "metrics.jsonl", "run.json", "arm.json"} <= {p.name for p in run.iterdir()}
    kept = arm_record.read(run / "arm.json")
    assert kept is not None and kept == arm(done, HIGH)
    figures = arm(done, LOW).figures
    assert figures is not None and figures.steps == 4 and figures.samples == 16
    assert [p.step for p in figures.validation[HELD_OUT]] == [0, 2, 4]
    assert list(figures.validation) == [HELD_OUT, "old"]
    assert 0 < figures.trainable < figures.parameters and figures.checkpoint_bytes > 4 * figures.parameters
    assert figures.memory is not None and figures.memory.parts["optimiser"] >= 2 * 4 * figures.trainable
    assert figures.forgotten("old") is not None and figures.merge_error is None
    chosen = next(r.figures for r in done.records if r.judged and r.figures)
    assert set(chosen.outcomes) == set(chosen.success) == {"after", "wrong_instruction"}
    for name, tasks in chosen.outcomes.items():
        for task, outcomes in tasks.items():
            assert len(outcomes) == 2
            assert list(outcomes.values()).count(True) == chosen.success[name][task].successes


def test_every_arm_begins_at_the_same_loss(done: compare.Comparison) -> None:
    first = {r.figures.validation[HELD_OUT][0].loss for r in done.records if r.figures}
    assert len(first) == 1


def test_only_the_chosen_learning_rate_is_rolled_out(done: compare.Comparison) -> None:
    (standing, _) = done.standings
    assert standing.choice is not None and standing.lr in GRID
    chosen, other = (HIGH, LOW) if standing.lr == GRID[1] else (LOW, HIGH)
    won, lost = arm(done, chosen).figures, arm(done, other).figures
    assert won is not None and lost is not None
    assert set(won.success) == {"after", "wrong_instruction"} and lost.success == {}
    assert arm(done, chosen).judged and not arm(done, other).judged
    assert won.last() is not None and lost.last() is not None and (won.last() or 9) <= (lost.last() or 0)
    assert won.memory is not None, "what was measured while it trained outlives the rollouts"


def test_an_arm_that_breaks_is_recorded_and_ends_nothing(done: compare.Comparison) -> None:
    broken = [r for r in done.records if r.strategy == "broken"]
    assert len(broken) == 2 and all(r.figures is None for r in broken)
    assert all("\nvlafit: step " in (r.error or "") for r in broken), "the whole message, and no more"
    assert all(r.reason.startswith("step ") and "not finite" in r.reason for r in broken)
    assert done.standings[1].lr is None and not done.missing
    assert set(done.broken) == set(broken) and all(done.log(r.name).is_file() for r in broken)
    caveat = next(line for line in summary.caveats(done) if line.startswith("broken-lr0.01-seed3 "))
    assert "not finite" in caveat and "(log: logs/broken-lr0.01-seed3.log)" in caveat


def test_a_strategy_that_did_not_finish_is_shown_so_and_never_with_zeros(done: compare.Comparison) -> None:
    row = next(line for line in describe(done).splitlines() if line.startswith("broken "))
    assert row.split() == ["broken", "did", "not", "finish"]
    assert "broken did not finish: step " in describe(done)
    facts = json.loads((done.folder / "compare.json").read_text())
    one = facts["strategies"][1]
    assert one["did_not_finish"].startswith("step ") and facts["strategies"][0]["did_not_finish"] is None
    assert {one[key] for key in ("samples_per_s", "trainable", "memory", "train_seconds")} == {None}
    assert any(
        "Left out of the ranking: broken, which did not finish: step" in n for n in facts["verdict"]["notes"]
    )
    assert "did not finish: step" in (done.folder / "compare.html").read_text()


def test_the_command_line_shows_the_whole_message_of_what_broke_and_fails(
    done: compare.Comparison, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    def run(*_: object, observer: compare.Observer, **__: object) -> compare.Comparison:
        for one in done.records:
            observer.arm(one.name, one, True)
        return done

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare, "write", lambda _: None)  # the folder is that of all tests
    path = tmp_path / "tiny.toml"
    path.write_text(config.dump(done.recipe))
    words = [str(path), "--strategies", "expert", "--out", str(done.folder)]
    assert verb.run(words) == 1
    said = capsys.readouterr()
    for one in done.broken:
        assert f"{one.name}: FAILED: {one.error}" in said.out and f"log: {done.log(one.name)}" in said.out
    assert "did not finish: broken-lr0.001-seed3, broken-lr0.01-seed3" in said.err
    monkeypatch.setattr(compare, "run", lambda *_, **__: replace(done, records=done.records[:2]))
    assert verb.run(words) == 0


def test_a_finished_arm_is_never_run_again(
    done: compare.Comparison, out: Path, recipe: Recipe, options: Options
) -> None:
    seen = Seen()
    again = compare.run(recipe, replace(options, strategies=options.strategies[:1]), out, observer=seen)
    assert seen.fresh == [] and set(seen.kept) == {LOW, HIGH}
    assert again.standings[0].records == done.standings[0].records


def test_what_killed_processes_left_in_a_comparison_is_removed(
    done: compare.Comparison, out: Path, recipe: Recipe, options: Options
) -> None:
    half = [out / "recipes" / f".{LOW}.toml.41.partial", out / "arms" / f".{LOW}.removed"]
    half[0].touch()
    half[1].mkdir()
    compare.run(recipe, replace(options, strategies=options.strategies[:1]), out)
    assert not any(path.exists() for path in half)


@pytest.mark.slow
def test_an_arm_that_broke_is_tried_again(out: Path, recipe: Recipe, options: Options) -> None:
    seen = Seen()
    compare.run(
        recipe, replace(options, strategies=options.strategies[1:], lr_grid=GRID[:1]), out, observer=seen
    )
    assert seen.fresh == ["broken-lr0.001-seed3"]


def test_a_strategy_that_changed_is_refused_where_an_arm_of_it_has_finished(
    out: Path, recipe: Recipe, options: Options, tmp_path: Path
) -> None:
    changed = tmp_path / "expert.toml"
    changed.write_text('[[rule]]\nmode = "full"\n')
    before = (out / "arms" / LOW / arm_record.FILE).read_text()
    with pytest.raises(ConfigError, match="another content of strategy 'expert'.*hash"):
        compare.run(recipe, replace(options, strategies=(str(changed),)), out)
    assert (out / "arms" / LOW / arm_record.FILE).read_text() == before


@pytest.mark.slow
def test_arms_without_figures_begin_anew_with_a_strategy_that_was_mended(
    done: compare.Comparison, out: Path, recipe: Recipe, options: Options, tmp_path: Path
) -> None:
    """One had broken, the other was killed after its first checkpoint and has no record."""
    mended = tmp_path / "broken.toml"
    mended.write_text('[[rule]]\nmode = "full"\n')
    broke, killed = (f"broken-lr{lr:g}-seed3" for lr in GRID)
    shutil.rmtree(out / "arms" / killed)
    shutil.copytree(out / "arms" / LOW, out / "arms" / killed)  # a run of something else that got far
    (out / "arms" / killed / arm_record.FILE).unlink()
    before = arm(done, broke).strategy_sha256
    assert (out / "recipes" / f"{killed}.sha256").read_text().strip() == before
    seen = Seen()
    found = compare.run(recipe, replace(options, strategies=(str(mended),)), out, observer=seen)
    assert {broke, killed} <= set(seen.fresh) and found.broken == () and len(found.records) == 2
    assert {r.strategy_sha256 for r in found.records} == {arms.candidates([str(mended)])[0].sha256}
    assert before not in {r.strategy_sha256 for r in found.records}


@pytest.mark.slow
def test_a_run_of_which_nothing_tells_the_strategy_is_never_recorded_with_a_hash(
    out: Path, recipe: Recipe, options: Options
) -> None:
    """The folder of a comparison that was begun before hashes were kept at an arm's beginning."""
    name = "broken-lr0.001-seed3"
    shutil.rmtree(out / "arms" / name)
    shutil.copytree(out / "arms" / LOW, out / "arms" / name)
    (out / "arms" / name / arm_record.FILE).unlink()
    (out / "recipes" / f"{name}.sha256").unlink()
    asked = replace(options, strategies=options.strategies[1:], lr_grid=GRID[:1])
    found = compare.run(recipe, asked, out)
    assert [(r.strategy_sha256, r.finished) for r in found.records] == [("", False)]
    found = compare.run(recipe, asked, out)  # so that the next one begins it anew
    assert [r.strategy_sha256 for r in found.records] == [arms.candidates(asked.strategies)[0].sha256]


# ------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("train", {"steps": 5}, r"train\.steps was 4, is 5"),
        ("optim", {"weight_decay": 0.5}, r"optim\.weight_decay was 0\.01, is 0\.5"),
        ("data", {"episodes_per_task": 1}, r"data was [0-9a-f]{12}, is"),
        ("data", {"validation_sets": {}}, r"validation_sets was"),
        ("eval", {"protocol": "CHANGED"}, r"protocol was [0-9a-f]{12}, is"),
    ],
)
def test_another_recipe_data_or_protocol_is_refused_with_its_hash(
    out: Path,
    recipe: Recipe,
    options: Options,
    tmp_path: Path,
    section: str,
    changes: dict[str, Any],
    says: str,
) -> None:
    if "protocol" in changes:
        changed = tmp_path / "toy.toml"
        changed.write_text(Path(recipe.eval.protocol).read_text().replace("trials = 2", "trials = 3"))
        changes = {"protocol": str(changed)}
    other = replace(recipe, **{section: replace(getattr(recipe, section), **changes)})
    with pytest.raises(ConfigError, match=rf"holds another comparison \(hash [0-9a-f]{{12}}.*{says}"):
        compare.run(other, options, out)


def test_what_changes_no_result_may_change(out: Path, recipe: Recipe, options: Options) -> None:
    quiet = replace(
        recipe,
        train=replace(recipe.train, log_every=7, keep=5),
        eval=replace(recipe.eval, workers=2, videos=1),
    )
    seen = Seen()
    compare.run(quiet, replace(options, strategies=options.strategies[:1], jobs=1), out, observer=seen)
    assert seen.fresh == []


def test_a_folder_of_something_else_is_left_alone(recipe: Recipe, options: Options, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=f"{tmp_path} is not empty"):
        compare.run(recipe, options, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategies": ()}, "--strategies is empty"),
        ({"strategies": ("full", "full")}, "'full' is named twice"),
        ({"strategies": ("ful",)}, "did you mean 'full'"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"lr_grid": (0.0,)}, "--lr-grid: .*must be above 0, is 0"),
        ({"lr_grid": (1e-3, 1e-3)}, "--lr-grid lists a learning rate twice"),
        ({"jobs": 0}, "--jobs must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(
    recipe: Recipe, options: Options, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(VlafitError, match=says):
        compare.run(recipe, replace(options, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_fault_of_every_arm_is_named_before_the_first_one_trains(
    recipe: Recipe, options: Options, tmp_path: Path
) -> None:
    full = '[[stage.rule]]\nmode = "full"\n'
    late = f"[[stage]]\n{full}[[stage]]\nbegin = {{ step = 9 }}\n{full}"
    for name, text in (("misfit", MISFIT), ("late", late)):
        (tmp_path / f"{name}.toml").write_text(text)
    given = ("expert", str(tmp_path / "misfit.toml"), str(tmp_path / "late.toml"))
    protocol = tmp_path / "toy.toml"
    protocol.write_text(Path(recipe.eval.protocol).read_text().replace("size = 16", "size = 8"))
    asked = replace(recipe, eval=replace(recipe.eval, protocol=str(protocol)))
    with pytest.raises(ConfigError) as error:
        compare.run(asked, replace(options, strategies=given), tmp_path / "out")
    said = str(error.value)
    assert "- --strategies misfit: strategy 'misfit': rule 1" in said
    assert "- --strategies late: strategy 'late': stage 2" in said
    assert said.count("\n- ") == 3 and "protocol 'toy'" in said and "--strategies expert" not in said
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- budgets, processes


def test_budgets_become_steps_or_seconds(recipe: Recipe) -> None:
    assert with_budget(recipe) == recipe
    assert with_budget(recipe, steps=7).train.steps == 7
    assert with_budget(recipe, samples=9).train.steps == 3  # batches of 4
    timed = with_budget(recipe, seconds=1.5).train
    assert timed.max_seconds == 1.5 and timed.steps == arms.UNLIMITED_STEPS
    with pytest.raises(ConfigError, match="--budget-steps and --budget-seconds"):
        with_budget(recipe, steps=1, seconds=1.0)
    with pytest.raises(ConfigError, match="--budget-samples .*0.* 0"):
        with_budget(recipe, samples=0)


def test_how_a_process_ended_is_told(tmp_path: Path) -> None:
    processes = Processes(1)
    words = "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    killed = processes.run([sys.executable, "-c", words], tmp_path / "log")
    assert "SIGKILL" in killed.error and "so far" in killed.error
    failed = processes.run([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log")
    assert failed.error.splitlines() == ["exit status 1; last output:", "no such thing"]
    assert reason(failed.error) == "no such thing"
    assert reason("exit status 1; its last words:\nas older records have it") == "as older records have it"
    assert reason(killed.error).startswith("ended by SIGKILL") and "so far" not in reason(killed.error)
    words = "raise SystemExit('much ado\\n' * 50 + 'vlafit: this\\n' + 'and that\\n' * 20)"
    ours = processes.run([sys.executable, "-c", words], tmp_path / "log")
    assert ours.output == "vlafit: this" + "\nand that" * 20 and reason(ours.error).startswith(
        "this and that"
    )
    processes.stop()
    assert processes.run([sys.executable, "-c", ""], tmp_path / "log").status == 130


# ---------------------------------------------------------------------------------------------- what it says


def test_the_page_is_one_file_that_points_nowhere(done: compare.Comparison) -> None:
    text = (done.folder / "compare.html").read_text()
    parser = Strict()
    parser.feed(text)
    assert parser.open == [] and len(parser.ids) == len(set(parser.ids))
    assert all(link.startswith("#") for link in parser.links)
    assert "http" not in text and "<script" not in text and str(done.folder) not in text
    for part in (
        "At a glance",
        "Success against memory",
        "Validation loss, old",
        "Memory",
        "Learning rates tried",
    ):
        assert part in text


def test_text_from_outside_is_escaped_in_the_page(done: compare.Comparison) -> None:
    evil = '"><script>alert("$\\frac$")</script>'
    outside = replace(
        done,
        recipe=replace(done.recipe, name=evil, purpose=evil, eval=replace(done.recipe.eval, protocol=evil)),
        command=evil,
        standings=tuple(replace(s, strategy=f"{evil}{i}") for i, s in enumerate(done.standings)),
        records=tuple(replace(r, name=evil, error=r.error and evil) for r in done.records),
    )
    text = page(outside)
    assert "<script" not in text and "&lt;script&gt;alert(" in text
    parser = Strict()
    parser.feed(text)
    assert parser.open == []


def test_the_json_holds_every_number(done: compare.Comparison) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    facts = json.loads((done.folder / "compare.json").read_text(), parse_constant=refuse)
    assert set(facts) == {
        "format", "name", "purpose", "identity", "recipe", "seeds", "lr_grid", "jobs", "verdict",
        "strategies",
        "loss_against_success", "notes", "caveats", "missing", "command", "arms",
    }  # fmt: skip
    (one, broken) = facts["strategies"]
    assert one["strategy"] == "expert" and [t["lr"] for t in one["lr_tried"]] == list(GRID)
    after = one["success"]["after"]
    assert after["overall"]["episodes"] == 4 and set(after["tasks"]) == {"left", "right"}
    assert set(after["seeds"]) == {"3"} and {"low", "high"} <= set(after["overall"])
    assert set(one["validation"]) == {HELD_OUT, "old"} and set(one["forgetting"]) == {"old"}
    curve = one["validation"]["old"]["seeds"]["3"]["curve"]
    assert [(p["step"], p["samples"]) for p in curve] == [(0, 0), (2, 8), (4, 16)]
    assert one["memory"]["peak_mb"] >= one["memory"]["parts_mb"]["weights"] > 0
    assert one["merge_error"] is None and broken["success"] == {} and broken["lr"] is None
    assert len(facts["arms"]) == 4


def test_the_edge_of_the_grid_and_a_single_learning_rate_are_said(done: compare.Comparison) -> None:
    edge = next(note for note in summary.notes(done) if "grid" in note)
    assert edge.startswith("expert: the best learning rate") and "widen --lr-grid" in edge
    single = replace(done, options=replace(done.options, lr_grid=()))
    assert any("same learning rate" in note and "--lr-grid" in note for note in summary.notes(single))


def test_pooled_seeds_play_the_same_starts_and_that_is_said(done: compare.Comparison) -> None:
    assert summary.SAME_STARTS not in summary.caveats(done), "one seed is no pool"
    one = done.standings[0]
    twice = replace(one, records=(*one.records, replace(one.records[0], seed=4)))
    pooled = replace(done, standings=(twice,))
    assert list(summary.caveats(pooled)).count(summary.SAME_STARTS) == 1
    assert "More seeds add no new starts" in page(pooled) and summary.SAME_STARTS in describe(pooled)
    assert summary.SAME_STARTS in summary.to_json(pooled)["caveats"]


def test_a_merge_error_that_was_not_recorded_is_listed_as_missing(done: compare.Comparison) -> None:
    """As of arms that trained before merging was measured."""
    assert [one.adapts for one in arms.candidates(["lora", "expert"])] == [True, False]
    said = "merge error was not recorded for expert (seed 3)."
    assert said not in summary.missing(done), "there is nothing to merge"
    adapted = replace(done, standings=(replace(done.standings[0], adapts=True),))
    assert said in page(adapted) and said in summary.to_json(adapted)["missing"]


def test_learning_rates_that_agree_to_six_digits_are_two_arms() -> None:
    (one,) = arms.candidates(["expert"])
    given = (0.00123456, 0.001234561, 0.0012345612, 0.001, 1e-05, 1.0, 0.1 + 0.2, 0.3)
    names = [arms.Arm(one, lr, 0).name for lr in given]
    assert len(set(names)) == len(given)
    assert names[3:6] == ["expert-lr0.001-seed0", "expert-lr1e-05-seed0", "expert-lr1-seed0"]
    assert [float(arms.rate(lr)) for lr in given] == list(given)


def test_an_unfinished_comparison_has_a_page_that_says_so(done: compare.Comparison) -> None:
    stopped = replace(done, standings=(), records=(), missing=(HIGH,))
    assert f"{HIGH} has not ended" in page(stopped)


def test_the_report_of_a_comparison_is_written_again_from_its_json(
    done: compare.Comparison, out: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ("compare.html", "compare.json")
    before = [(out / name).read_text() for name in names]
    for name in names[:1]:
        (out / name).unlink()
    assert report_verb.run([str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "compare.html")
    assert [(out / name).read_text() for name in names] == before


def test_a_comparison_of_an_earlier_version_gets_its_outcomes_from_its_episodes(
    done: compare.Comparison, out: Path
) -> None:
    content = json.loads((out / "compare.json").read_text())
    for values in content["arms"]:
        if values["figures"]:
            del values["figures"]["outcomes"]
    (out / "compare.json").write_text(json.dumps(content))
    again = stored.read(out)
    assert again.records == done.records and again.standings == done.standings
    judged = next(record for record in done.records if record.judged and record.figures)
    episodes = out / "arms" / judged.name / "eval" / "after" / "episodes.jsonl"
    text = episodes.read_text()
    flipped = text.replace('"success": true', '"success": null').replace(
        '"success": false', '"success": true'
    )
    episodes.write_text(flipped)
    with pytest.raises(VlafitError, match=r"episodes\.jsonl: .* successes of task"):
        stored.read(out)
    episodes.unlink()
    assert not any(standing.outcomes for standing in stored.read(out).standings)


def test_outcomes_that_were_edited_are_refused_with_both_values(done: compare.Comparison, out: Path) -> None:
    judged = next(record for record in done.records if record.judged and record.figures)
    arm_file, whole = out / "arms" / judged.name / "arm.json", out / "compare.json"
    for file, pick in (
        (arm_file, lambda values: values),
        (whole, lambda values: next(arm for arm in values["arms"] if arm["name"] == judged.name)),
    ):
        values = json.loads(file.read_text())
        by_task = pick(values)["figures"]["outcomes"]["after"]
        task, outcomes = next(iter(by_task.items()))
        seed, success = next(iter(outcomes.items()))
        outcomes[seed] = not success
        file.write_text(json.dumps(values))
        with pytest.raises(
            VlafitError, match=rf"{file}.*task '{task}' has \d/.*, but outcomes.after has \d/"
        ):
            arm_record.read(file) if file == arm_file else stored.read(out)


def test_an_arm_whose_episodes_were_edited_has_no_figures(done: compare.Comparison, out: Path) -> None:
    judged = next(record for record in done.records if record.judged and record.figures)
    run = out / "arms" / judged.name
    rows = run / "eval" / "after" / "episodes.jsonl"
    rows.write_text(rows.read_text().replace('"trial": 0', '"trial": 5', 1))
    with pytest.raises(VlafitError, match=rf"{rows}, line 1: .* trial is 5, but this seed is of trial 0"):
        arm_record.figures(run)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"arms": 3}'])
def test_a_damaged_comparison_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(VlafitError, match=r"compare\.json"):
        stored.read(tmp_path)
    with pytest.raises(VlafitError, match="no such file"):
        stored.read(tmp_path / "elsewhere")


def test_the_command_line_prints_table_verdict_and_place(done: compare.Comparison) -> None:
    text = describe(done)
    assert "expert" in text and "Only expert has results" in text and "compare.html" in text


def test_the_command_line_reads_seeds_grid_budget_and_fields(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(config.dump(recipe))
    words = [str(path), "--strategies", "full,expert", "--seeds", "2", "--lr-grid", "1e-4,3e-4", "--out", "x"]
    made, options, out = read([*words, "--budget-samples", "40", "--optim.ema", "0", "--train.seed", "5"])
    assert options == Options(("full", "expert"), (5, 6), (1e-4, 3e-4)) and out == Path("x")
    assert made.train.steps == 10 and made.optim.ema == 0
    words = [str(path), "--strategies", "full,expert", "--out", "x"]
    for more, says in (
        (["--strategy", "full"], "use --strategies"),
        (["--lr-grid", "fast"], "--lr-grid: .*'fast'"),
        (["--seeds", "0"], "--seeds: must be a whole number from 1"),
        (["--strategies", "lora"], "--strategies is given 2 times"),
    ):
        with pytest.raises(ConfigError, match=says):
            read([*words, *more])
