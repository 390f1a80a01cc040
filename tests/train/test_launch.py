"""What `accelerate config` wrote becomes values of the recipe, or is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.train.world import REPOSITORY
from vlafit.errors import ConfigError
from vlafit.recipe import OptimRecipe, Recipe, TrainRecipe
from vlafit.train.launch import LaunchPlan, read
from vlafit.train.settle import settle

FSDP2 = {
    "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "GemmaDecoderLayer", "fsdp_reshard_after_forward": True,
    "fsdp_offload_params": False, "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": True, "fsdp_activation_checkpointing": False,
}  # fmt: skip
FSDP1 = {"fsdp_version": 1, "fsdp_sharding_strategy": "FULL_SHARD", "fsdp_offload_params": False}
ZERO = {
    "zero_stage": 2, "gradient_accumulation_steps": 1, "offload_optimizer_device": "none",
    "offload_param_device": "none", "zero3_init_flag": False,
}  # fmt: skip


def environment(folder: Path, **values: Any) -> dict[str, str]:
    """The environment that accelerate's own launcher makes of a YAML file, on a machine with GPUs."""
    whole = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_machines": 1,
        "num_processes": 2, "gpu_ids": "all", "mixed_precision": "no", "main_process_port": 0,
        "use_cpu": False,
    } | values  # fmt: skip
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(whole))
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(whole["deepspeed_config"])
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


def fsdp(folder: Path, config: dict[str, Any], **changes: Any) -> LaunchPlan:
    precision = changes.pop("mixed_precision", "bf16")
    values = {"distributed_type": "FSDP", "mixed_precision": precision, "fsdp_config": config | changes}
    return read(environment(folder, **values))


def deepspeed(folder: Path, **changes: Any) -> LaunchPlan:
    values = {"distributed_type": "DEEPSPEED", "mixed_precision": changes.pop("mixed_precision", "bf16")}
    return read(environment(folder, **values, deepspeed_config=ZERO | changes))


def test_without_accelerate_the_launcher_says_nothing() -> None:
    assert read({"WORLD_SIZE": "2"}) == LaunchPlan()


def test_mixed_precision_is_read_and_no_decides_nothing(tmp_path: Path) -> None:
    assert read(environment(tmp_path, mixed_precision="bf16")) == LaunchPlan("accelerate", "bf16")
    assert read(environment(tmp_path, mixed_precision="no")) == LaunchPlan("accelerate")


@pytest.mark.parametrize(
    ("config", "changes", "sharding"),
    [
        (FSDP2, {}, "full"),
        (FSDP2, {"fsdp_reshard_after_forward": False}, "gradients"),
        (FSDP1, {}, "full"),
        (FSDP1, {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, "gradients"),
        (FSDP1, {"fsdp_sharding_strategy": "NO_SHARD"}, "none"),
        (FSDP1, {"fsdp_sharding_strategy": 2}, "gradients"),
    ],
)
def test_fsdp_becomes_the_recipes_sharding(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], sharding: str
) -> None:
    plan = fsdp(tmp_path, config, **changes)
    assert (plan.sharding, plan.precision) == (sharding, "bf16")


def test_fsdps_activation_checkpointing_becomes_recompute(tmp_path: Path) -> None:
    assert fsdp(tmp_path, FSDP2).recompute is None
    assert fsdp(tmp_path, FSDP2, fsdp_activation_checkpointing=True).recompute == "full"


def test_keys_of_fsdp_without_effect_are_named(tmp_path: Path) -> None:
    (note,) = fsdp(tmp_path, FSDP2).notes
    for key in ("fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap", "fsdp_state_dict_type"):
        assert key in note


@pytest.mark.parametrize(
    ("stage", "sharding"), [(0, "none"), (1, "gradients"), (2, "gradients"), (3, "full")]
)
def test_a_zero_stage_becomes_the_recipes_sharding(tmp_path: Path, stage: int, sharding: str) -> None:
    plan = deepspeed(tmp_path, zero_stage=stage, gradient_accumulation_steps=4, gradient_clipping=0.5)
    assert plan == LaunchPlan(
        f"accelerate (DeepSpeed ZeRO-{stage})", "bf16", sharding, 4, clip_norm=0.5, notes=plan.notes
    )
    assert "FSDP2" in plan.notes[0]


