"""Checkpoints of adapted policies: what learned is kept, the base is the one it was, nothing else passes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from tests.tuning.world import METHODS, QUANTISED, make_policy, rules, train, velocity
from vlafit import checkpoints, files
from vlafit.errors import WeightsError
from vlafit.tuning import apply_strategy
from vlafit.tuning.inject import adapter_tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    vlafit.save_checkpoint(make_policy(), folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "on its base"])
def test_an_adapted_policy_comes_back_bit_for_bit_and_merges_alike(
    name: str, whole: bool, base: Path, tmp_path: Path
):
    policy = vlafit.load_policy(base)
    plan = vlafit.apply_strategy(policy, rules(name))
    train(policy)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=None if whole else base)
    assert (tmp_path / "c" / "model.safetensors").exists() == whole
    loaded, _, again, report = vlafit.load_checkpoint(tmp_path / "c")
    assert again == plan and any("adapter" in note for note in report.notes)
    own, theirs = dict(policy.named_parameters()), dict(loaded.named_parameters())
    assert own.keys() == theirs.keys() and all(torch.equal(own[n], theirs[n]) for n in own)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in policy.named_parameters() if p.requires_grad
    }
    before = velocity(policy)
    assert torch.equal(velocity(loaded), before)
    assert (velocity(vlafit.merge(loaded)) - before).abs().max() < 1e-5
    vlafit.save_checkpoint(loaded, tmp_path / "merged")
    assert torch.equal(velocity(vlafit.load_policy(tmp_path / "merged")), velocity(loaded))


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_policy_is_saved_on_its_base_alone(name: str, base: Path, tmp_path: Path):
    policy = vlafit.load_policy(base)
    plan = apply_strategy(policy, rules(name))
    train(policy)
    with pytest.raises(WeightsError, match=r"quantised, and would be lost; name the checkpoint .* as `base`"):
        vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=base)
    loaded = vlafit.load_policy(tmp_path / "c")
    assert torch.equal(velocity(loaded), velocity(policy))


def test_on_its_base_a_checkpoint_holds_only_what_learned(base: Path, tmp_path: Path):
    policy = vlafit.load_policy(base)
    plan = apply_strategy(policy, rules("lora"))
    train(policy)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=base)
    learned = {e.name for e in plan.entries if e.trainable and not e.adapts}
    assert set(load_file(tmp_path / "c" / "trained.safetensors")) == learned
    stored = load_file(tmp_path / "c" / "adapters" / "lora" / "adapter_model.safetensors")
    assert len(stored) == len(adapter_tensors(policy))
    config = json.loads((tmp_path / "c" / "adapters" / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["revision"] == f"sha256:{checkpoints.digest(base)}"


def test_a_base_that_moved_is_found_by_its_new_place_and_another_one_is_refused(base: Path, tmp_path: Path):
    shutil.copytree(base, tmp_path / "base")
    policy = vlafit.load_policy(tmp_path / "base")
    plan = apply_strategy(policy, rules("lora"))
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(WeightsError, match="which is not there; say where it is: base="):
        vlafit.load_policy(tmp_path / "c")
    loaded = vlafit.load_checkpoint(tmp_path / "c", base=tmp_path / "moved").policy
    assert torch.equal(velocity(loaded), velocity(policy))
    other = make_policy()
    train(other)
    vlafit.save_checkpoint(other, tmp_path / "base")
    with pytest.raises(WeightsError, match="trained on another checkpoint"):
        vlafit.load_policy(tmp_path / "c")
    with pytest.raises(WeightsError, match="is for adapters on a checkpoint, and these are none"):
        vlafit.load_checkpoint(base, base=base)


def _rewrite(folder: Path, name: str, change) -> None:
    """Change a file of a checkpoint and its hash with it, as a careless program would."""
    path = folder / name
    change(path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = files.sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _tensors(change):
    def apply(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


FIRST = "base_model.model.vision.patch_embedding.lora_A.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "adapter_model.safetensors",
            _tensors(lambda t: t.pop(FIRST)),
            "missing lora: .*patch_embedding.lora_A",
        ),
        ("adapter_model.safetensors", _tensors(lambda t: t.update(more=torch.ones(1))), "surplus lora: more"),
        ("adapter_model.safetensors", _tensors(lambda t: t.update({FIRST: torch.ones(2)})), "misshapen lora"),
        ("adapter_model.safetensors", _tensors(lambda t: t[FIRST].fill_(float("nan"))), "not finite lora"),
        (
            "adapter_model.safetensors",
            lambda p: p.write_bytes(p.read_bytes()[:-9]),
            "not a whole safetensors",
        ),
        ("adapter_config.json", lambda p: p.write_text(p.read_text().replace('"r": 4', '"r": 5')), "r is 5"),
        ("adapter_config.json", lambda p: p.write_text("{"), "cannot be read as JSON"),
    ],
)
def test_adapters_that_are_not_those_of_the_plan_are_refused_by_name(
    name: str, change, message: str, base: Path, tmp_path: Path
):
    policy = vlafit.load_policy(base)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=apply_strategy(policy, rules("lora")))
    _rewrite(tmp_path / "c", f"adapters/lora/{name}", change)
    with pytest.raises(WeightsError, match=message):
        vlafit.load_policy(tmp_path / "c")


def test_an_adapter_that_was_changed_or_lost_is_seen_by_its_hash(base: Path, tmp_path: Path):
    policy = vlafit.load_policy(base)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=apply_strategy(policy, rules("lora")))
    config = tmp_path / "c" / "adapters" / "lora" / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(WeightsError, match="changed: adapters/lora/adapter_config.json"):
        vlafit.load_policy(tmp_path / "c")


def test_pieces_that_do_not_belong_together_are_not_saved(base: Path, tmp_path: Path):
    policy = vlafit.load_policy(base)
    plan = apply_strategy(policy, rules("lora"))
    with pytest.raises(WeightsError, match="adapters have a plan"):
        vlafit.save_checkpoint(policy, tmp_path / "c")
    with pytest.raises(WeightsError, match="the plan is not of this policy"):
        vlafit.save_checkpoint(vlafit.merge(policy), tmp_path / "c", plan=plan)
    with pytest.raises(WeightsError, match="this one has none"):
        vlafit.save_checkpoint(policy, tmp_path / "c", base=base)
    assert not (tmp_path / "c").exists()
