"""Translate what `accelerate config` wrote into the recipe's fields, or refuse it with vlafit's equivalent.

`accelerate launch` passes its configuration on in environment variables. accelerate's own FSDP and DeepSpeed
act only where a program hands its model over to them, and this one shards by itself (`distributed.py`), so
each setting becomes a value of the recipe. `read` is a function of the environment, and starts nothing.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlafit.errors import ConfigError
from vlafit.files import parse_json, plain_text

Sharding = Literal["none", "gradients", "full"]

FSDP1_STRATEGIES: Mapping[str, Sharding] = {  # torch.distributed.fsdp.ShardingStrategy, by name and by number
    "FULL_SHARD": "full", "1": "full", "SHARD_GRAD_OP": "gradients", "2": "gradients",
    "NO_SHARD": "none", "3": "none",
}  # fmt: skip
ZERO: Mapping[int, Sharding] = {0: "none", 1: "gradients", 2: "gradients", 3: "full"}
LESS_MEMORY = (
    "--train.recompute full, --optim.states 8bit and a higher --train.accumulate lower the memory on the "
    "GPU; --train.memory 24GB picks them for a card"
)
HIDDEN = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")


@dataclass(frozen=True)
class LaunchPlan:
    """The recipe's fields as the launcher's configuration sets them; None: it says nothing about a field."""

    launcher: str = ""
    """Its name in messages, such as "accelerate (FSDP 2)"; empty without a launcher's configuration."""
    precision: Literal["fp32", "bf16"] | None = None
    sharding: Sharding | None = None
    accumulate: int | None = None
    recompute: Literal["none", "full"] | None = None
    clip_norm: float | None = None
    notes: tuple[str, ...] = ()
    """Sentences about settings that have no effect."""


