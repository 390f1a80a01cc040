"""Translate what `accelerate config` wrote into the recipe's fields, or refuse it with vlafit's equivalent.

`accelerate launch` passes its configuration on in environment variables. accelerate's own FSDP and DeepSpeed
act only where a program hands its model over to them, and this one shards by itself (`distributed.py`), so
each setting becomes a value of the recipe. `read` is a function of the environment, and starts nothing.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from vlafit.errors import ConfigError
from vlafit.train.launch_deepspeed import read_deepspeed
from vlafit.train.launch_plan import (
    FALSE,
    LESS_MEMORY,
    TRUE,
    LaunchPlan,
    Sharding,
    accumulation_of,
    have_no_effect,
    is_on,
    keys_asked_for,
    precision_of,
)

FSDP1_STRATEGIES: Mapping[str, Sharding] = {  # torch.distributed.fsdp.ShardingStrategy, by name and by number
    "FULL_SHARD": "full", "1": "full", "SHARD_GRAD_OP": "gradients", "2": "gradients",
    "NO_SHARD": "none", "3": "none", "HYBRID_SHARD": "full", "4": "full", "_HYBRID_SHARD_ZERO2": "gradients",
    "5": "gradients",
}  # fmt: skip
HYBRID = ("HYBRID_SHARD", "4", "_HYBRID_SHARD_ZERO2", "5")
"""Of them, those that shard over the processes of a machine, and copy over machines."""
FSDP_WITHOUT_EFFECT = {  # variables -> the YAML's key, and the values with which it asks for nothing
    "FSDP_AUTO_WRAP_POLICY": ("fsdp_auto_wrap_policy", ("", "NO_WRAP")),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("fsdp_transformer_layer_cls_to_wrap", ("",)),
    "FSDP_MIN_NUM_PARAMS": ("fsdp_min_num_params", ("", "100000000")),  # what accelerate sets by itself
    "FSDP_STATE_DICT_TYPE": ("fsdp_state_dict_type", ("",)),
    "FSDP_BACKWARD_PREFETCH": ("fsdp_backward_prefetch", ("", "NO_PREFETCH")),
    "FSDP_FORWARD_PREFETCH": ("fsdp_forward_prefetch", ("", "false")),
    "FSDP_USE_ORIG_PARAMS": ("fsdp_use_orig_params", ("", "true")),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("fsdp_cpu_ram_efficient_loading", ("", "false")),
    "FSDP_SYNC_MODULE_STATES": ("fsdp_sync_module_states", ("", "false")),
}
DYNAMO_WITHOUT_EFFECT = {
    "ACCELERATE_DYNAMO_MODE": ("dynamo_mode", ("", "default")),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ("dynamo_use_fullgraph", ("", "false")),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ("dynamo_use_dynamic", ("", "false")),
}
SPLITS = {"TP": "tensor parallelism", "CP": "context parallelism", "SP": "sequence parallelism"}
"""Sizes of accelerate's parallelism_config that divide the work on one sample."""
HIDDEN = (
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
)


def read(environ: Mapping[str, str]) -> LaunchPlan:
    """Return what the environment of `accelerate launch` asks for.

    Raises ConfigError for a setting that cannot be honoured, with the recipe's field that comes closest.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environ:  # `accelerate launch` always sets it
        return LaunchPlan()
    _refuse_others(environ)
    compiles, notes = _dynamo(environ)
    plan = _parallel(environ, _sharding(environ))
    return replace(plan, compile=compiles, notes=(*plan.notes, *notes))


def require_device(device: str) -> None:
    """Raise ConfigError for a type of device that vlafit does not train on."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"accelerate chose the device {device!r}; vlafit trains on GPUs of CUDA or ROCm, and on CPUs: "
            "set use_cpu to true in `accelerate config`, or ACCELERATE_USE_CPU=true in the environment"
        )