def test_a_deepspeed_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    content: dict[str, Any] = {
        "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": 8,
    }  # fmt: skip
    file.write_text(json.dumps(content))
    values = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(file)}}
    plan = read(environment(tmp_path, **values))
    assert (plan.precision, plan.sharding, plan.accumulate, plan.clip_norm) == ("bf16", "full", 2, None)
    assert any("train_micro_batch_size_per_gpu 8" in note for note in plan.notes)
    file.write_text(json.dumps(content | {"optimizer": {"type": "Lion"}}))
    with pytest.raises(ConfigError, match=r"zero\.json: the optimizer .*\[optim\]"):
        read(environment(tmp_path, **values))


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"mixed_precision": "fp16"}, ["fp16", "bf16"]),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, ["dynamo_backend"]),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP2 | {"fsdp_offload_params": True}},
         ["fsdp_offload_params", "recompute", "optim.states 8bit"]),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP1 | {"fsdp_sharding_strategy": "HYBRID_SHARD"}},
         ["HYBRID_SHARD", "FULL_SHARD"]),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": ZERO | {"offload_optimizer_device": "cpu"}},
         ["offload_optimizer_device", "optim.states 8bit"]),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": ZERO | {"zero_stage": 4}},
         ["4", "0, 1, 2, 3"]),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_with_an_equivalent(
    tmp_path: Path, changes: dict[str, Any], facts: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        read(environment(tmp_path, **changes))
    assert all(fact in str(raised.value) for fact in facts), raised.value


PLAN = LaunchPlan("accelerate (FSDP 2)", "bf16", "full", 4, "full", 0.5)


def test_the_launcher_decides_what_the_recipe_leaves_open() -> None:
    settled = settle(Recipe(), PLAN, bf16=False)
    train = settled.recipe.train
    assert (train.precision, train.sharding, train.accumulate, train.recompute) == ("bf16", "full", 4, "full")
    assert (train.frozen, settled.recipe.optim.states, settled.recipe.optim.clip_norm) == (
        "bf16",
        "fp32",
        0.5,
    )
    assert not any(setting.differs for setting in settled.settings)


def test_the_recipes_own_value_comes_first_and_a_sentence_says_so() -> None:
    recipe = Recipe(train=TrainRecipe(precision="fp32", accumulate=2, sharding="none", recompute="none"))
    settled = settle(replace(recipe, optim=OptimRecipe(clip_norm=2.0)), PLAN, bf16=True)
    train = settled.recipe.train
    assert (train.precision, train.sharding, train.accumulate, train.recompute) == ("fp32", "none", 2, "none")
    assert (train.frozen, settled.recipe.optim.clip_norm) == ("fp32", 2.0)
    assert all(setting.differs for setting in settled.settings)
    (sentence,) = [text for text in settled.sentences if text.startswith("train.precision")]
    assert "train.precision = fp32 holds, by the recipe" in sentence and "launcher: bf16" in sentence
    item = next(setting.item() for setting in settled.settings if setting.field == "train.precision")
    assert (item.value, item.status, item.sides) == ("fp32", "chosen", {"recipe": "fp32", "launcher": "bf16"})


def test_by_default_the_device_decides_the_precision() -> None:
    for bf16, name in ((True, "bf16"), (False, "fp32")):
        train = settle(Recipe(), LaunchPlan(), bf16=bf16).recipe.train
        assert (train.precision, train.frozen, train.sharding, train.accumulate) == (name, name, "none", 1)
        assert (train.recompute, settle(Recipe(), LaunchPlan(), bf16=bf16).settings) == ("none", ())


def test_a_resumed_run_keeps_its_values_whatever_the_launcher_and_the_device_are() -> None:
    saved = settle(Recipe(), LaunchPlan(), bf16=False).recipe
    settled = settle(Recipe(), PLAN, bf16=True, saved=saved)
    assert settled.recipe == saved
    assert all(setting.source == "the run that is resumed" for setting in settled.settings[:4])


def test_a_run_of_an_earlier_version_keeps_what_it_did() -> None:
    saved = Recipe(
        train=TrainRecipe(precision="bf16", sharding="none", accumulate=2)
    )  # all the fields it had
    train = settle(Recipe(), LaunchPlan(), bf16=True, saved=saved).recipe.train
    assert (train.precision, train.frozen, train.accumulate) == ("bf16", "fp32", 2)


def test_the_shipped_launcher_files_are_honoured() -> None:
    for path in sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        assert values["mixed_precision"] in ("no", "bf16"), path
