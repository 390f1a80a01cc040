"""What `accelerate config` wrote becomes values of the recipe, or is refused."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate.utils.launch
import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.train.world import REPOSITORY
from vlafit.errors import ConfigError
from vlafit.recipe import OptimRecipe, Recipe, TrainRecipe
from vlafit.train import launch, launch_deepspeed
from vlafit.train.launch import read
from vlafit.train.launch_plan import LaunchPlan, Sharding
from vlafit.train.settle import settle, with_field

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
        (FSDP1, {"fsdp_sharding_strategy": "HYBRID_SHARD"}, "full"),
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
    ("config", "changes", "facts"),
    [
        (
            FSDP2,
            {"fsdp_sharding_strategy": "HYBRID_SHARD"},
            ["fsdp_sharding_strategy HYBRID_SHARD", "replicas"],
        ),
        (FSDP1, {"fsdp_reshard_after_forward": False}, ["fsdp_reshard_after_forward false", "sharding full"]),
    ],
)
def test_a_key_of_the_other_version_of_fsdp_is_named(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], facts: list[str]
) -> None:
    notes = " ".join(fsdp(tmp_path, config, **changes).notes)
    assert all(fact in notes for fact in facts), notes


def test_a_value_of_fsdp_that_is_not_true_or_false_is_refused(tmp_path: Path) -> None:
    assert fsdp(tmp_path, FSDP2, fsdp_reshard_after_forward="on").sharding == "full"
    with pytest.raises(ConfigError, match=r"fsdp_reshard_after_forward 'sometimes'"):
        fsdp(tmp_path, FSDP2, fsdp_reshard_after_forward="sometimes")


@pytest.mark.parametrize(
    ("stage", "sharding"), [(0, "none"), (1, "gradients"), (2, "gradients"), (3, "full")]
)
def test_a_zero_stage_becomes_the_recipes_sharding(tmp_path: Path, stage: int, sharding: Sharding) -> None:
    plan = deepspeed(tmp_path, zero_stage=stage, gradient_accumulation_steps=4, gradient_clipping=0.5)
    assert plan == LaunchPlan(
        f"accelerate (DeepSpeed ZeRO-{stage})", "bf16", sharding, 4, clip_norm=0.5, notes=plan.notes
    )
    assert "DeepSpeed itself does not run. torch's " in plan.notes[0]
    assert ("FSDP2" if stage else "DDP") in plan.notes[0]


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
        ({"dynamo_config": {"dynamo_backend": "TENSORRT"}}, ["dynamo_backend", "train.compile blocks"]),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP2 | {"fsdp_offload_params": True}},
         ["fsdp_offload_params", "recompute", "optim.states 8bit"]),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP1 | {"fsdp_sharding_strategy": "HALF_SHARD"}},
         ["HALF_SHARD", "FULL_SHARD", "HYBRID_SHARD", "train.replicas"]),
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


# Files as users have them, by what they are for -> fields of the plan that differ from its defaults, and
# words that its notes must have. "fsdp_config" and "deepspeed_config" are added to those above.
FILES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "DDP in bf16": ({"mixed_precision": "bf16"}, {"precision": "bf16"}, []),
    "several machines": (
        {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29500,
         "rdzv_backend": "static", "same_network": True, "mixed_precision": "bf16"},
        {"precision": "bf16"}, [],
    ),
    "torch.compile": (
        {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune",
                           "dynamo_use_fullgraph": True, "dynamo_use_dynamic": True}},
        {"compile": "blocks"}, ["dynamo_mode", "dynamo_use_fullgraph", "dynamo_use_dynamic"],
    ),
    "torch.compile by its defaults": (
        {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default"}},
        {"compile": "blocks"}, [],
    ),
    "FSDP 2 with every option": (
        {"fsdp_config": {"fsdp_activation_checkpointing": True, "fsdp_backward_prefetch": "BACKWARD_PRE",
                         "fsdp_forward_prefetch": True, "fsdp_use_orig_params": False,
                         "fsdp_sync_module_states": True}},
        {"sharding": "full", "recompute": "full"},
        ["fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap", "fsdp_state_dict_type",
         "fsdp_cpu_ram_efficient_loading", "fsdp_backward_prefetch", "fsdp_forward_prefetch",
         "fsdp_use_orig_params", "fsdp_sync_module_states"],
    ),
    "FSDP 2 wrapped by size": (
        {"fsdp_config": {"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP", "fsdp_min_num_params": 1000}},
        {"sharding": "full"}, ["fsdp_auto_wrap_policy", "fsdp_min_num_params"],
    ),
    "ZeRO-1 with accumulation": (
        {"deepspeed_config": {"zero_stage": 1, "gradient_accumulation_steps": 4}},
        {"sharding": "gradients", "accumulate": 4}, ["gradients are sharded, too"],
    ),
    "ZeRO-3 as accelerate writes it": (
        {"deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True,
                              "gradient_clipping": 1.0, "deepspeed_multinode_launcher": "standard"}},
        {"sharding": "full", "clip_norm": 1.0}, ["zero3_init_flag", "zero3_save_16bit_model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_a_users_file_is_honoured_or_named(tmp_path: Path, name: str) -> None:
    values, expected, named = FILES[name]
    values = dict(values)
    if "fsdp_config" in values:
        values |= {"distributed_type": "FSDP", "fsdp_config": FSDP2 | values["fsdp_config"]}
    if "deepspeed_config" in values:
        values |= {"distributed_type": "DEEPSPEED", "deepspeed_config": ZERO | values["deepspeed_config"]}
    plan = read(environment(tmp_path, **values))
    assert plan == replace(LaunchPlan(plan.launcher, notes=plan.notes), **expected)
    notes = " ".join(plan.notes)
    assert all(word in notes for word in named), notes


HUGGING_FACE: dict[str, Any] = {  # as transformers' page on ZeRO-3 has it, with parts of DeepSpeed's own page
    "fp16": {"enabled": False}, "bf16": {"enabled": "auto"}, "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "steps_per_print": 2000, "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False, "amp": {"enabled": False},
    "activation_checkpointing": {"partition_activations": True},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True, "offload_optimizer": {"device": "none"},
    },
}  # fmt: skip


def with_file(folder: Path, content: dict[str, Any], **values: Any) -> LaunchPlan:
    file = folder / "zero.json"
    file.write_text(json.dumps(content))
    config = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(file)}}
    return read(environment(folder, **config, **values))


def test_every_key_of_a_deepspeed_file_is_honoured_or_named(tmp_path: Path) -> None:
    plan = with_file(tmp_path, HUGGING_FACE, mixed_precision="bf16")
    assert (plan.precision, plan.sharding, plan.accumulate, plan.clip_norm) == ("bf16", "full", None, None)
    honoured = {"fp16", "bf16", "gradient_accumulation_steps", "gradient_clipping", "zero_optimization"}
    honoured |= {"amp", "train_micro_batch_size_per_gpu"}
    zero = {f"zero_optimization.{key}" for key in HUGGING_FACE["zero_optimization"]}
    honoured |= {"zero_optimization.stage", "zero_optimization.offload_optimizer"}
    notes = " ".join(plan.notes)
    assert [key for key in {*HUGGING_FACE, *zero} - honoured if key not in notes] == []


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "[optim]"]),
        ({"amp": {"enabled": True}}, ["amp", "train.precision bf16"]),
        ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning", "train.seed"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
         ["offload_optimizer", "optim.states 8bit"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["offload_param", "nvme"]),
        ({"fp16": {"enabled": True}}, ["fp16", "bf16"]),
        ({"torch_autocast": {"enabled": True}}, ["fp16", "bf16"]),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, ["float16", "bf16"]),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
         ["bf16.bf16_master_weights_and_grads", "train.weights bf16"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op", "mean"]),
        ({"progressive_layer_drop": {"enabled": True}}, ["progressive_layer_drop"]),
        ({"bf16": {"enabled": "maybe"}}, ["bf16.enabled", "maybe", "auto"]),
        ({"bf16": True}, ["bf16 true is no table", "enabled"]),
        ({"fp16": {"enabled": "true"}}, ["fp16", "bf16"]),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": "true"}}, ["bf16.bf16_optimizer_states"]),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ["cpu_offload", "optim.states 8bit"]),
        ({"zero_optimization": {"stage": 3, "cpu_offload_params": "true"}}, ["cpu_offload_params", "8bit"]),
        ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, ["cpu_offload_param ", "8bit"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, ["offload_optimizer", "'cpu'"]),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}},
         ["mics_shard_size 4", "--train.sharding full --train.replicas"]),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, ["zero_quantized_gradients"]),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": "true"}}, ["quantise"]),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, ["zenflow"]),
        ({"gradient_clipping": -1}, ["gradient_clipping -1", "0: no clipping"]),
        ({"gradient_clipping": "nan"}, ["gradient_clipping 'nan'"]),
    ],
)  # fmt: skip
def test_a_deepspeed_file_that_would_change_what_is_learned_is_refused(
    tmp_path: Path, content: dict[str, Any], facts: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        with_file(tmp_path, content)
    assert all(fact in str(raised.value) for fact in facts), raised.value


@pytest.mark.parametrize(
    ("content", "precision"),
    [
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),  # the key's former name, which DeepSpeed still reads
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}}, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "float32"}}, None),
        ({"torch_autocast": {"enabled": False, "dtype": "float16"}}, None),
        ({"bf16": {"enabled": "true"}}, "bf16"),  # as pydantic reads it for DeepSpeed
        ({"bf16": {"enabled": 1}}, "bf16"),
        ({"bf16": {"enabled": False}}, None),
        ({"bf16": {"enabled": "false"}}, None),
        ({"amp": {"enabled": "false"}}, None),
        ({"zero_optimization": {"stage": 2, "cpu_offload": False, "mics_shard_size": -1}}, None),
        ({"zero_optimization": {"stage": 3, "offload_param": None, "offload_optimizer": "none"}}, None),
    ],
)
def test_every_way_to_ask_for_bf16_in_a_deepspeed_file_is_read(
    tmp_path: Path, content: dict[str, Any], precision: str | None
) -> None:
    plan = with_file(tmp_path, content)
    assert plan.precision == precision
    assert not any(key in note for note in plan.notes[1:] for key in content)


@pytest.mark.parametrize(
    ("content", "mixed", "precision", "facts"),
    [
        ({"bf16": {"enabled": "auto"}}, "no", None, ['bf16.enabled "auto"', "'no'", "--train.precision"]),
        ({"bf16": {"enabled": "auto"}}, "bf16", "bf16", ['bf16.enabled "auto"', "'bf16'"]),
        ({"bf16": {"enabled": False}}, "bf16", "bf16", ["bf16.enabled false has no effect", "'bf16' holds"]),
        ({"bf16": {"enabled": True}}, "fp16", "bf16", ["bf16 holds", "'fp16' has no effect"]),
    ],
)
def test_where_a_deepspeed_file_and_accelerate_name_a_precision_a_sentence_says_which_holds(
    tmp_path: Path, content: dict[str, Any], mixed: str, precision: str | None, facts: list[str]
) -> None:
    plan = with_file(tmp_path, content, mixed_precision=mixed)
    assert plan.precision == precision
    assert all(fact in " ".join(plan.notes) for fact in facts), plan.notes


def test_keys_inside_the_tables_of_a_deepspeed_file_are_named(tmp_path: Path) -> None:
    tables = {
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "torch_autocast": {"enabled": True, "dtype": "bf16", "lower_precision_safe_modules": ["a.B"]},
        "fp16": {"enabled": False, "loss_scale_window": 1000},
    }
    notes = " ".join(with_file(tmp_path, tables).notes)
    assert "bf16.immediate_grad_update, torch_autocast.lower_precision_safe_modules have no effect" in notes
    assert "loss_scale_window" not in notes


PARALLEL = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.mark.parametrize(
    ("sizes", "variables", "sharding", "replicas"),
    [
        ({"DP_REPLICATE": 1, "DP_SHARD": 4, "TP": 1, "CP": 1, "SP": 1}, {}, "full", None),
        ({"DP_REPLICATE": 4, "DP_SHARD": 1}, {}, "none", None),
        ({"DP_REPLICATE": 1, "DP_SHARD": 1}, {}, None, None),
        ({"DP_REPLICATE": 2, "DP_SHARD": 4}, {}, "full", 2),
        ({"DP_SHARD": 4}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
                           "FSDP_RESHARD_AFTER_FORWARD": "false"}, "gradients", None),
        ({"DP_REPLICATE": 2, "DP_SHARD": 4}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
                                              "FSDP_RESHARD_AFTER_FORWARD": "false"}, "gradients", 2),
    ],
)  # fmt: skip
def test_a_parallelism_config_of_copies_or_shards_is_honoured(
    sizes: dict[str, int], variables: dict[str, str], sharding: str | None, replicas: int | None
) -> None:
    written = {f"PARALLELISM_CONFIG_{name}_SIZE": str(size) for name, size in sizes.items()}
    plan = read({"ACCELERATE_MIXED_PRECISION": "no"} | PARALLEL | written | variables)
    assert (plan.sharding, plan.replicas) == (sharding, replicas)


def test_hybrid_shard_of_fsdp_1_copies_over_machines(tmp_path: Path) -> None:
    written = environment(
        tmp_path, distributed_type="FSDP", fsdp_config=FSDP1 | {"fsdp_sharding_strategy": "HYBRID_SHARD"}
    )
    assert read(written | {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}).replicas == 2
    assert read(written | {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}).replicas == 1
    with pytest.raises(ConfigError, match=r"HYBRID_SHARD .* 6 processes are no multiple of the 4"):
        read(written | {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("variables", "facts"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["fp8", "train.precision bf16"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["Megatron-LM", "train.sharding full"]),
        (
            {
                **PARALLEL,
                "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
                "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "1",
                "FSDP_SHARDING_STRATEGY": "NO_SHARD",
            },
            ["dp_shard_size 4", "FULL_SHARD", "copy on each"],
        ),
        ({**PARALLEL, "PARALLELISM_CONFIG_TP_SIZE": "2"}, ["tensor parallelism", "tp_size 2"]),
        ({**PARALLEL, "PARALLELISM_CONFIG_CP_SIZE": "4"}, ["context parallelism", "train.sharding full"]),
        ({**PARALLEL, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "auto"}, ["dp_shard_size 'auto'"]),
        ({"XLA_DOWNCAST_BF16": "1"}, ["downcast_bf16", "GPUs and CPUs"]),
        ({"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Experts"}, ["deepspeed_moe_layer_cls_names"]),
    ],
)  # what accelerate's launcher only sets where the hardware or the library is there
def test_other_hardware_and_libraries_are_refused(variables: dict[str, str], facts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        read({"ACCELERATE_MIXED_PRECISION": "no"} | variables)
    assert all(fact in str(raised.value) for fact in facts), raised.value


@pytest.mark.parametrize("device", ["mps", "xpu", "npu"])
def test_a_device_that_vlafit_does_not_train_on_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"device '{device}'.*use_cpu"):
        launch.require_device(device)
    launch.require_device("cpu")
    launch.require_device("cuda")


BY_OTHERS = {  # variables of accelerate's launcher that torch, OpenMP or accelerate itself act on
    "ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME",
    "OMP_NUM_THREADS", "PYTHONPATH", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES",
    # Devices that `require_device` refuses.
    "ZE_AFFINITY_MASK", "MLU_VISIBLE_DEVICES", "SDAA_VISIBLE_DEVICES", "MUSA_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES", "HABANA_VISIBLE_MODULES", "NEURON_RT_VISIBLE_CORES",
    "ACCELERATE_CONFIG_DS_FIELDS",  # names of keys
    # Blocks are compiled one at a time, which is what it asks for.
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
}  # fmt: skip


def test_no_variable_of_accelerates_launcher_is_unknown() -> None:
    """The launcher's own source lists them; those of Megatron-LM and fp8 have prefixes, and are refused."""
    launcher = inspect.getsource(accelerate.utils.launch)
    variables = set(re.findall(r'current_env\["(\w+)"\]', launcher))
    assert len(variables) > 40
    source = inspect.getsource(launch) + inspect.getsource(launch_deepspeed)
    assert {name for name in variables - BY_OTHERS if f'"{name}"' not in source} == set()


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
    begun = settle(Recipe(), LaunchPlan(), bf16=False).recipe
    saved = with_field(begun, "train.packing", "rows")  # chosen when the policy was built
    settled = settle(Recipe(), PLAN, bf16=True, saved=saved)
    assert settled.recipe == saved
    assert all(setting.source == "the run that is resumed" for setting in settled.settings[:4])


def test_a_run_of_an_earlier_version_keeps_what_it_did() -> None:
    saved = Recipe(
        train=TrainRecipe(precision="bf16", sharding="none", accumulate=2)
    )  # all the fields it had
    train = settle(Recipe(), LaunchPlan(), bf16=True, saved=saved).recipe.train
    assert (train.precision, train.frozen, train.accumulate) == ("bf16", "fp32", 2)
    assert train.packing == "none"


def test_the_shipped_launcher_files_are_honoured() -> None:
    for path in sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        assert values["mixed_precision"] in ("no", "bf16"), path