def _sharding(environ: Mapping[str, str]) -> LaunchPlan:
    if is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        return read_deepspeed(environ)
    accumulate = accumulation_of(environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"), "accelerate")
    precision = precision_of(environ["ACCELERATE_MIXED_PRECISION"], "accelerate")
    if is_on(environ, "ACCELERATE_USE_FSDP"):
        return _fsdp(environ, precision, accumulate)
    return LaunchPlan("accelerate", precision, accumulate=accumulate)


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Hide the translated settings within this block, so that accelerate does not act on them, too.

    It would import DeepSpeed, for example, which this program does not need.
    """
    before = {name: os.environ.pop(name) for name in HIDDEN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _refuse_others(environ: Mapping[str, str]) -> None:
    for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
        if environ.get(name) == "1":
            raise ConfigError(
                f"accelerate: {name} = 1, which it sets for TPUs (downcast_bf16), cannot be honoured: vlafit "
                "trains on GPUs and CPUs; on a GPU, mixed_precision bf16 (--train.precision bf16) is like it"
            )
    if environ.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "None").lower() not in ("none", ""):
        raise ConfigError(
            "accelerate (DeepSpeed): deepspeed_moe_layer_cls_names cannot be honoured: no policy has layers "
            "of experts that are sharded by themselves; remove the key"
        )
    if is_on(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise ConfigError(
            "accelerate: Megatron-LM cannot be honoured: vlafit shards weights, gradients and optimiser "
            "states (--train.sharding full), and splits no layer over GPUs; choose MULTI_GPU or FSDP in "
            "`accelerate config`"
        )


def _parallel(environ: Mapping[str, str], plan: LaunchPlan) -> LaunchPlan:
    """Return the plan with what accelerate's `parallelism_config` says of copies and shards."""
    if not is_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return plan
    where = "accelerate (parallelism_config)"
    sizes = {name: _size(environ, name, where) for name in ("DP_REPLICATE", "DP_SHARD", *SPLITS)}
    for name, what in SPLITS.items():
        if sizes[name] > 1:
            raise ConfigError(
                f"{where}: {name.lower()}_size {sizes[name]} ({what}) cannot be honoured: vlafit splits no "
                "layer and no sequence over GPUs; set it to 1, and dp_shard_size to the number of processes "
                "(--train.sharding full)"
            )
    copies, shards = sizes["DP_REPLICATE"], sizes["DP_SHARD"]
    if copies > 1 and shards > 1:
        if plan.sharding == "none":
            raise ConfigError(
                f"{where}: dp_shard_size {shards} shards the weights, and {plan.launcher} keeps a copy on "
                "each process: use FULL_SHARD or ZeRO-3, or set dp_shard_size to 1"
            )
        return replace(plan, launcher=where, sharding=plan.sharding or "full", replicas=copies)
    if copies > 1:
        return replace(plan, launcher=where, sharding="none")
    if shards > 1 and plan.sharding is None:
        return replace(plan, launcher=where, sharding="full")
    return plan


def _size(environ: Mapping[str, str], name: str, where: str) -> int:
    value = environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{where}: {name.lower()}_size {value!r} is not a number of at least 1")
    return int(value)


def _dynamo(environ: Mapping[str, str]) -> tuple[Literal["blocks"] | None, list[str]]:
    """Return what torch.compile is asked for, and sentences about keys without effect."""
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    match backend.lower():
        case "no" | "":
            return None, []
        case "inductor":
            keys = keys_asked_for(environ, DYNAMO_WITHOUT_EFFECT)
            own = "accelerate: torch.compile compiles each block of the policy by itself, as shapes come"
            return "blocks", [f"{own}, so {have_no_effect(keys)}"] if keys else []
    raise ConfigError(
        f"accelerate: dynamo_backend {backend!r} cannot be honoured: vlafit compiles by inductor "
        '(--train.compile blocks); set it to "inductor" or "no"'
    )


# ------------------------------------------------------------------------------------------------- FSDP


def _fsdp(
    environ: Mapping[str, str], precision: Literal["fp32", "bf16"] | None, accumulate: int | None
) -> LaunchPlan:
    version = environ.get("FSDP_VERSION", "1")
    name = f"accelerate (FSDP {version})"
    strategy = environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    reshard = environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if version == "1":
        if strategy not in FSDP1_STRATEGIES:
            raise ConfigError(
                f"{name}: fsdp_sharding_strategy {strategy!r} cannot be honoured: use FULL_SHARD "
                "(--train.sharding full), SHARD_GRAD_OP (--train.sharding gradients) or HYBRID_SHARD "
                "(--train.sharding full --train.replicas MACHINES)"
            )
        sharding = FSDP1_STRATEGIES[strategy]
        replicas = _machines(environ, name) if strategy in HYBRID else None
        unread = ("fsdp_reshard_after_forward", reshard) if reshard not in TRUE else None
    else:
        if reshard not in (*TRUE, *FALSE):
            raise ConfigError(f"{name}: fsdp_reshard_after_forward {reshard!r} is neither true nor false")
        sharding, replicas = "full" if reshard in TRUE else "gradients", None
        unread = ("fsdp_sharding_strategy", strategy) if strategy not in ("FULL_SHARD", "1") else None
    _refuse_on(environ, "FSDP_OFFLOAD_PARAMS", name, "fsdp_offload_params", LESS_MEMORY)
    offload = "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"
    _refuse_on(environ, offload, name, "fsdp_activation_checkpointing_offload", LESS_MEMORY)
    if environ.get("FSDP_IGNORED_MODULES"):
        raise ConfigError(
            f"{name}: fsdp_ignored_modules cannot be honoured: vlafit shards every block of the policy; "
            "remove the key"
        )
    notes = [f"{name}: every block of the policy is sharded by itself, and checkpoints are written whole"]
    if keys := keys_asked_for(environ, FSDP_WITHOUT_EFFECT):
        notes[0] += f", so {have_no_effect(keys)}"
    if unread is not None:
        instead = "fsdp_sharding_strategy" if version == "1" else "fsdp_reshard_after_forward"
        notes.append(
            f"{name}: {unread[0]} {unread[1]} has no effect with this version: {instead} holds, and "
            f"--train.sharding {sharding} with it (copies of shards: --train.replicas)"
        )
    recompute = "full" if is_on(environ, "FSDP_ACTIVATION_CHECKPOINTING") else None
    return LaunchPlan(name, precision, sharding, accumulate, recompute, replicas=replicas, notes=tuple(notes))


def _machines(environ: Mapping[str, str], where: str) -> int:
    """Return the number of machines. Raises ConfigError where they run different numbers of processes."""
    world, local = int(environ.get("WORLD_SIZE", "1")), int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if world % local:
        raise ConfigError(
            f"{where}: HYBRID_SHARD copies the policy on each machine, but {world} processes are no multiple "
            f"of the {local} on this machine; start as many on each, or use FULL_SHARD"
        )
    return world // local


def _refuse_on(environ: Mapping[str, str], variable: str, where: str, key: str, instead: str) -> None:
    if is_on(environ, variable):
        raise ConfigError(f"{where}: {key} cannot be honoured: set it to false. {instead}")
