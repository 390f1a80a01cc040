"""A sweep on a toy robot: what is searched, pruned, resumed, retried, refused and reported."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.test_report import Strict
from tests.train.agreement_world import recipe_of, write_card, write_checkpoint
from tests.train.world import REPOSITORY, tiny, write_dots
from vlafit import config, files, shipped, sweep
from vlafit.cli.verbs import sweep as verb
from vlafit.cli.verbs.sweep import describe, read
from vlafit.errors import ConfigError, EmbodimentError, StorageError, VlafitError
from vlafit.recipe import Recipe
from vlafit.sweep import storage
from vlafit.sweep.report import page
from vlafit.sweep.storage import RETRY_OF, Storage, number_of, started
from vlafit.sweep.study import Dimension, Study, check, recipe_with, strategy_with
from vlafit.sweep.worker import _Watcher, run_trials
from vlafit.train.loop import StepResult
from vlafit.tuning import load_strategy

TWO_RULES = """
[[rule]]
select = { part = "expert" }
mode = "full"
lr = 0.5

[[rule]]
select = { part = "projections", kind = "linear" }
mode = "full"
lr = 1.0

[[rule]]
mode = "frozen"
"""
SEARCH = {
    "optim.lr": Dimension(low=1e-4, high=1e-1, log=True),
    "train.draws": Dimension(low=1, high=2),
    "rule.lr": Dimension(choices=(0.5, 1.0)),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recordings, their card and a strategy's file; nobody may change it."""
    folder = tmp_path_factory.mktemp("home")
    write_dots(folder)
    (folder / "two.toml").write_text(TWO_RULES)
    return folder


@pytest.fixture(scope="module")
def recipe(home: Path) -> Recipe:
    return tiny(
        home / "dots.toml",
        strategy=str(home / "two.toml"),
        train={"steps": 4, "validate_every": 2, "save_every": 0},
        optim={"ema": 0.0, "warmup_steps": 0},
    )


@pytest.fixture(scope="module")
def done(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> sweep.SweepResult:
    """Two trials; tests only read them."""
    one = sweep.Sweep(recipe, Study(SEARCH, trials=2, startup=2), tmp_path_factory.mktemp("sweep") / "out")
    assert sweep.run(one, "study.toml")
    found = sweep.read(one, "vlafit sweep x")
    sweep.write(found)
    return found


def states(one: sweep.Sweep) -> list[str]:
    return [trial.state for trial in sweep.read(one).trials]


# ---------------------------------------------------------------------------------------------- trials


def test_a_trial_is_an_ordinary_run_with_its_values(done: sweep.SweepResult) -> None:
    assert [trial.state for trial in done.trials] == ["whole", "whole"]
    for trial in done.trials:
        run = done.sweep.folder / trial.folder
        recipe = config.read(Recipe, run / "recipe.toml", "recipe")
        assert (
            recipe.optim.lr == trial.values["optim.lr"] and recipe.train.draws == trial.values["train.draws"]
        )
        assert recipe.strategy == str(run.parent / "strategy.toml")
        rules = load_strategy(recipe.strategy).rules
        assert [rule.lr for rule in rules] == [trial.values["rule.lr"]] * 2 + [1.0]
        assert [step for step, _ in trial.curve] == [0, 2, 4] and trial.loss == trial.curve[-1][1]
        assert json.loads((run / "run.json").read_text())["finished"]


def test_two_trials_go_on_to_four_and_the_first_two_stay(done: sweep.SweepResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done.sweep.folder, tmp_path / "out"))
    more = replace(done.sweep, folder=folder, study=replace(done.sweep.study, trials=4))
    told: list[str] = []
    assert sweep.run(more, "study.toml", tell=told.append)
    found = sweep.read(more)
    assert len(told) == 2 and len(found.trials) == 4
    assert [t.values for t in found.trials[:2]] == [t.values for t in done.trials]
    assert len({t.values["optim.lr"] for t in found.trials}) == 4, "a study that goes on does not draw again"
    assert sweep.run(more, "study.toml", tell=told.append) and len(told) == 2, "nothing is left to do"


