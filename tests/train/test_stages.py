"""A run in stages: what begins when, what each stage keeps and gives up, and going on in the midst of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.test_interruptions import Interrupted, Until, crash, without_times
from tests.train.test_training import split
from tests.train.world import REPOSITORY, assert_same, learned, metrics, tiny
from tests.variants import variants
from vlafit import checkpoints, config
from vlafit.cli.train_view import TrainView
from vlafit.errors import StrategyError, TrainingError
from vlafit.recipe import Recipe, TrainRecipe
from vlafit.report import read_facts
from vlafit.report.page import page
from vlafit.train import checkpointer, dataloader, run
from vlafit.train.ema import Ema
from vlafit.train.experiment import build
from vlafit.train.loop import StepResult, train
from vlafit.train.optim import rewarm
from vlafit.train.stages import Place, due, require_reachable
from vlafit.train.train_state import TrainState
from vlafit.tuning import Plan, Stage, parse

CPU = torch.device("cpu")
STEPS = 12
STAGED = """
[[stage]]
name = "probe"
[[stage.rule]]
select = { part = "projections" }
mode = "full"
[[stage.rule]]
mode = "frozen"

[[stage]]
name = "expert alone"
begin = { step = 4 }
[[stage.rule]]
select = { part = "expert" }
mode = "full"
[[stage.rule]]
mode = "frozen"

[[stage]]
name = "all"
begin = { fraction = 0.67 }
lr = 0.5
warmup_steps = 2
[[stage.rule]]
select = { part = "expert" }
mode = "full"
lr = 0.5
[[stage.rule]]
mode = "full"
"""
# Two stages that learn so slowly that no weight moves: in each, every validation gives the same loss, bit for
# bit. (Between them it may differ in the last one: torch multiplies frozen matrices in another order.)
PLATEAU = STAGED.replace('name = "probe"', 'name = "probe"\nlr = 1e-12')
PLATEAU = PLATEAU.replace('name = "expert alone"', 'name = "expert alone"\nlr = 1e-12')
PLATEAU = PLATEAU.replace("{ step = 4 }", "{ plateau = 2 }").replace("{ fraction = 0.67 }", "{ plateau = 1 }")
BEGAN = {1: 0, 2: 4, 3: 8}  # stage, counted from 1 -> steps before it
BEGAN_BY_PLATEAU = {
    1: 0,
    2: 3,
    3: 5,
}  # validated at every step; the first validation of a stage sets the mark


def staged(card: Path, folder: Path, text: str = STAGED, **changes: object) -> Recipe:
    path = folder / "staged.toml"
    path.write_text(text)
    told = {"steps": STEPS, "save_every": 1, "keep": 100, "validate_every": 2, **changes}
    return tiny(card, strategy=str(path), train=told)


@pytest.fixture(scope="module")
def recipe(card: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return staged(card, tmp_path_factory.mktemp("strategy"))


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of three stages with a checkpoint of every step; nobody may change it."""
    out = tmp_path_factory.mktemp("staged") / "run"
    assert run(recipe, out).finished
    return out


