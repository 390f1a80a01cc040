"""A finished run goes on for more steps, as if it had been that long from the start."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from safetensors.torch import load_file

from tests.train.world import metrics, tiny, write_dots
from vlafit import config
from vlafit.errors import TrainingError
from vlafit.recipe import OptimRecipe, Recipe
from vlafit.train import launch, run
from vlafit.train.extension import notice
from vlafit.train.optim import schedule
from vlafit.train.run_folder import read_recipe, require_usable
from vlafit.train.settle import settle


def longer(recipe: Recipe, steps: int, **optim: int) -> Recipe:
    return replace(recipe, train=replace(recipe.train, steps=steps), optim=replace(recipe.optim, **optim))


@pytest.fixture(scope="module")
def short(card: Path) -> Recipe:
    return tiny(card, train={"steps": 4, "validate_every": 0, "save_every": 0})


@pytest.fixture(scope="module")
def finished(short: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "short"
    run(short, out)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def state(out: Path, step: int) -> dict:
    return load_file(out / "checkpoints" / f"step_{step:06d}" / "training" / "state.safetensors")


@pytest.mark.case(
    section="runs",
    report="a finished run cannot go on",
    user_has="`--resume --train.steps 800` after 400 steps",
    now="AdamW, EMA and order go on; the learning rate stays at its end unless "
    "`optim.schedule_from` restarts it",
)
def test_an_extended_run_equals_one_that_was_that_long_from_the_start(
    short: Recipe, copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        run(longer(short, 6), copy, resume=True)
    run(longer(short, 6, schedule_steps=4), tmp_path / "long")
    one, other = state(copy, 6), state(tmp_path / "long", 6)  # weights, AdamW and EMA
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    rates = {line["step"]: line["train/lr"] for line in metrics(copy) if "train/lr" in line}
    final = short.optim.final_lr * short.optim.lr
    assert sorted(rates) == [1, 2, 3, 4, 5, 6] and rates[5] == rates[6] == pytest.approx(final)
    kept = config.read(Recipe, copy / "recipe.toml", "recipe")
    assert (kept.train.steps, kept.optim.schedule_steps) == (6, 4)
    facts = json.loads((copy / "run.json").read_text())
    assert facts["finished"] and facts["steps"] == 6
    for text in (caplog.text, " ".join(facts["notices"])):
        assert "train.steps was 4, is now 6" in text and "stays at its final value" in text
    again = settle(longer(short, 6), launch.read({}), bf16=False, saved=kept).recipe
    again = replace(again, data=replace(again.data, workers=0))  # as the run chooses on a CPU
    assert require_usable(again, copy, read_recipe(copy)) == kept  # the same command goes on with it


def test_an_extension_within_the_warm_up_says_where_the_learning_rate_is(short: Recipe):
    optim = replace(short.optim, lr=1e-4, final_lr=0.1, warmup_steps=9, schedule_steps=4)
    saved = replace(short, optim=optim)
    said = notice(saved, replace(saved, train=replace(saved.train, steps=8)))
    # (4 + 1) / (9 + 1) and (7 + 1) / (9 + 1) of 1e-4
    assert "goes on from 5e-05 at step 4, in the warm-up that ends at step 9, to 8e-05 at the last" in said
    past = notice(saved, replace(saved, train=replace(saved.train, steps=30)))
    assert "goes on from 5e-05 at step 4, in the warm-up" in past and "to 1e-05 at the last step" in past
    short_warm_up = replace(saved, optim=replace(optim, warmup_steps=1))
    said = notice(short_warm_up, replace(short_warm_up, train=replace(saved.train, steps=8)))
    assert "stays at its final value, 1e-05" in said


def test_a_new_schedule_begins_where_the_user_says(short: Recipe, copy: Path):
    run(longer(short, 8, schedule_from=4), copy, resume=True)
    rates = [line["train/lr"] for line in metrics(copy) if "train/lr" in line]
    assert rates[4:] == pytest.approx(rates[:4], rel=1e-12)


def test_the_schedule_may_be_shorter_than_the_run_and_begin_later():
    recipe = OptimRecipe(warmup_steps=2, final_lr=0.1, schedule_steps=4)
    shares = [schedule(step, 9, recipe) for step in range(9)]
    assert shares[:4] == [schedule(step, 4, OptimRecipe(warmup_steps=2)) for step in range(4)]
    assert shares[4:] == pytest.approx([0.1] * 5)
    again = replace(recipe, schedule_steps=0, schedule_from=5)
    assert [schedule(step, 9, again) for step in range(5, 9)] == shares[:4]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_refused_resume_leaves_every_byte_of_a_finished_run(tmp_path: Path):
    card = write_dots(tmp_path / "data", tasks=("left",))
    short = tiny(card, train={"steps": 2, "validate_every": 0, "save_every": 1})
    out, data = tmp_path / "run", tmp_path / "data" / "dots" / "left_demo.hdf5"
    run(short, out)
    (out / "eval" / "after").mkdir(parents=True)
    (out / "eval" / "after" / "result.json").write_text("{}")
    original, before = data.read_bytes(), contents(out)
    with h5py.File(data, "r+") as file:
        actions = file["data/demo_0/actions"]
        assert isinstance(actions, h5py.Dataset)
        actions[3] = [0.1, 0.2]
    assert data.stat().st_size == len(original)
    for step in (None, 1):
        with pytest.raises(TrainingError, match="the data changed since the run began"):
            run(longer(short, 4), out, resume=True, resume_from=step)
        assert contents(out) == before
    data.write_bytes(original)
    with pytest.raises(TrainingError, match="no checkpoint of step 0"):
        evaluated = replace(short.eval, before=True, protocol=str(card.with_name("toy.toml")))
        run(replace(longer(short, 4), eval=evaluated), out, resume=True)
    assert contents(out) == before
    record = json.loads(before["run.json"])
    (out / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "started"}))
    damaged = contents(out)
    with pytest.raises(TrainingError, match=r"run.json: damaged .*started"):
        run(longer(short, 4), out, resume=True)
    assert contents(out) == damaged
    (out / "run.json").write_bytes(before["run.json"])
    run(longer(short, 4), out, resume=True)
    assert (out / "eval" / "after_step_000002" / "result.json").is_file()
    assert json.loads((out / "run.json").read_text())["steps"] == 4


def test_evaluations_of_the_last_checkpoint_so_far_are_kept_beside_the_new_ones(short: Recipe, copy: Path):
    from vlafit.train.extension import keep_evaluations

    (copy / "eval" / "after").mkdir(parents=True)
    keep_evaluations(copy, 4)
    assert [path.name for path in (copy / "eval").iterdir()] == ["after_step_000004"]


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"train": {"steps": 3}}, ["train.steps was 4, is now 3"]),
        ({"train": {"steps": 6, "seed": 9}}, ["train.seed was 3, is now 9"]),
        ({"train": {"steps": 6, "max_seconds": 5.0}}, ["train.max_seconds", "new run"]),
        (
            {"train": {"steps": 6}, "optim": {"schedule_from": 2}},
            ["optim.schedule_from = 2", "from 4", "to 5"],
        ),
        ({"optim": {"schedule_from": 4}}, ["optim.schedule_from was 0, is now 4"]),
    ],
)
def test_any_other_change_is_refused(short: Recipe, finished: Path, change: dict, facts: list[str]):
    recipe = short
    for section, values in change.items():
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **values)})
    with pytest.raises(TrainingError) as caught:
        require_usable(recipe, finished, read_recipe(finished))
    assert all(fact in str(caught.value) for fact in facts)


def test_a_schedule_that_restarts_needs_a_run_to_extend(short: Recipe, tmp_path: Path):
    with pytest.raises(TrainingError, match="optim.schedule_from = 4.*no run to extend"):
        require_usable(longer(short, 8, schedule_from=4), tmp_path / "new", None)


def test_ranks_that_were_lowered_for_the_old_length_are_not_extended(short: Recipe, copy: Path):
    text = (copy / "recipe.toml").read_text().replace('strategy = "full"', 'strategy = "adalora"')
    (copy / "recipe.toml").write_text(text)
    with pytest.raises(TrainingError, match="AdaLoRA"):
        require_usable(replace(longer(short, 6), strategy="adalora"), copy, read_recipe(copy))