def test_a_trial_that_falls_behind_is_pruned(recipe: Recipe, tmp_path: Path) -> None:
    search = {"optim.lr": Dimension(low=1e-12, high=1e-1, log=True)}
    one = sweep.Sweep(recipe, Study(search, trials=2, startup=1, warmup=0.0), tmp_path)
    storage = Storage(tmp_path, one.study, recipe.train.steps)
    for lr in (3e-2, 1e-12):
        storage.optuna_study.enqueue_trial({"optim.lr": lr})
    told: list[str] = []
    assert run_trials(one, told.append)
    assert states(one) == ["whole", "pruned"] and "after step 2" in told[1]
    whole, pruned = sweep.read(one).trials
    assert [step for step, _ in pruned.curve] == [0, 2] and sweep.read(one).best == whole


@pytest.mark.slow
def test_a_trial_that_breaks_is_recorded_and_ends_nothing(recipe: Recipe, tmp_path: Path) -> None:
    search = {"policy.config.max_tokens": Dimension(choices=(16, 2))}
    one = sweep.Sweep(recipe, Study(search, trials=2, startup=2), tmp_path)
    storage = Storage(tmp_path, one.study, recipe.train.steps)
    for tokens in ("2", "16"):
        storage.optuna_study.enqueue_trial({"policy.config.max_tokens": tokens})
    assert run_trials(one, lambda _: None)
    broken, whole = sweep.read(one).trials
    assert (broken.state, whole.state) == ("broke", "whole") and "tokens, the policy takes 2" in broken.error


def test_the_trial_of_a_worker_that_died_is_marked_as_failed_and_tried_again(
    recipe: Recipe, tmp_path: Path
) -> None:
    one = sweep.Sweep(recipe, Study(SEARCH, trials=1, startup=1), tmp_path)
    storage = Storage(tmp_path, one.study, recipe.train.steps)
    dead = storage.take(1)
    assert dead is not None and storage.take(1) is None, "while its worker lives, a trial counts"
    dead.lock.close()  # as the system does when a worker dies
    assert run_trials(one, lambda _: None)
    first, again = storage.trials()
    assert first.state.name == "FAIL" and again.state.name == "COMPLETE"
    assert again.user_attrs[RETRY_OF] == 0 and again.params == first.params
    (trial,) = sweep.read(one).trials
    assert (trial.number, trial.folder, trial.retry_of) == (0, "trials/0000/run", 0)


def attempts(folder: Path, *, dies: set[int], startup: int = 2) -> list[tuple[int, dict[str, object]]]:
    """Play a worker for trials that cost nothing and whose attempts in `dies` end it; return all of them."""
    storage = Storage(folder, Study(SEARCH, trials=5, startup=startup), 4)
    taken_trials = []
    while (taken := storage.take(5)) is not None:
        taken_trials.append((taken.number, taken.values))
        if len(taken_trials) - 1 in dies:
            taken.lock.close()
        else:
            storage.done(taken, float(str(taken.values["optim.lr"])))
    assert [number_of(trial) for trial in started(storage.trials())] == [0, 1, 2, 3, 4]
    return taken_trials


@pytest.mark.parametrize("dies", [{0}, {1, 2}, {3}])
def test_a_sweep_whose_workers_are_killed_has_the_trials_of_an_undisturbed_one(
    tmp_path: Path, dies: set[int]
) -> None:
    undisturbed = attempts(tmp_path / "undisturbed", dies=set())
    killed = attempts(tmp_path / "killed", dies=dies)
    assert [number for number, _ in undisturbed] == [0, 1, 2, 3, 4]
    assert [trial for n, trial in enumerate(killed) if n not in dies] == undisturbed
    assert all(killed[n] == killed[n + 1] for n in dies), "the next attempt has the number and the values"


