"""Runs with adapters: saved on what they began from, resumed bit for bit, merged, gone on from."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vlafit
from tests.train.test_interruptions import Interrupted, Until, crash
from tests.train.world import assert_same, losses, tiny
from tests.variants import variants
from vlafit import checkpoints, report
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.train import Callbacks, run
from vlafit.train.experiment import Experiment
from vlafit.tuning.quantise import is_rounded_from

RULES = """
[[rule]]
select = {{ part = "projections" }}
mode = "full"

[[rule]]
select = {{ part = ["vision", "language", "expert"], kind = ["attention", "mlp"] }}
{adapter}

[[rule]]
mode = "frozen"
"""
ADAPTERS = {
    "lora": 'mode = "lora"\nrank = 4',
    "pissa": 'mode = "lora"\nrank = 4\ninit = "pissa"',
    "dora": 'mode = "dora"\nrank = 4',
    "adalora": 'mode = "adalora"\nrank = 4\ntarget_rank = 2',
    "qlora": 'mode = "lora"\nrank = 4\nquantise = "nf4"',
    "int8": 'mode = "lora"\nrank = 4\nquantise = "int8"',
}


UNADAPTED = """
[[rule]]
select = {{ part = ["vision", "language"], kind = ["attention", "mlp"] }}
mode = "frozen"
quantise = "{how}"

[[rule]]
mode = "full"
"""


def recipe_on(base: Path, card: Path, adapter: str, **sections) -> Recipe:
    path = base.parent / f"{adapter}.toml"
    path.write_text(RULES.format(adapter=ADAPTERS[adapter]))
    return replace(tiny(card, strategy=str(path), **sections), policy=PolicyRecipe(checkpoint=str(base)))


def everything(out: Path, step: int) -> dict[str, Tensor]:
    """All tensors in a checkpoint's files."""
    folder = out / "checkpoints" / f"step_{step:06d}"
    return {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


SLOW = ("qlora", "pissa", "int8", "dora", "adalora")  # the others save and resume by the same code


@pytest.mark.parametrize(
    "adapter", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ADAPTERS]
)
def test_a_run_with_adapters_is_saved_on_its_base_and_goes_on_bit_for_bit(
    adapter: str, base: Path, card: Path, tmp_path: Path
):
    recipe = recipe_on(base, card, adapter)
    run(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "pieces", callbacks=Until(5, crash))
    run(recipe, tmp_path / "pieces", resume=True)
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    assert_same(everything(tmp_path / "pieces", 8), everything(tmp_path / "whole", 8))
    folder = tmp_path / "whole" / "checkpoints" / "step_000008"
    assert not (folder / "model.safetensors").exists()
    assert json.loads((folder / "base.json").read_text())["sha256"] == checkpoints.digest(base)
    loaded = checkpoints.load(folder)
    frozen = {n.replace(".base_layer", ""): p for n, p in loaded.policy.named_parameters()}
    was = checkpoints.load_policy(base)
    learned = {e.name for e in loaded.plan.entries if e.trainable}
    if adapter in ("lora", "dora", "adalora"):  # PiSSA and rounding change what lies below
        assert all(torch.equal(frozen[n], p) for n, p in was.named_parameters() if n not in learned)
    facts = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert 0 <= facts["merge_error"] < 1e-4
    assert report.read_facts(tmp_path / "whole").plan == loaded.plan