def parts(plan: Plan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for entry in plan.entries:
        if not entry.dead:
            found.setdefault(entry.part, set()).add(entry.name)
    return found


# ------------------------------------------------------------------------------------ what a stage keeps


def test_stages_begin_when_the_strategy_says_and_are_logged(whole: Path) -> None:
    logged = {e["train/stage"]: e["step"] for e in metrics(whole) if "train/stage" in e}
    assert logged == BEGAN


def test_optimiser_and_average_hold_exactly_what_the_stage_trains(recipe: Recipe, whole: Path) -> None:
    plan = build(recipe, CPU).plan
    for step in range(1, STEPS + 1):
        stage = sum(step > began for began in BEGAN.values()) - 1
        kinds = split(learned(whole, step))
        trained = set(plan.at(stage).trainable)
        for kind in ("weight", "ema", "ema.updates", "adamw.step", "adamw.exp_avg", "adamw.exp_avg_sq"):
            assert set(kinds[kind]) == trained, (step, kind)
        saved = Plan.from_json((whole / "checkpoints" / f"step_{step:06d}" / "plan.json").read_text())
        assert saved == plan.at(stage)


def test_states_of_what_goes_on_learning_stay_and_all_others_begin_anew(recipe: Recipe, whole: Path) -> None:
    members = parts(build(recipe, CPU).plan)
    kinds = split(learned(whole, STEPS))
    counts = {part: {kinds["adamw.step"][n].item() for n in names} for part, names in members.items()}
    assert counts["expert"] == {STEPS - 4}  # since the second stage
    assert counts["projections"] == {STEPS - 8}  # frozen in between
    assert counts["vision"] == counts["language"] == {STEPS - 8}
    for name, count in kinds["ema.updates"].items():
        assert count == kinds["adamw.step"][name]


def test_what_a_stage_freezes_is_its_average_and_bit_identical_from_there_on(
    recipe: Recipe, whole: Path
) -> None:
    probed = parts(build(recipe, CPU).plan)["projections"]
    start = dict(build(recipe, CPU).policy.named_parameters())
    exported = {step: split(learned(whole, step))["exported"] for step in (4, 5, 8, 9)}
    for name in probed:
        assert not exported[4][name].equal(start[name])
        assert exported[5][name].equal(exported[4][name]) and exported[8][name].equal(exported[4][name])
        assert not exported[9][name].equal(exported[4][name])
    for name in start.keys() - probed:
        assert exported[4][name].equal(start[name]), name


def test_a_change_gives_up_gradients_and_states_and_keeps_the_others_as_they_are(recipe: Recipe) -> None:
    experiment = build(recipe, CPU)
    learner = TrainState(experiment.policy, experiment.plan, recipe, CPU, Place(1, 4))
    expert = learner.trainable
    for parameter in expert:
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.step()
    states = {id(p): learner.optimizer.state[p]["exp_avg"] for p in expert}
    learner.change(Place(2, 8))
    assert {id(p) for p in expert} < {id(p) for p in learner.trainable}
    assert set(learner.optimizer.state) == set(expert)  # the new ones get theirs with their first step
    assert all(learner.optimizer.state[p]["exp_avg"] is states[id(p)] for p in expert)

    gone = [weakref.ref(state) for state in states.values()]
    del states
    learner.change(Place(0, 9))
    assert not learner.optimizer.state and all(ref() is None for ref in gone)
    assert all(p.grad is None and not p.requires_grad for p in expert)


def test_the_average_of_what_begins_to_learn_begins_with_its_present_value() -> None:
    model = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(0.0)
        model.bias.fill_(7.0)
    model.bias.requires_grad_(False)
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.update()
    average = float(ema.average["weight"])
    model.weight.requires_grad_(False)
    model.bias.requires_grad_(True)
    ema.follow(model)
    assert float(model.weight) == average and set(ema.average) == {"bias"}
    with torch.no_grad():
        model.bias.fill_(8.0)
    ema.update()
    assert float(ema.average["bias"]) == pytest.approx(2 / 11 * 7 + 9 / 11 * 8)  # as fast as a young one
    assert float(model.weight) == average


def test_a_stage_warms_up_all_that_learns_and_has_its_own_learning_rates(whole: Path) -> None:
    assert [rewarm(n, 3) for n in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rewarm(0, 0) == 1
    rates = {e["step"]: e["train/lr"] for e in metrics(whole) if "train/lr" in e}
    assert rates[9] == pytest.approx(
        1 / 3 * 0.5 * 1e-3, rel=0.8
    )  # a third of half the recipe's, less its cosine
    assert rates[9] < rates[10] and rates[9] < rates[8] / 2


def test_the_report_tells_the_stages_in_table_json_and_curves(whole: Path) -> None:
    facts = read_facts(whole)
    text = page(facts)
    for words in ("Stage 2: expert alone", "starts after step 4; started after step 4", "67% of the steps"):
        assert words in text, words
    assert text.count("> all<") + text.count(">all<") + text.count(" all</text>") >= 2  # in two loss curves
    told = facts.to_json()["tuning"]["stages"]
    assert [(one["name"], one["began"]) for one in told] == [("probe", 0), ("expert alone", 4), ("all", 8)]
    assert "train-stage" not in text  # a mark, no curve of its own


# ------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("step", variants([4, 6, 8], always=[6]))
def test_a_crash_in_a_stage_or_at_its_edge_costs_nothing_but_steps(
    recipe: Recipe, whole: Path, tmp_path: Path, step: int
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(recipe, out, callbacks=Until(step, crash))
    assert run(recipe, out, resume=True).finished
    assert_same(learned(out, STEPS), learned(whole, STEPS))
    assert without_times(out) == without_times(whole)
    assert json.loads((out / "run.json").read_text())["resumed_from"] == f"step_{step:06d}"


KILL = """
import os, signal, sys
from pathlib import Path
from vlafit import checkpoints, config
from vlafit.cli.train_view import TrainView
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.callbacks import Callbacks

class Kill(Callbacks):
    def stage(self, plan, began):
        os.kill(os.getpid(), signal.SIGKILL)

run(config.read(Recipe, Path(sys.argv[1]), "recipe"), Path(sys.argv[2]), callbacks=Kill())
"""


@pytest.mark.slow
def test_a_run_killed_while_it_changes_the_stage_and_resumed_equals_an_uninterrupted_one(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    (tmp_path / "recipe.toml").write_text(config.dump(recipe))
    command = [sys.executable, "-c", KILL, str(tmp_path / "recipe.toml"), str(out)]
    killed = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [e["train/stage"] for e in metrics(out) if "train/stage" in e] == [1, 2]
    run(recipe, out, resume=True)
    assert_same(learned(out, STEPS), learned(whole, STEPS))
    assert without_times(out) == without_times(whole)


@pytest.fixture(scope="module")
def plateau(card: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe whose stages end after plateaus, and its uninterrupted run."""
    folder = tmp_path_factory.mktemp("plateau")
    recipe = staged(card, folder, PLATEAU, validate_every=1, steps=8)
    assert run(recipe, folder / "run").finished
    return recipe, folder / "run"


def test_a_plateau_ends_a_stage(plateau: tuple[Recipe, Path]) -> None:
    _, out = plateau
    logged = {e["step"]: e["validation/loss"] for e in metrics(out) if "validation/loss" in e}
    assert len({logged[step] for step in (1, 2, 3)}) == len({logged[4], logged[5]}) == 1
    assert logged[8] < logged[5]
    assert {e["train/stage"]: e["step"] for e in metrics(out) if "train/stage" in e} == BEGAN_BY_PLATEAU


@pytest.mark.slow
def test_the_count_of_a_plateau_survives_an_interruption(
    plateau: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, whole = plateau
    state = json.loads((whole / "checkpoints/step_000002/training/state.json").read_text())["stage"]
    assert (state["number"], state["began"], state["stalled"]) == (0, 0, 1) and state["lowest"] > 0
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", callbacks=Until(2, crash))
    run(recipe, tmp_path / "run", resume=True)
    assert_same(learned(tmp_path / "run", 8), learned(whole, 8))
    assert without_times(tmp_path / "run") == without_times(whole)


def test_validation_may_not_change_on_resume_where_it_decides_about_stages(
    plateau: tuple[Recipe, Path], recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    def other(one: Recipe) -> Recipe:
        return replace(one, train=replace(one.train, validate_every=4))

    with pytest.raises(TrainingError, match=r"changed: train\.validate_every .*1.* 4"):
        run(other(plateau[0]), plateau[1], resume=True)
    shutil.copytree(whole, tmp_path / "run")
    assert run(other(recipe), tmp_path / "run", resume=True).finished


def test_a_training_state_from_before_there_were_stages_is_resumed(card: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from vlafit import files

    recipe = tiny(card, train={"steps": 4, "save_every": 2, "validate_every": 0})
    run(recipe, tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    shutil.rmtree(tmp_path / "old/checkpoints/step_000004")
    folder = tmp_path / "old/checkpoints/step_000002/training"
    tensors = load_file(folder / "state.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("ema.updates/")},
              folder / "state.safetensors")  # fmt: skip
    facts = json.loads((folder / "state.json").read_text())
    del facts["stage"], facts["facts_sha256"]
    facts |= {"format": 1, "ema_updates": 2, "sha256": files.sha256(folder / "state.safetensors")}
    (folder / "state.json").write_text(json.dumps(facts))
    run(recipe, tmp_path / "old", resume=True)
    assert_same(learned(tmp_path / "old", 4), learned(tmp_path / "new", 4))

    path = tmp_path / "new/checkpoints/step_000004/training/state.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(TrainingError, match="format 3; .*2 and 1"):
        run(recipe, tmp_path / "new", resume=True)


# ------------------------------------------------------------------------------------ when a stage begins


def begins(*moments: str) -> tuple[Stage, ...]:
    import tomllib

    text = "".join(
        f"[[stage]]\n{f'begin = {m}' if m else ''}\n[[stage.rule]]\nmode = 'full'\n" for m in ("", *moments)
    )
    return parse(tomllib.loads(text), name="s", where="s").stages


def test_the_stage_of_a_step_is_the_latest_whose_moment_has_come() -> None:
    stages = begins("{ step = 3 }", "{ fraction = 0.5 }")
    assert [due(stages, 10, step, Place()) for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert due(stages, 10, 2, Place(1)) == 1  # never back
    assert due(stages, 1000, 2, Place(), spent=0.4) == 0 and due(stages, 1000, 2, Place(), spent=0.5) == 2
    stages = begins("{ plateau = 2 }", "{ step = 6 }")
    stalled = Place(0, 0, 1.0, 2)
    assert due(stages, 10, 4, stalled) == 1
    assert due(stages, 10, 6, stalled) == 2  # both moments have come: the later stage wins
    assert due(stages, 10, 6, Place()) == 2  # the plateau never came: its stage is passed over
    assert due(begins("{ plateau = 1 }", "{ plateau = 1 }"), 10, 4, stalled) == 1  # counted since that began


def test_a_plateau_counts_validations_without_a_new_lowest_loss() -> None:
    place = Place(0, 0)
    for loss, stalled in ((3.0, 0), (2.0, 0), (2.0, 1), (2.5, 2), (1.0, 0), (float("nan"), 1)):
        place = place.validated(loss)
        assert place.stalled == stalled, loss
    assert place.lowest == 1.0


@pytest.mark.parametrize(
    ("moments", "changes", "message"),
    [
        (("{ step = 12 }",), {}, r"stage 2 begins at step 12, but the run only has 12"),
        (("{ fraction = 0.99 }",), {}, r"stage 2 begins at step 12 \(99% of .*the run only has 12"),
        (("{ fraction = 0.01 }",), {}, r"stage 2 begins at step 0 \(1% of .*\), .*stage 1 at step 0"),
        (("{ fraction = 0.5 }", "{ fraction = 0.52 }"), {}, r"stage 3 begins .*, .*stage 2 at step 6"),
        (("{ plateau = 1 }",), {"validate_every": 0}, r"train\.validate_every is 0; set it, or let it begin"),
        (("{ plateau = 1 }",), {"held_out": False}, r"no episodes are held out; raise data\.validation"),
        (("{ plateau = 2 }",), {}, r"step 12 at the earliest \(2 validations .*validate_every = 4\)"),
        (("{ plateau = 1 }", "{ step = 8 }"), {}, r"stage 3 begins at step 8, .*stage 2 at step 8"),
    ],
)  # fmt: skip
def test_a_stage_that_can_never_begin_is_refused(
    card: Path, tmp_path: Path, moments: tuple[str, ...], changes: dict[str, object], message: str
) -> None:
    stages = begins(*moments)
    plan = build(tiny(card), CPU).plan
    resolution = replace(plan.resolution, strategy=replace(plan.strategy, stages=stages))
    plan = Plan(resolution, plan.entries)
    lasts = TrainRecipe(steps=12, validate_every=int(changes.get("validate_every", 4)))  # type: ignore[call-overload]
    with pytest.raises(StrategyError, match=message):
        require_reachable(plan, lasts, held_out=bool(changes.get("held_out", True)))


def test_an_unreachable_stage_is_refused_before_anything_is_written(card: Path, tmp_path: Path) -> None:
    late = staged(card, tmp_path, STAGED.replace("0.67", "0.3"))
    with pytest.raises(StrategyError, match=r"stage 3 \(all\) .*stage 2 .*at step 4"):
        run(late, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_adalora_is_refused_on_sharded_weights(card: Path, tmp_path: Path) -> None:
    text = '[[rule]]\nselect = { part = "expert", kind = "mlp" }\nmode = "adalora"\n[[rule]]\nmode = "frozen"'
    sharded = staged(card, tmp_path, text, sharding="full")
    with pytest.raises(StrategyError, match=r"AdaLoRA .*train\.sharding = 'none'"):
        run(sharded, tmp_path / "run")


@pytest.mark.slow
def test_a_stage_whose_plateau_does_not_come_in_time_is_passed_over_and_told(
    card: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = STAGED.replace("{ step = 4 }", "{ plateau = 5 }").replace("{ fraction = 0.67 }", "{ step = 7 }")
    run(staged(card, tmp_path, text, steps=8, validate_every=1), tmp_path / "run")
    assert [e["train/stage"] for e in metrics(tmp_path / "run") if "train/stage" in e] == [1, 3]
    assert "step 7: stage 2 of 3, expert alone is skipped" in caplog.text


def test_the_command_line_shows_the_table_of_the_stage_that_begins(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TrainView(tmp_path).stage(build(recipe, CPU).plan.at(1), 4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["from step 4 on:", "stage 2 of 3, expert alone"]
    assert any(line.split()[:2] == ["expert", "full"] for line in lines)


# ------------------------------------------------------------------------------------ AdaLoRA in a stage

ADALORA = """
[[stage]]
[[stage.rule]]
select = { part = "projections" }
mode = "full"
[[stage.rule]]
mode = "frozen"

[[stage]]
begin = { step = 2 }
[[stage.rule]]
select = { part = "expert", kind = ["attention", "mlp"] }
mode = "adalora"
rank = 4
target_rank = 1
[[stage.rule]]
mode = "frozen"
"""


def test_the_ranks_of_adalora_fall_in_its_stage_and_its_scores_are_restored(
    card: Path, tmp_path: Path
) -> None:
    recipe = staged(card, tmp_path, ADALORA)
    experiment = build(recipe, CPU)
    learner = TrainState(experiment.policy, experiment.plan, recipe, CPU, Place())
    assert learner.ranks is not None and not learner.ranks.ranks()
    learner.change(Place(1, 2))
    batches = dataloader.training_batches(experiment, first_step=2, rank=0, world=1)
    done: list[int] = []

    def after(result: StepResult) -> bool:
        done.append(result.step)
        return result.step < STEPS - 1

    train(learner, batches, first_step=2, recipe=recipe.train, optim=recipe.optim, world=1,
          wants_stop=lambda: False, spent=lambda: 0.0, after_step=after)  # fmt: skip
    assert done == list(range(3, STEPS))
    ranks = learner.ranks.ranks()
    assert ranks and sum(ranks.values()) == len(ranks)  # a mean of 1, from 4

    tensors = {k: v.clone() for k, v in checkpointer.collect(learner, keep=True).items()}
    assert any(key.startswith("ranks/") for key in tensors)
    other = build(recipe, CPU)
    fresh = TrainState(other.policy, other.plan, recipe, CPU, Place(1, 2))
    progress = checkpointer.Progress(11, stage=Place(1, 2))
    checkpointer.restore(checkpointer.Saved(tmp_path, progress, dict(tensors)), fresh)
    assert_same(checkpointer.collect(fresh, keep=True), checkpointer.collect(learner, keep=True))
    train(learner, batches, first_step=11, recipe=recipe.train, optim=recipe.optim, world=1,
          wants_stop=lambda: False, spent=lambda: 0.0, after_step=lambda _: True)  # fmt: skip
    again = dataloader.training_batches(other, first_step=11, rank=0, world=1)
    train(fresh, again, first_step=11, recipe=recipe.train, optim=recipe.optim, world=1,
          wants_stop=lambda: False, spent=lambda: 0.0, after_step=lambda _: True)  # fmt: skip
    assert_same(checkpointer.collect(fresh, keep=True), checkpointer.collect(learner, keep=True))


GROWING = """
[[stage]]
[[stage.rule]]
select = { part = "expert", kind = ["attention", "mlp"] }
mode = "adalora"
rank = 4
target_rank = 1
[[stage.rule]]
select = { part = "projections" }
mode = "full"
[[stage.rule]]
mode = "frozen"

[[stage]]
begin = { fraction = 0.5 }
[[stage.rule]]
select = { part = ["expert", "language"], kind = ["attention", "mlp"] }
mode = "adalora"
rank = 4
target_rank = 1
[[stage.rule]]
mode = "frozen"

[[stage]]
begin = { fraction = 0.9 }
[[stage.rule]]
select = { part = "language", kind = ["attention", "mlp"] }
mode = "adalora"
rank = 4
target_rank = 1
[[stage.rule]]
mode = "frozen"
"""


@pytest.fixture(scope="module")
def growing(card: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """AdaLoRA on the expert, then on the language model too, then on that alone; and its run of 20 steps."""
    folder = tmp_path_factory.mktemp("growing")
    recipe = staged(card, folder, GROWING, steps=20, validate_every=0, save_every=1)
    assert run(recipe, folder / "run").finished
    return recipe, folder / "run"


def values_left(out: Path, step: int) -> dict[str, dict[str, int]]:
    """How many singular values are not zero in what is exported after a step: part -> layer -> how many."""
    found: dict[str, dict[str, int]] = {"expert": {}, "language": {}}
    for name, tensor in checkpoints.load_policy(out / "checkpoints" / f"step_{step:06d}").named_parameters():
        if ".lora_E." in name:
            found[name.split(".")[0]][name] = int((tensor != 0).sum())
    return found


@pytest.mark.slow
def test_ranks_fall_in_the_layers_that_learn_and_never_rise_through_a_change_of_stage(
    growing: tuple[Recipe, Path],
) -> None:
    _, out = growing
    logged = {e["step"]: e for e in metrics(out) if "train/rank/mean" in e}
    means = [logged[step]["train/rank/mean"] for step in range(1, 11)]
    assert means[0] == 4 and means == sorted(means, reverse=True) and means[-1] < 4  # the expert alone
    assert logged[11]["train/rank/mean"] == pytest.approx((means[-1] + 4) / 2, abs=0.5)  # the others begin
    assert logged[20]["train/rank/mean"] == pytest.approx(1, abs=0.01)
    assert logged[20]["train/rank/max"] <= 4 and logged[20]["train/rank/min"] >= 0
    left = {step: values_left(out, step) for step in (18, 19, 20)}
    assert left[19]["expert"] == left[20]["expert"] == left[18]["expert"]  # frozen: as it was pruned
    for part in ("expert", "language"):
        assert sum(left[20][part].values()) == len(left[20][part])  # exported is the average: pruned, too
    facts = read_facts(out)
    told = {f"{layer}.lora_E.adalora": rank for layer, rank in facts.run["ranks"].items()}
    assert told == left[20]["expert"] | left[20]["language"]
    assert "Ranks of AdaLoRA" in page(facts) and "Final AdaLoRA rank of each layer" in page(facts)


@pytest.mark.slow
@pytest.mark.parametrize("step", variants([7, 10, 19], always=[10]))
def test_ranks_of_a_resumed_run_are_those_of_an_uninterrupted_one(
    growing: tuple[Recipe, Path], tmp_path: Path, step: int
) -> None:
    recipe, whole = growing
    shutil.copytree(whole, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    run(recipe, tmp_path / "run", resume=True)
    assert_same(learned(tmp_path / "run", 20), learned(whole, 20))
    assert without_times(tmp_path / "run") == without_times(whole)