def test_a_trial_that_saves_between_the_kills_is_never_given_up(recipe: Recipe, tmp_path: Path) -> None:
    storage = Storage(tmp_path, Study(SEARCH, trials=1, startup=1), recipe.train.steps)
    for step in range(1, 6):  # the machine is taken away again and again
        taken = storage.take(1)
        assert taken is not None and taken.number == 0
        (taken.folder / "run" / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        taken.lock.close()
    assert storage.take(1) is not None


def test_half_written_files_of_dead_processes_are_removed_from_a_sweep(
    done: sweep.SweepResult, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(done.sweep.folder, tmp_path / "out"))
    ended = subprocess.Popen(["true"])
    ended.wait()
    with files.new_file(folder / "sweep.html") as alive:
        alive.touch()
        dead = alive.with_name(alive.name.replace(str(os.getpid()), str(ended.pid)))
        dead.touch()
        assert sweep.run(replace(done.sweep, folder=folder), "study.toml")
        assert not dead.exists() and alive.exists()


def test_a_trial_that_kills_every_worker_is_given_up(recipe: Recipe, tmp_path: Path) -> None:
    storage = Storage(tmp_path, Study(SEARCH, trials=1, startup=1), recipe.train.steps)
    deaths = 0
    while (taken := storage.take(1)) is not None:
        taken.lock.close()
        deaths += 1
    assert deaths == 3 and [t.state.name for t in started(storage.trials())] == ["FAIL"]


def test_a_signal_in_the_last_step_of_a_trial_begins_no_other(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sweep.Sweep(recipe, Study(SEARCH, trials=2, startup=2), tmp_path)
    step = _Watcher.step

    def last(self: _Watcher, result: StepResult, total: int, values: dict[str, float]) -> None:
        step(self, result, total, values)
        if result.step == total:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_Watcher, "step", last)
    assert not run_trials(one, lambda _: None)
    assert states(one) == ["whole"]


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_while_it_loads_has_not_died(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sweep.Sweep(recipe, Study(SEARCH, trials=1, startup=1), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules[_Watcher.__module__], "prepare", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
        )
        for _ in range(4):
            assert not run_trials(one, lambda _: None)
    assert run_trials(one, lambda _: None) and states(one) == ["whole"]


@pytest.mark.slow
def test_two_workers_share_the_trials(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(config.dump(recipe))
    (tmp_path / "study.toml").write_text('[search]\n"optim.lr" = { low = 1e-4, high = 1e-2, log = true }\n')
    words = ["sweep", "tiny.toml", "--study", "study.toml", "--trials", "3", "--workers", "2", "--out", "out"]
    ended = subprocess.run(
        [sys.executable, "-m", "vlafit", *words],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "train the best again: vlafit train out/best/recipe.toml" in ended.stdout
    told = [(tmp_path / "out" / "logs" / f"worker-{i}.log").read_text() for i in (0, 1)]
    assert sum(text.count(": validation ") for text in told) == 3
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["trials"]) == 3


@pytest.mark.case(
    section="machines",
    report="`OperationalError`, `database disk image is malformed`",
    user_has="a sweep whose SQLite database is damaged",
    now="one sentence that names the file",
)
@pytest.mark.parametrize("content", [b"not a database" * 99, b"SQLite format 3\0" + bytes(4096)])
def test_a_damaged_database_is_one_sentence_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.db").write_bytes(content)
    with pytest.raises(StorageError) as caught:
        Storage(tmp_path, Study(SEARCH), 4)
    assert str(tmp_path / "study.db") in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_sweep_on_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.fcntl, "flock", refuse)
    with pytest.raises(StorageError) as caught:
        Storage(tmp_path, Study(SEARCH), 4)
    assert all(fact in str(caught.value) for fact in (str(tmp_path), os.strerror(number), "--out"))


# ---------------------------------------------------------------------------------------------- studies


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ({"optim.lrr": Dimension(low=1, high=2)}, r"unknown key 'lrr' in \[optim\]; did you mean 'lr'"),
        ({"optim.lr": Dimension(choices=("a", "b"))}, r"optim\.lr: expected a number, got 'a'"),
        ({"train.steps": Dimension(low=0.5, high=2)}, r"train\.steps: expected a whole number"),
        ({"rule.rank": Dimension(choices=(4, 8))}, r"no rule of strategy .* has the key 'rank'"),
        ({"rule.select.prat": Dimension(choices=("a",))}, r"'select\.prat'; did you mean 'select\.part'"),
        (
            {"strategy": Dimension(choices=("full", "expert")), "rule.lr": Dimension(choices=(1.0,))},
            r"'full'",
        ),
        ({"optim.lr": Dimension(low=-1.0, high=1.0)}, r"- optim\.lr = -1\.0: optim\.lr must be above 0"),
        ({"optim.lr": Dimension(low=0, high=1)}, r"optim\.lr = 0: optim\.lr must be above 0"),
        ({"strategy": Dimension(choices=("full", "loar"))}, r"strategy = 'loar': .*did you mean 'lora'"),
        ({"rule.mode": Dimension(choices=("full", "lroa"))}, r"mode 'lroa'; did you mean 'lora'"),
        ({"rule.select.kind": Dimension(choices=("norm", "conv"))}, r"kind = 'conv': .*matches nothing"),
        ({"rule.alpha": Dimension(low=1.0, high=2.0)}, r"no rule of strategy .* has the key 'alpha'"),
        ({"policy.size": Dimension(choices=("pi0-tiny", "pi0-tinny"))}, r"did you mean 'pi0-tiny'"),
        ({"train.batch_size": Dimension(choices=(4, 0))}, r"train\.batch_size must be at least 1"),
    ],
)
def test_a_name_or_value_that_cannot_be_is_refused(
    recipe: Recipe, tmp_path: Path, search: dict[str, Dimension], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        sweep.run(sweep.Sweep(recipe, Study(search), tmp_path / "out"), "study.toml")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (
            {"rule.rank": Dimension(low=4.5, high=8.5)},
            r"rule\.rank = 4\.5: .*`rank` .*whole number .*4\.5",
        ),
        (
            {"rule.rank": Dimension(low=0, high=8)},
            r"rule\.rank = 0: .*`rank` .*at least 1, not 0",
        ),
        ({"rule.dropout": Dimension(low=0.0, high=1.5)}, r"rule\.dropout = 1\.5: .*below 1, not 1\.5"),
        (
            {"rule.alhpa": Dimension(low=1.0, high=2.0)},
            r"rule\.alhpa = 1\.0: .*key 'alhpa'; did you mean 'alpha'",
        ),
    ],
)
def test_a_value_that_an_adapter_cannot_have_is_refused(
    recipe: Recipe, tmp_path: Path, search: dict[str, Dimension], says: str
) -> None:
    asked = sweep.Sweep(replace(recipe, strategy="lora"), Study(search), tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"study\.toml: invalid values in \[search\]:\n- {says}"):
        sweep.run(asked, "study.toml")
    assert not (tmp_path / "out").exists()