@pytest.mark.slow
def test_from_fresh_weights_a_run_with_adapters_holds_them_all(card: Path, base: Path, tmp_path: Path):
    recipe = replace(recipe_on(base, card, "lora"), policy=tiny(card).policy)
    run(recipe, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_000008"
    assert (folder / "model.safetensors").exists() and not (folder / "base.json").exists()
    checkpoints.load(folder)


@pytest.mark.slow
def test_a_run_from_an_adapted_checkpoint_merges_it_first_and_says_so(base: Path, card: Path, tmp_path: Path):
    run(recipe_on(base, card, "lora"), tmp_path / "first")
    last = tmp_path / "first" / "checkpoints" / "step_000008"
    again = recipe_on(base, card, "dora", train={"steps": 2})
    run(replace(again, policy=PolicyRecipe(checkpoint=str(last))), tmp_path / "second")
    assert "were merged" in json.loads((tmp_path / "second" / "run.json").read_text())["notices"][0]
    folder = tmp_path / "second" / "checkpoints" / "step_000002"
    assert (folder / "model.safetensors").exists()
    checkpoints.load(folder)


def test_parts_that_start_fresh_are_kept_with_the_adapters(base: Path, card: Path, tmp_path: Path):
    recipe = recipe_on(base, card, "lora", train={"steps": 2})
    fresh = replace(recipe.policy, fresh=("projector",))
    run(replace(recipe, policy=fresh), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_000002"
    assert {n for n in load_file(folder / "trained.safetensors") if n.startswith("projector")} == {
        "projector.weight",
        "projector.bias",
    }
    policy, was = checkpoints.load_policy(folder), checkpoints.load_policy(base)
    assert not torch.equal(policy.projector.weight, was.projector.weight)


@pytest.mark.parametrize(
    ("adapter", "begins"),
    [
        pytest.param("int8", "fresh", marks=pytest.mark.slow),
        pytest.param("qlora", "merged", marks=pytest.mark.slow),
        pytest.param("qlora", "fresh part", marks=pytest.mark.slow),
        pytest.param("int8", "unadapted", marks=pytest.mark.slow),
        ("qlora", "unadapted"),
    ],
)
def test_a_quantised_run_keeps_what_it_began_from_where_that_lies_in_no_file(
    adapter: str, begins: str, base: Path, card: Path, tmp_path: Path
):
    recipe = recipe_on(base, card, adapter, train={"steps": 3, "save_every": 1})
    if begins == "fresh":
        recipe = replace(recipe, policy=tiny(card).policy)
    elif begins == "fresh part":
        recipe = replace(recipe, policy=replace(recipe.policy, fresh=("expert",)))
    elif begins == "merged":
        run(recipe_on(base, card, "lora", train={"steps": 1}), tmp_path / "first")
        last = tmp_path / "first" / "checkpoints" / "step_000001"
        recipe = replace(recipe, policy=PolicyRecipe(checkpoint=str(last)))
    else:  # a frozen quantised part, no adapter, and the rest trained in full; from a checkpoint
        rules = UNADAPTED.format(how="nf4" if adapter == "qlora" else adapter)
        (tmp_path / "rules.toml").write_text(rules)
        recipe = replace(recipe, strategy=str(tmp_path / "rules.toml"))
    run(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "pieces", callbacks=Until(2, crash))
    run(recipe, tmp_path / "pieces", resume=True)
    assert_same(everything(tmp_path / "pieces", 3), everything(tmp_path / "whole", 3))

    (tmp_path / "whole").rename(tmp_path / "moved")
    folder = tmp_path / "moved" / "checkpoints" / "step_000003"
    loaded = checkpoints.load(folder)
    own = tmp_path / "moved" / "base"
    assert own.is_dir() == (begins != "unadapted") and not (folder / "model.safetensors").exists()
    facts = json.loads((tmp_path / "moved" / "run.json").read_text())
    assert any("saved in base/" in notice for notice in facts["notices"]) == own.is_dir()
    if own.is_dir():
        start, said = checkpoints.load_policy(own), json.loads((folder / "base.json").read_text())
        assert said["checkpoint"] == "../../base"
        held = loaded.policy.get_submodule("expert.layers.0.mlp.up_proj").get_base_layer()
        assert is_rounded_from(held, start.expert.layers[0].mlp.up_proj.weight)
        assert 0 <= facts["merge_error"] < 1e-3
    assert all(torch.isfinite(p).all() for p in vlafit.merge(loaded.policy).parameters())


@pytest.mark.slow
def test_the_ranks_of_adalora_fall_by_the_time_where_that_ends_the_run(
    base: Path, card: Path, tmp_path: Path
):
    limit = {"steps": 1_000_000, "max_seconds": 1.0, "validate_every": 0, "save_every": 0}
    summary = run(recipe_on(base, card, "adalora", train=limit), tmp_path / "run")
    assert summary.finished and summary.steps < 1_000_000
    ranks = json.loads((tmp_path / "run" / "run.json").read_text())["ranks"]
    assert sum(ranks.values()) == 2 * len(ranks)
    policy = checkpoints.load_policy(tmp_path / "run" / "checkpoints" / f"step_{summary.steps:06d}")
    left = [int((p != 0).sum()) for n, p in policy.named_parameters() if ".lora_E." in n]
    assert sum(left) == 2 * len(left)  # of the average, which is exported


@pytest.mark.slow
def test_dropout_of_adapters_draws_the_same_again_and_after_an_interruption(
    base: Path, card: Path, tmp_path: Path
):
    path = tmp_path / "dropout.toml"
    path.write_text(RULES.format(adapter='mode = "lora"\nrank = 4\ndropout = 0.3'))
    start = PolicyRecipe(checkpoint=str(base))
    recipe = replace(tiny(card, strategy=str(path), train={"steps": 6, "save_every": 3}), policy=start)
    for name in ("one", "other"):
        run(recipe, tmp_path / name)
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "cut", callbacks=Until(4, crash))
    run(recipe, tmp_path / "cut", resume=True)
    for name in ("other", "cut"):
        assert_same(everything(tmp_path / name, 6), everything(tmp_path / "one", 6))


@pytest.mark.parametrize("precision", variants(["fp32", "bf16"], always=["bf16"]))
@pytest.mark.parametrize("strategy", variants(["lora", "qlora"], always=["lora"]))
def test_the_merge_is_measured_when_the_trained_policy_is_no_longer_in_memory(
    base: Path, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, precision: str
):
    """A second whole policy beside the first would not fit the card that the run was chosen for."""
    running = importlib.import_module("vlafit.train.run")  # the package's name `run` is the function
    built: list[Experiment] = []
    held: list[int] = []
    dtypes: set[torch.dtype] = set()
    real, load = running.merge_error, checkpoints.load_all

    def measured(*values: Any, **options: Any) -> float:
        held.append(sum(p.nbytes for p in built[0].policy.parameters() if type(p.data) is Tensor))
        return real(*values, **options)

    def loaded(*values: Any, **options: Any) -> Any:
        made = load(*values, **options)
        parameters = made.policy.named_parameters()
        dtypes.update(p.dtype for name, p in parameters if name.endswith("q_proj.base_layer.weight"))
        return made

    class Setup(Callbacks):
        def setup(self, experiment: Experiment) -> None:
            built.append(experiment)

    recipe = tiny(
        card, strategy=strategy, train={"steps": 2, "precision": precision, "save_every": 0},
        policy={"checkpoint": str(base), "family": "", "size": "", "config": {}},
    )  # fmt: skip
    monkeypatch.setattr(running, "merge_error", measured)
    monkeypatch.setattr("vlafit.train.initial_policy.checkpoints.load_all", loaded)
    assert run(recipe, tmp_path / "run", callbacks=Setup()).finished
    assert held == [0]
    assert 0 <= json.loads((tmp_path / "run" / "run.json").read_text())["merge_error"] < 0.2
    if strategy == "lora":
        assert torch.bfloat16 in dtypes if precision == "bf16" else dtypes == {torch.float32}
