"""Checkpoints of adapted policies: what learned is kept, the base is the one it was, nothing else passes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from tests.tuning.world import METHODS, QUANTISED, make_policy, rules, train, velocity
from tests.variants import variants
from vlafit import checkpoints, files, tuning
from vlafit.checkpoints.export import export
from vlafit.errors import WeightsError
from vlafit.tuning import apply_strategy
from vlafit.tuning.inject import adapter_tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    vlafit.save_checkpoint(make_policy(), folder)
    return folder


@pytest.mark.parametrize("name", variants(METHODS, always=["lora", "pissa"]))
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


@pytest.mark.parametrize("name", variants(QUANTISED, always=["nf4"]))
def test_a_quantised_policy_is_saved_on_what_it_was_loaded_from_unless_another_is_named(
    name: str, base: Path, tmp_path: Path
):
    policy = vlafit.load_policy(base)
    plan = apply_strategy(policy, rules(name))
    train(policy)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan)
    said = json.loads((tmp_path / "c" / "base.json").read_text())
    assert said == {"checkpoint": str(base.resolve()), "sha256": checkpoints.digest(base), "format": 1}
    loaded = vlafit.load_policy(tmp_path / "c")
    assert torch.equal(velocity(loaded), velocity(policy))
    vlafit.save_checkpoint(loaded, tmp_path / "again", plan=plan)  # on the same base, not on the adapters
    assert (tmp_path / "again" / "base.json").read_text() == (tmp_path / "c" / "base.json").read_text()
    shutil.copytree(base, tmp_path / "copy")
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=tmp_path / "copy")
    assert json.loads((tmp_path / "c" / "base.json").read_text())["checkpoint"] == str(tmp_path / "copy")
    assert torch.equal(velocity(vlafit.load_policy(tmp_path / "c")), velocity(policy))


@pytest.mark.parametrize("name", variants(QUANTISED, always=["int8"]))
def test_quantised_weights_need_no_adapters_to_be_saved_on_their_base(name: str, base: Path, tmp_path: Path):
    policy = vlafit.load_policy(base)
    rest = {"select": {"kind": ["attention", "mlp"], "part": ["vision", "language"]}, "mode": "frozen"}
    plan = apply_strategy(
        policy, [{"select": {"part": ["expert", "projections"]}, "mode": "full"}, rest | {"quantise": name},
                 {"mode": "frozen"}]
    )  # fmt: skip
    train(policy)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan)
    assert set(load_file(tmp_path / "c" / "trained.safetensors")) == set(plan.trainable)
    loaded = vlafit.load_policy(tmp_path / "c")
    assert torch.equal(velocity(loaded), velocity(policy))
    before = velocity(loaded)
    told = export(tmp_path / "c", "transformers", tmp_path / "out").notes[0]
    assert "quantised weights are written as the floats" in told
    assert (velocity(vlafit.load_policy(tmp_path / "out")) - before).abs().max() < 1e-4
    assert (velocity(vlafit.merge(loaded)) - before).abs().max() < 1e-4


def test_quantised_weights_that_lie_in_no_checkpoint_are_not_saved(base: Path, tmp_path: Path):
    built = make_policy()
    plan = apply_strategy(built, rules("nf4"))
    with pytest.raises(WeightsError, match=r"save: \d+ quantised.*not loaded"):
        vlafit.save_checkpoint(built, tmp_path / "c", plan=plan)

    merged = vlafit.load_policy(base)
    apply_strategy(merged, rules("lora"))
    train(merged)
    plan = apply_strategy(vlafit.merge(merged), rules("nf4"))
    with pytest.raises(WeightsError, match=r"built or merged, not loaded"):
        vlafit.save_checkpoint(merged, tmp_path / "c", plan=plan)
    with pytest.raises(WeightsError, match="not those of this checkpoint.*save"):
        vlafit.save_checkpoint(merged, tmp_path / "c", plan=plan, base=base)

    trained = vlafit.load_policy(base)
    train(trained)
    plan = apply_strategy(trained, rules("int8"))
    with pytest.raises(WeightsError, match="not those of this checkpoint.*save"):
        vlafit.save_checkpoint(trained, tmp_path / "c", plan=plan)
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_never_takes_the_place_of_its_own_base(tmp_path: Path):
    vlafit.save_checkpoint(make_policy(), tmp_path / "base")
    policy = vlafit.load_policy(tmp_path / "base")
    plan = apply_strategy(policy, rules("int8"))
    with pytest.raises(WeightsError, match=f"^{tmp_path}/base: is the checkpoint.*sits on"):
        vlafit.save_checkpoint(policy, tmp_path / "base", plan=plan)
    vlafit.load_policy(tmp_path / "base")


def test_a_source_that_changed_since_it_was_loaded_is_no_base(tmp_path: Path):
    vlafit.save_checkpoint(make_policy(), tmp_path / "base")
    policy = vlafit.load_policy(tmp_path / "base")
    plan = apply_strategy(policy, rules("int8"))
    (tmp_path / "base" / "manifest.json").write_text((tmp_path / "base" / "manifest.json").read_text() + "\n")
    with pytest.raises(WeightsError, match=f"^{tmp_path}/base: .*SHA-256.*base="):
        vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan)


def test_a_base_of_another_program_is_read_again_as_it_was_read_first(tmp_path: Path):
    openpi = Path(__file__).parents[1] / "fixtures" / "openpi_pi0"
    policy = vlafit.load_policy(openpi, config={"vision.heads": 2, "chunk": 6})
    plan = apply_strategy(policy, rules("int8"))
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan)
    said = json.loads((tmp_path / "c" / "base.json").read_text())
    assert said["config"] == {"vision": {"heads": 2}, "chunk": 6}
    ours, theirs = (
        dict(policy.named_parameters()),
        dict(vlafit.load_policy(tmp_path / "c").named_parameters()),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(_held(ours[n]), _held(theirs[n])) for n in ours)


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.qdata if hasattr(tensor, "qdata") else tensor.data  # torchao's subclass compares nothing


def test_widths_that_changed_when_it_was_loaded_are_kept_with_the_adapters(base: Path, tmp_path: Path):
    policy = vlafit.load_checkpoint(base, {"action_dim": 5}, resize="keep").policy
    plan = apply_strategy(policy, rules("int8"))
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan)
    loaded = dict(vlafit.load_policy(tmp_path / "c").named_parameters())
    assert all(torch.equal(_held(p), _held(loaded[n])) for n, p in policy.named_parameters())


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
    assert config["target_modules"] == sorted(config["target_modules"])  # the same bytes in any process
    assert config["peft_type"] == "LORA" and config["revision"] == f"sha256:{checkpoints.digest(base)}"


def test_a_base_that_moved_is_found_by_its_new_place_and_another_one_is_refused(base: Path, tmp_path: Path):
    shutil.copytree(base, tmp_path / "base")
    policy = vlafit.load_policy(tmp_path / "base")
    plan = apply_strategy(policy, rules("lora"))
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(WeightsError, match="base.*is not there.*base="):
        vlafit.load_policy(tmp_path / "c")
    loaded = vlafit.load_checkpoint(tmp_path / "c", base=tmp_path / "moved").policy
    assert torch.equal(velocity(loaded), velocity(policy))
    other = make_policy()
    train(other)
    vlafit.save_checkpoint(other, tmp_path / "base")
    with pytest.raises(WeightsError, match="trained on another checkpoint"):
        vlafit.load_policy(tmp_path / "c")
    with pytest.raises(WeightsError, match="base=.* only applies to a checkpoint that sits on another"):
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
    with pytest.raises(WeightsError, match="adapters .*plan that apply_strategy returned"):
        vlafit.save_checkpoint(policy, tmp_path / "c")
    with pytest.raises(WeightsError, match=f"^{tmp_path}/c: .*plan.*differ in"):
        vlafit.save_checkpoint(vlafit.merge(policy), tmp_path / "c", plan=plan)
    assert not (tmp_path / "c").exists()


def test_a_policy_without_adapters_may_sit_on_a_base_too(base: Path, tmp_path: Path):
    policy = vlafit.load_policy(base)
    plan = apply_strategy(policy, "projections")
    train(policy)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=base)
    assert set(load_file(tmp_path / "c" / "trained.safetensors")) == set(plan.trainable)
    assert torch.equal(velocity(vlafit.load_policy(tmp_path / "c")), velocity(policy))


def test_what_pissa_adapts_and_a_later_stage_trains_in_full_is_kept(base: Path, tmp_path: Path):
    select = {"part": "expert", "kind": ["attention", "mlp"]}
    rest = {"mode": "frozen"}
    stages = [
        {"rule": [{"select": select, "mode": "lora", "rank": 4, "init": "pissa"}, rest]},
        {"begin": {"step": 12}, "rule": [{"select": select, "mode": "full"}, rest]},
    ]
    policy = vlafit.load_policy(base)
    plan = tuning.apply(policy, tuning.parse({"stage": stages}, name="mine", where="mine"))
    train(policy)
    tuning.enter(policy, plan.at(1))
    train(policy)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan.at(1), base=base)
    assert torch.equal(velocity(vlafit.load_policy(tmp_path / "c")), velocity(policy))


def test_an_adapter_too_large_for_float32_is_refused(base: Path, tmp_path: Path):
    policy = vlafit.load_policy(base)
    plan = vlafit.apply_strategy(policy, rules("lora"))
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=base)
    path = next((tmp_path / "c" / "adapters").rglob("adapter_model.safetensors"))
    tensors = load_file(path)
    first = min(tensors)
    tensors[first] = torch.full_like(tensors[first], 1e300, dtype=torch.float64)
    save_file(tensors, path)
    manifest = tmp_path / "c" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][path.relative_to(tmp_path / "c").as_posix()] = files.sha256(path)
    manifest.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="not finite lora"):
        vlafit.load_policy(tmp_path / "c")


def test_pissa_over_bfloat16_weights_comes_back_bit_for_bit_on_its_base(base: Path, tmp_path: Path):
    policy = vlafit.load_policy(base, dtype="bfloat16")
    plan = vlafit.apply_strategy(policy, rules("pissa"))
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=base)
    again = dict(vlafit.load_policy(tmp_path / "c", dtype="bfloat16").named_parameters())
    assert all(torch.equal(again[name], tensor) for name, tensor in policy.named_parameters())