def read(environ: Mapping[str, str]) -> LaunchPlan:
    """Return what the environment of `accelerate launch` asks for.

    Raises ConfigError for a setting that cannot be honoured, with the recipe's field that comes closest.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environ:  # `accelerate launch` always sets it
        return LaunchPlan()
    _refuse_others(environ)
    if _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed(environ)
    accumulate = _accumulate(environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"), "accelerate")
    precision = _precision(environ["ACCELERATE_MIXED_PRECISION"], "accelerate")
    if _is_on(environ, "ACCELERATE_USE_FSDP"):
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
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", ""):
        raise ConfigError(
            f"accelerate: dynamo_backend {backend!r} cannot be honoured: vlafit compiles no policies; set it "
            "to 'no'"
        )
    for name, key in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config"),
    ):
        if _is_on(environ, name):
            raise ConfigError(
                f"accelerate: {key} cannot be honoured: vlafit shards weights, gradients and optimiser "
                "states (--train.sharding full), and splits no layer over GPUs; choose MULTI_GPU or FSDP in "
                "`accelerate config`"
            )


def _precision(name: str, where: str) -> Literal["fp32", "bf16"] | None:
    """Return the precision; "no" is what accelerate writes for the default too, so it decides nothing."""
    match name.lower():
        case "bf16":
            return "bf16"
        case "no" | "":
            return None
    raise ConfigError(
        f"{where}: mixed_precision {name!r} cannot be honoured: vlafit computes in bf16 (--train.precision "
        "bf16), which needs no loss scaling, or fp32; set mixed_precision to 'bf16' or 'no'"
    )


def _accumulate(value: Any, where: str) -> int | None:
    if value in (None, "", "auto"):
        return None
    try:
        steps = int(value)
    except (TypeError, ValueError):
        steps = 0
    if steps < 1:
        raise ConfigError(f"{where}: gradient_accumulation_steps {value!r} is not a number of at least 1")
    return steps if steps > 1 else None  # 1 is what accelerate writes where nobody chose


# ------------------------------------------------------------------------------------------------- FSDP


def _fsdp(
    environ: Mapping[str, str], precision: Literal["fp32", "bf16"] | None, accumulate: int | None
) -> LaunchPlan:
    version = environ.get("FSDP_VERSION", "1")
    name = f"accelerate (FSDP {version})"
    strategy = environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    if version == "1":
        if strategy not in FSDP1_STRATEGIES:
            raise ConfigError(
                f"{name}: fsdp_sharding_strategy {strategy!r} cannot be honoured: vlafit shards over all "
                "processes; use FULL_SHARD (--train.sharding full) or SHARD_GRAD_OP (--train.sharding "
                "gradients)"
            )
        sharding = FSDP1_STRATEGIES[strategy]
    else:
        reshards = environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("true", "1")
        sharding = "full" if reshards else "gradients"
    _refuse_on(environ, "FSDP_OFFLOAD_PARAMS", name, "fsdp_offload_params", LESS_MEMORY)
    offload = "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"
    _refuse_on(environ, offload, name, "fsdp_activation_checkpointing_offload", LESS_MEMORY)
    if environ.get("FSDP_IGNORED_MODULES"):
        raise ConfigError(
            f"{name}: fsdp_ignored_modules cannot be honoured: vlafit shards every block of the policy; "
            "remove the key"
        )
    notes = [f"{name}: every block of the policy is sharded by itself, and checkpoints are written whole"]
    without_effect = {
        "FSDP_AUTO_WRAP_POLICY": "fsdp_auto_wrap_policy",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap",
        "FSDP_STATE_DICT_TYPE": "fsdp_state_dict_type",
    }
    keys = [key for variable, key in without_effect.items() if environ.get(variable)]
    if keys:
        notes[0] += f", so {', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect"
    recompute = "full" if _is_on(environ, "FSDP_ACTIVATION_CHECKPOINTING") else None
    return LaunchPlan(name, precision, sharding, accumulate, recompute, notes=tuple(notes))


def _refuse_on(environ: Mapping[str, str], variable: str, where: str, key: str, instead: str) -> None:
    if _is_on(environ, variable):
        raise ConfigError(f"{where}: {key} cannot be honoured: set it to false. {instead}")


# -------------------------------------------------------------------------------------------- DeepSpeed


def _deepspeed(environ: Mapping[str, str]) -> LaunchPlan:
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    file = _deepspeed_file(Path(path)) if path else {}
    zero = file.get("zero_optimization", {}) if path else {}
    stage = _stage(zero.get("stage", 0) if path else environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    name = f"accelerate (DeepSpeed ZeRO-{stage})"
    for key, variable in (
        ("offload_optimizer", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
        ("offload_param", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
    ):
        device = zero.get(key, {}).get("device", "none") if path else environ.get(variable, "none")
        if str(device).lower() not in ("none", ""):
            raise ConfigError(
                f"{name}: {key}_device {device!r} cannot be honoured: set it to 'none'. {LESS_MEMORY}"
            )
    for key in ("optimizer", "scheduler"):
        if key in file:
            raise ConfigError(
                f"{path}: the {key} of a DeepSpeed file cannot be honoured: remove it; the recipe's [optim] "
                "sets AdamW and its schedule"
            )
    mixed = environ["ACCELERATE_MIXED_PRECISION"]
    if _enabled(file, "fp16"):
        mixed = "fp16"
    elif _enabled(file, "bf16"):
        mixed = "bf16"
    steps, clip = (
        file.get(key) if path else environ.get(variable)
        for key, variable in (
            ("gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
            ("gradient_clipping", "ACCELERATE_GRADIENT_CLIPPING"),
        )
    )
    note = f"{name}: torch's FSDP2 shards in DeepSpeed's place, and checkpoints are written whole"
    if stage == 1:
        note += "; gradients are sharded, too"
    rows = file.get("train_micro_batch_size_per_gpu", "auto")
    notes = [note]
    if rows != "auto":
        notes.append(f"{path}: train_micro_batch_size_per_gpu {rows} has no effect: train.batch_size holds")
    return LaunchPlan(
        name,
        _precision(mixed, name),
        ZERO[stage],
        _accumulate(steps, name),
        clip_norm=_clip(clip, name),
        notes=tuple(notes),
    )


def _deepspeed_file(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(plain_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the DeepSpeed file of accelerate ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization", {}), dict):
        raise ConfigError(f"{path}: not a DeepSpeed file: expected a table, got {json.dumps(content)[:60]}")
    return content


def _stage(value: Any) -> int:
    try:
        return next(stage for stage in ZERO if stage == int(value))
    except (TypeError, ValueError, StopIteration):
        raise ConfigError(f"accelerate (DeepSpeed): zero stage {value!r} is not one of 0, 1, 2, 3") from None


def _enabled(file: Mapping[str, Any], key: str) -> bool:
    table = file.get(key, {})
    return isinstance(table, Mapping) and table.get("enabled") is True


def _clip(value: Any, where: str) -> float | None:
    if value in (None, "", "auto", "none"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: gradient_clipping {value!r} is not a number") from None


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("true", "1", "yes")
