"""Frozen weights in bfloat16 under bf16 products: which, that they stay, and what becomes of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_interruptions import Interrupted, Until, crash
from tests.train.world import assert_same, learned, losses, tiny
from vlafit import actor, checkpoints
from vlafit.checkpoints import stored_as
from vlafit.errors import ConfigError, WeightsError
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.train import run
from vlafit.train.experiment import build
from vlafit.tuning.inject import base_name

CPU = torch.device("cpu")
PISSA = """
[[rule]]
select = { part = ["language", "expert"], kind = ["attention", "mlp"] }
mode = "lora"
rank = 4
init = "pissa"

[[rule]]
mode = "frozen"
"""


def in_bf16(card: Path, base: Path, strategy: str, **train: object) -> Recipe:
    short = {"precision": "bf16", "frozen": "bf16", "steps": 4, "save_every": 2, "validate_every": 0}
    recipe = tiny(card, strategy=strategy, train=short | train, optim={"ema": 0.0})
    return replace(recipe, policy=PolicyRecipe(checkpoint=str(base)))


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pissa = tmp_path_factory.mktemp("strategy") / "pissa.toml"
    pissa.write_text(PISSA)
    return {"expert": "expert", "lora": "lora", "pissa": str(pissa)}


@pytest.mark.parametrize("name", ["expert", "lora"])
def test_only_what_no_stage_trains_is_kept_in_bf16(
    name: str, card: Path, base: Path, strategies: dict[str, str]
) -> None:
    made = build(in_bf16(card, base, strategies[name], steps=40), CPU)
    plan, infos = made.plan, {info.name: info for info in _bare(base).parts()}
    trained = {e.name for n in range(len(plan.strategy.stages)) for e in plan.at(n).entries if e.trainable}
    dtypes = {base_name(n): p.dtype for n, p in made.policy.named_parameters()}
    for tensor, dtype in dtypes.items():
        frozen = tensor in infos and tensor not in trained
        wanted = stored_as(infos[tensor], torch.bfloat16) if frozen else torch.float32
        assert dtype is wanted, tensor
    assert made.agreement is not None
    line = next((item for item in made.agreement.items if item.name == "frozen weights"), None)
    rounded = [n for n, dtype in dtypes.items() if dtype is torch.bfloat16]
    assert line is not None and line.value == "bfloat16" and line.status == "chosen"
    assert f"{len(rounded)} tensors" in line.sides["checkpoint"]


def _bare(base: Path):
    return checkpoints.load_policy(base)


def test_what_the_file_holds_in_bf16_stays_so_and_needs_no_line(
    card: Path, base: Path, tmp_path: Path
) -> None:
    loaded = checkpoints.load(base, dtype="bfloat16")
    checkpoints.save(loaded.policy, tmp_path / "narrow", loaded.codec)
    made = build(in_bf16(card, tmp_path / "narrow", "expert"), CPU)
    assert made.agreement is not None
    assert not [item for item in made.agreement.items if item.name == "frozen weights"]
    stored = load_file(tmp_path / "narrow" / "model.safetensors")
    frozen = {n: p for n, p in made.policy.named_parameters() if p.dtype is torch.bfloat16}
    assert frozen and all(torch.equal(p, stored[n]) for n, p in frozen.items())


def test_frozen_weights_can_stay_fp32(card: Path, base: Path) -> None:
    made = build(in_bf16(card, base, "lora", frozen="fp32"), CPU)
    assert {p.dtype for p in made.policy.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_such_a_run_goes_on_bit_for_bit_and_learns_what_fp32_does(
    name: str, card: Path, base: Path, strategies: dict[str, str], tmp_path: Path
) -> None:
    recipe = in_bf16(card, base, strategies[name])
    run(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "pieces", callbacks=Until(3, crash))
    run(recipe, tmp_path / "pieces", resume=True)
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    assert_same(learned(tmp_path / "pieces", 4), learned(tmp_path / "whole", 4))
    wide = replace(recipe, train=replace(recipe.train, precision="fp32", frozen="fp32"))
    run(wide, tmp_path / "fp32")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "fp32"), rel=0.05)
    facts = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert facts["merge_error"] < 1e-4
    merged = checkpoints.load_policy(tmp_path / "whole" / "checkpoints" / "step_000004")
    frozen = "vision.layers.0.mlp.fc1.bias"  # merging starts from the base's own float32
    assert torch.equal(merged.get_parameter(frozen), _bare(base).get_parameter(frozen))
    trained = load_file(tmp_path / "whole" / "checkpoints" / "step_000004" / "training" / "state.safetensors")
    assert {t.dtype for n, t in trained.items()} == {torch.float32}


def test_fp32_products_do_not_read_bf16_weights(card: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.frozen = \"bf16\" needs train\.precision"):
        run(in_bf16(card, base, "lora", precision="fp32"), tmp_path / "run")


def test_an_actor_in_bf16_of_width_1_acts_almost_as_the_wide_one(base: Path) -> None:
    wide, narrow = actor.load_actor(base), actor.load_actor(base, dtype="bfloat16", width=1)
    assert "dtype=bfloat16" in narrow.fingerprint() and "width=1 " in narrow.fingerprint()
    assert "dtype" not in wide.fingerprint()
    dtypes = {p.dtype for p in narrow.policy.parameters()}
    assert dtypes == {torch.float32, torch.bfloat16}
    with pytest.raises(WeightsError, match=r"float64"):
        actor.load_actor(base, dtype="float64")
