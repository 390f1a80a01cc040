"""A run's checkpoints hold what it trained, on a verified base; every verb opens them, or says what to do."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_interruptions import Interrupted, Until, crash
from tests.train.world import assert_same, learned, losses, tiny
from tests.variants import variants
from vlafit import actor, checkpoints
from vlafit.checkpoints.export import export
from vlafit.errors import WeightsError
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.train import run
from vlafit.train.saved_weights import choose
from vlafit.tuning import load_strategy, preview

STAGES = """
[[stage]]
[[stage.rule]]
select = { part = ["expert", "projections"] }
mode = "full"
[[stage.rule]]
mode = "frozen"

[[stage]]
begin = { step = 2 }
[[stage.rule]]
select = { part = "expert", kind = "mlp" }
mode = "full"
[[stage.rule]]
mode = "frozen"
"""


@pytest.fixture(scope="module")
def standing(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that belongs to no run; nobody may change it."""
    folder = tmp_path_factory.mktemp("standing") / "pretrained"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("training"))
    return folder


@pytest.fixture(scope="module")
def recipe_on(card: Path, standing: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run in bf16 of two stages: what the first trains is frozen in the second, beside the MLPs."""
    strategy = tmp_path_factory.mktemp("strategy") / "stages.toml"
    strategy.write_text(STAGES)
    short = {
        "precision": "bf16",
        "frozen": "bf16",
        "steps": 4,
        "save_every": 1,
        "validate_every": 0,
        "keep": 4,
    }
    recipe = tiny(card, train=short)
    return replace(recipe, strategy=str(strategy), policy=PolicyRecipe(checkpoint=str(standing)))


@pytest.fixture(scope="module")
def light(recipe_on: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, finished; nobody may change it."""
    out = tmp_path_factory.mktemp("light") / "run"
    run(recipe_on, out)
    return out


def last(out: Path) -> Path:
    return out / "checkpoints" / "step_000004"


def test_a_checkpoint_holds_what_was_trained_on_its_base(light: Path, standing: Path) -> None:
    loaded = checkpoints.load(last(light))
    assert loaded.plan is not None
    stages = [loaded.plan.at(number) for number in range(2)]
    trained = {name for stage in stages for name in stage.trainable}
    stored = load_file(last(light) / "trained.safetensors")
    assert set(stored) == trained and not (last(light) / "model.safetensors").exists()
    base = checkpoints.read_base(last(light))
    assert base is not None
    assert (base.checkpoint, base.sha256) == (str(standing), checkpoints.digest(standing))
    before = checkpoints.load_policy(standing)
    for name, parameter in loaded.policy.named_parameters():
        # The base's own float32, although training computed with it in bfloat16.
        assert torch.equal(parameter, before.get_parameter(name)) is (name not in trained), name
    assert f"on {standing}" in str(loaded.report.notes)


def test_masters_in_fp32_are_only_in_the_training_state(light: Path) -> None:
    state = load_file(last(light) / "training" / "state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    stored = load_file(last(light) / "trained.safetensors")
    averages = {name.removeprefix("ema/"): t for name, t in state.items() if name.startswith("ema/")}
    assert averages and all(stored[n].dtype is torch.bfloat16 for n in averages)
    assert all(torch.equal(stored[n], average.bfloat16()) for n, average in averages.items())
    frozen_since = {name: t for name, t in stored.items() if name not in averages}
    assert frozen_since and {t.dtype for t in frozen_since.values()} == {torch.float32}  # has no other master


@pytest.mark.parametrize("step", variants([2, 3], always=[2]))
def test_a_run_goes_on_from_it_bit_for_bit(step: int, recipe_on: Recipe, light: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(recipe_on, tmp_path / "run", callbacks=Until(step, crash))
    run(recipe_on, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(light)
    assert_same(learned(tmp_path / "run", 4), learned(light, 4))


def test_actors_and_exports_take_it_and_an_export_is_whole(
    light: Path, standing: Path, tmp_path: Path
) -> None:
    acting = actor.load_actor(last(light))
    made = export(last(light), "vlafit", tmp_path / "out")
    assert "bfloat16" in made.text() and any("--dtype float32" in note for note in made.notes)
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert set(whole) == {name for name, _ in acting.policy.named_parameters()}
    assert torch.bfloat16 in {tensor.dtype for tensor in whole.values()}
    assert checkpoints.read_base(tmp_path / "out") is None
    export(last(light), "vlafit", tmp_path / "wide", dtype="float32")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(torch.equal(wide[name], p) for name, p in acting.policy.named_parameters())
    export(standing, "vlafit", tmp_path / "fp32")  # its run computed in fp32
    assert {t.dtype for t in load_file(tmp_path / "fp32" / "model.safetensors").values()} == {torch.float32}


def test_a_run_from_it_sits_on_the_same_base_and_holds_what_both_trained(
    light: Path, standing: Path, recipe_on: Recipe, tmp_path: Path
) -> None:
    fp32 = replace(recipe_on.train, precision="fp32", frozen="fp32")
    policy = PolicyRecipe(checkpoint=str(light))
    run(replace(recipe_on, strategy="projections", policy=policy, train=fp32), tmp_path / "second")
    base = checkpoints.read_base(last(tmp_path / "second"))
    assert base is not None and base.checkpoint == str(standing)
    first = load_file(last(light) / "trained.safetensors")
    assert set(load_file(last(tmp_path / "second") / "trained.safetensors")) == set(first)
    after, before = (checkpoints.load_policy(last(out)) for out in (tmp_path / "second", light))
    for name, parameter in before.named_parameters():
        kept = not name.startswith(("state_", "action_"))
        assert torch.equal(parameter, after.get_parameter(name)) is kept, name


def test_a_base_that_moved_is_named_by_an_option_and_a_changed_one_is_refused(
    light: Path, standing: Path, recipe_on: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(light, tmp_path / "run")
    shutil.copytree(standing, tmp_path / "moved")
    lost = str(tmp_path / "lost")
    for path in (tmp_path / "run" / "checkpoints").glob("step_*"):
        _point_base_at(path, lost)
    with pytest.raises(WeightsError, match=r"(?s)lost.*is not there.*--base PATH.*--policy\.base PATH"):
        run(recipe_on, tmp_path / "run", resume=True)
    assert checkpoints.load(last(tmp_path / "run"), base=tmp_path / "moved").plan is not None
    longer = replace(recipe_on, train=replace(recipe_on.train, steps=5))
    policy = replace(recipe_on.policy, base=str(tmp_path / "moved"))
    run(replace(longer, policy=policy), tmp_path / "run", resume=True)
    newest = checkpoints.read_base(tmp_path / "run" / "checkpoints" / "step_000005")
    assert newest is not None and newest.checkpoint == str(tmp_path / "moved")
    with pytest.raises(WeightsError, match=rf"(?s)SHA-256 is .*{newest.sha256}.*--base PATH"):
        checkpoints.load(last(tmp_path / "run"), base=tmp_path / "run" / "checkpoints" / "step_000005")


def _point_base_at(folder: Path, place: str) -> None:
    """Rewrite where the base lies, and its hash in the manifest."""
    from vlafit import files

    base = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps({**base, "checkpoint": place}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["base.json"] = files.sha256(folder / "base.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_on_another_runs_checkpoint_every_weight_is_saved_unless_wanted_otherwise(
    base: Path, recipe_on: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = replace(recipe_on.train, steps=1)
    recipe = replace(recipe_on, strategy="expert", policy=PolicyRecipe(checkpoint=str(base)), train=short)
    with caplog.at_level(logging.INFO):
        run(recipe, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_000001"
    assert (folder / "model.safetensors").is_file() and not (folder / "base.json").exists()
    said = "\n".join(caplog.messages)
    for fact in (
        str(base),
        "may be pruned or deleted",
        "--train.checkpoints trained",
        "step_000001: weights",
    ):
        assert fact in said
    assert 'checkpoints = "whole"' in (tmp_path / "run" / "recipe.toml").read_text()


def test_the_choice_follows_what_is_frozen_and_where_the_base_lies(base: Path, standing: Path) -> None:
    policy = checkpoints.inspect(standing).policy
    plans = {name: preview(policy, load_strategy(name)) for name in ("full", "expert")}
    there, in_a_run = (checkpoints.Base(str(path), "abc") for path in (standing, base))
    cases = [
        ("auto", "expert", there, "trained"),
        ("auto", "full", there, "whole"),
        ("auto", "expert", in_a_run, "whole"),
        ("trained", "expert", in_a_run, "trained"),
        ("whole", "expert", there, "whole"),
        ("auto", "expert", None, "whole"),
    ]
    for wanted, strategy, below, how in cases:
        made = choose(wanted, plans[strategy], below, ())  # type: ignore[arg-type]
        assert (made.how, made.base) == (how, below if how == "trained" else None), (wanted, strategy)
    assert "no effect" in choose("trained", plans["expert"], None, ()).sentence