def test_a_card_that_disagrees_with_the_checkpoint_is_not_blamed_on_the_search(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base")
    asked = recipe_of(write_card(tmp_path / "data", control="delta_position"), base, {})
    study = Study({"optim.lr": Dimension(low=1e-5, high=1e-3), "train.steps": Dimension(choices=(4, 8))})
    with pytest.raises(EmbodimentError) as error:
        sweep.run(sweep.Sweep(asked, study, tmp_path / "out"), "study.toml")
    assert "card 'joints' and checkpoint" in str(error.value) and "control mode" in str(error.value)
    assert "[search]" not in str(error.value) and "study.toml" not in str(error.value)


def test_all_that_no_trial_could_be_is_named_at_once(recipe: Recipe, tmp_path: Path) -> None:
    search = {"optim.lr": Dimension(low=-1.0, high=1.0), "rule.rank": Dimension(choices=(0, 4))}
    asked = sweep.Sweep(replace(recipe, strategy="lora"), Study(search), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"optim\.lr = -1\.0: (.|\n)*rule\.rank = 0: "):
        sweep.run(asked, "study.toml")


def test_values_that_are_possible_with_some_of_the_others_are_searched(recipe: Recipe) -> None:
    search = {"rule.rank": Dimension(choices=(8, 24)), "rule.target_rank": Dimension(choices=(4, 12))}
    check(Study(search), replace(recipe, strategy="adalora"), "here")
    with pytest.raises(ConfigError, match="target_rank = 24: .*mean.*`target_rank` 24"):
        search["rule.target_rank"] = Dimension(choices=(4, 24))
        check(Study(search), replace(recipe, strategy="adalora"), "here")


def test_an_option_that_a_strategy_leaves_at_its_default_is_searched_where_an_adapter_has_it(
    tmp_path: Path,
) -> None:
    text = strategy_with("lora", {"rule.alpha": 8.0, "rule.rank": 4}, "here")
    assert text is not None
    (tmp_path / "made.toml").write_text(text)
    *adapted, projections, rest = load_strategy(str(tmp_path / "made.toml")).rules
    assert [(r.adapter.alpha, r.adapter.rank) for r in adapted if r.adapter] == [(8.0, 4)] * len(adapted)
    assert adapted and projections.adapter is None and rest.adapter is None


def test_a_sweep_of_which_every_trial_broke_fails_with_the_reasons(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "tiny.toml").write_text(config.dump(replace(recipe, strategy="full")))
    (tmp_path / "study.toml").write_text('[search]\n"optim.lr" = { low = 1e17, high = 1e18 }\n')
    words = [str(tmp_path / "tiny.toml"), "--study", str(tmp_path / "study.toml"), "--trials", "1"]
    assert verb.run([*words, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "trial 0 failed: NotFinite: step " in said.out and "no trial completed" in said.err
    assert "train the best again" not in said.out
    notes = json.loads((tmp_path / "out" / "sweep.json").read_text())["notes"]
    assert len(notes) == 1 and "1 failed" in notes[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"missing key 'search'"),
        ("[search]\n", r"\[search\] is empty"),
        ('[search]\n"optim.lr" = { low = 2, high = 1 }\n', r"low 2 must be below high 1"),
        (
            '[search]\n"optim.lr" = { low = 0, high = 1, log = true }\n',
            r"logarithmic range must start above 0",
        ),
        ('[search]\n"optim.lr" = { low = 1 }\n', r"set `low` and `high`, or `choices`"),
        ('[search]\n"optim.lr" = { lo = 1 }\n', r"unknown key 'lo'.*did you mean 'low'"),
        ('[search]\n"optim.lr" = { low = 1, choices = [1] }\n', r"set either `choices` or"),
        ('trials = 0\n[search]\n"optim.lr" = { choices = [1] }\n', r"trials must be at least 1"),
    ],
)
def test_a_study_that_cannot_be_is_refused_by_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(ConfigError, match=rf"study\.toml.*{says}"):
        sweep.load_study(tmp_path / "study.toml")


@pytest.mark.parametrize("name", shipped.names("study"))
def test_a_shipped_study_names_fields_of_a_recipe_and_has_a_purpose(name: str) -> None:
    study = sweep.load_study(name)
    assert study.purpose
    for end in (0, -1):
        recipe_with(Recipe(), {n: one.ends()[end] for n, one in study.search.items()}, name)


def test_another_study_or_recipe_in_the_same_folder_is_refused(done: sweep.SweepResult) -> None:
    for other in (
        replace(done.sweep, study=replace(done.sweep.study, search={"optim.lr": Dimension(choices=(1e-3,))})),
        replace(
            done.sweep, recipe=replace(done.sweep.recipe, train=replace(done.sweep.recipe.train, steps=5))
        ),
    ):
        with pytest.raises(ConfigError, match=r"holds another sweep \(hash [0-9a-f]{12}"):
            sweep.run(other, "study.toml")


def test_rules_are_set_wherever_they_have_the_key_those_of_stages_too(tmp_path: Path) -> None:
    (tmp_path / "staged.toml").write_text(
        '[[stage]]\nbegins = 0\n[[stage.rule]]\nmode = "lora"\nrank = 4\n[[stage.rule]]\nmode = "frozen"\n'
        '[[stage]]\nbegins = 5\n[[stage.rule]]\nmode = "lora"\nrank = 8\nselect = { kind = "mlp" }\n'
    )
    values = {"rule.rank": 16, "rule.select.kind": ["attention", "mlp"], "optim.lr": 1.0}
    text = strategy_with(str(tmp_path / "staged.toml"), values, "here")
    assert text is not None
    (tmp_path / "made.toml").write_text(text)
    first, second = config.load_toml(tmp_path / "made.toml", "strategy")["stage"]
    assert first["rule"] == [{"mode": "lora", "rank": 16}, {"mode": "frozen"}]
    assert second["rule"] == [{"mode": "lora", "rank": 16, "select": {"kind": ["attention", "mlp"]}}]
    assert strategy_with(str(tmp_path / "staged.toml"), {"optim.lr": 1.0}, "here") is None


def test_fields_of_every_depth_are_set(recipe: Recipe) -> None:
    made = recipe_with(recipe, {"strategy": "full", "optim.lr": 1, "policy.config.vision.depth": 3}, "here")
    assert made.strategy == "full" and made.optim.lr == 1.0
    assert made.policy.config == {"max_tokens": 16, "vision": {"depth": 3}, "language": {"depth": 2}}
    check(Study({"strategy": Dimension(choices=("full", "expert"))}), recipe, "here")


def test_the_edge_of_what_was_searched_is_known() -> None:
    lr = Dimension(low=1e-5, high=1e-1, log=True)
    assert lr.at_edge(1.2e-5) and lr.at_edge(9e-2) and not lr.at_edge(1e-3)
    ranks = Dimension(choices=(4, 8, 16))
    assert ranks.at_edge(16) and not ranks.at_edge(8) and not Dimension(choices=("a", "b")).at_edge("a")
    assert not Dimension(low=1, high=2).at_edge(2) and Dimension(low=1, high=9).at_edge(9)


def test_without_optuna_the_extra_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(VlafitError, match=r"pip install 'vlafit\[sweep\]'"):
        Storage(tmp_path, Study(SEARCH), recipe.train.steps)


# ------------------------------------------------------------------------------------------------- report


def test_the_page_is_one_file_that_points_nowhere(done: sweep.SweepResult) -> None:
    text = (done.sweep.folder / "sweep.html").read_text()
    parser = Strict()
    parser.feed(text)
    assert parser.open == [] and len(parser.ids) == len(set(parser.ids))
    assert all(link.startswith("#") for link in parser.links) and "http" not in text and "<script" not in text
    assert all(name in text for name in ("Every trial", "optim.lr", "confirm the best by rollouts"))


def test_text_from_outside_is_escaped_in_the_page(done: sweep.SweepResult) -> None:
    evil = '"><script>alert("$\\frac$")</script>'
    named = replace(done.sweep, recipe=replace(done.sweep.recipe, name=evil))
    named = replace(named, study=replace(named.study, purpose=evil))
    trials = tuple(replace(trial, error=evil, folder=evil) for trial in done.trials)
    text = page(replace(done, sweep=named, trials=trials, command=evil))
    assert "<script" not in text and "&lt;script&gt;alert(" in text
    parser = Strict()
    parser.feed(text)
    assert parser.open == []


def test_the_best_can_be_trained_again_by_the_command_that_is_given(done: sweep.SweepResult) -> None:
    facts = json.loads((done.sweep.folder / "sweep.json").read_text())
    best = min(facts["trials"], key=lambda t: t["loss"])
    assert facts["best"] == best
    path = facts["train_again"].split()[2]
    recipe = config.read(Recipe, Path(path), "recipe")
    assert recipe.name == "tiny-best" and recipe.optim.lr == best["values"]["optim.lr"]
    assert recipe.eval == done.sweep.recipe.eval, "the best is judged as the recipe asks; trials are not"
    assert load_strategy(recipe.strategy).rules[0].lr == best["values"]["rule.lr"]
    assert facts["train_again"] in describe(done)


def test_the_command_line_reads_study_numbers_and_fields(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(config.dump(recipe))
    words = [str(tmp_path / "tiny.toml"), "--study", "learning-rate", "--out", "x"]
    made, study, options = read([*words, "--trials", "7", "--seed", "3", "--train.steps", "9"])
    assert made.train.steps == 9 and (study.trials, study.seed, options.workers) == (7, 3, 1)
    assert set(study.search) == {"optim.lr", "optim.weight_decay"}
    with pytest.raises(ConfigError, match="--workers: must be a whole number from 1"):
        read([*words, "--workers", "0"])
