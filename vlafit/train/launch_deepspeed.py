"""Translate accelerate's DeepSpeed settings, and DeepSpeed's own file, into the recipe's fields."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from vlafit.errors import ConfigError
from vlafit.files import parse_json, plain_text
from vlafit.train.launch_plan import (
    FALSE,
    LESS_MEMORY,
    TRUE,
    LaunchPlan,
    Sharding,
    accumulation_of,
    have_no_effect,
    keys_asked_for,
    precision_of,
)

ZERO: Mapping[int, Sharding] = {0: "none", 1: "gradients", 2: "gradients", 3: "full"}
IN_ITS_PLACE = (
    "DeepSpeed itself does not run. torch's {} does in its place, because its runs resume on any number of "
    "processes and a stage may change what is trained. Checkpoints are written whole"
)
DEEPSPEED_WITHOUT_EFFECT = {
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": ("zero3_init_flag", ("", "false")),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": ("zero3_save_16bit_model", ("", "false")),
}
OLD_OFFLOAD = ("cpu_offload", "cpu_offload_param", "cpu_offload_params")  # before there were tables
REFUSED_OF_ZERO = {
    "zenflow": "every gradient is used in its own step",
    "zeropp_loco_param": "gradients are summed over processes in the precision that they have",
    "zero_quantized_gradients": "gradients are summed over processes in the precision that they have",
    "zero_quantized_weights": "a strategy with `quantise` keeps frozen weights in 4 or 8 bits",
    "zero_quantized_nontrainable_weights": "a strategy with `quantise` keeps frozen weights in 4 or 8 bits",
}
"""Keys of zero_optimization that would change what is learned, or how -> what comes closest."""
BF16, FP16, AUTOCAST = ("bf16", "bfloat16"), ("fp16",), "torch_autocast"
READ_OF_A_FILE = (
    *BF16, *FP16, AUTOCAST, "gradient_accumulation_steps", "gradient_clipping", "zero_optimization",
)  # fmt: skip
"""Keys of a DeepSpeed file that become values of the recipe."""
READ_OF_TABLES = {  # their own keys that do
    "zero_optimization": (
        "stage",
        "offload_optimizer",
        "offload_param",
        *OLD_OFFLOAD,
        *REFUSED_OF_ZERO,
        "mics_shard_size",
    ),
    **dict.fromkeys((*BF16, *FP16), ("enabled",)),
    AUTOCAST: ("enabled", "dtype"),
}
AUTOCAST_DTYPES = {  # as DeepSpeed's DtypeEnum has them
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "no"),
}
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu")
REFUSED_IN_A_FILE = {
    "optimizer": "the recipe's [optim] sets AdamW and its schedule",
    "scheduler": "the recipe's [optim] sets AdamW and its schedule",
    "amp": "vlafit computes in bf16 (--train.precision bf16)",
    "fp8": "vlafit computes in bf16 (--train.precision bf16)",
    "compression_training": "a strategy with `quantise` keeps frozen weights in 4 or 8 bits",
    "quantize_training": "a strategy with `quantise` keeps frozen weights in 4 or 8 bits",
    "tensor_parallel": "vlafit splits no layer over GPUs (--train.sharding full shards the weights)",
    "pipeline": "vlafit splits no layer over GPUs (--train.sharding full shards the weights)",
    "curriculum_learning": "the order of samples follows from train.seed",
    "data_efficiency": "the order of samples follows from train.seed",
    "progressive_layer_drop": "every layer is computed in every step",
}
"""Keys of a DeepSpeed file that would change what is learned, or how -> what comes closest."""


def read_deepspeed(environ: Mapping[str, str]) -> LaunchPlan:
    """Return what accelerate's DeepSpeed settings ask for: those of the file that they name, or their own.

    Raises ConfigError for what would change what is learned, with what comes closest.
    """
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    file = _deepspeed_file(Path(path)) if path else {}
    zero = _table(file, "zero_optimization")
    stage = _stage(zero.get("stage", 0) if path else environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    name = f"accelerate (DeepSpeed ZeRO-{stage})"
    for key, variable in (
        ("offload_optimizer", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
        ("offload_param", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
    ):
        device = _table(zero, key).get("device", "none") if path else environ.get(variable, "none")
        if path and isinstance(zero.get(key), str):  # no table, and still a wish
            device = zero[key]
        if str(device).lower() not in ("none", ""):
            raise ConfigError(
                f"{name}: {key}_device {device!r} cannot be honoured: set it to 'none'. {LESS_MEMORY}"
            )
    _refuse_in_a_file(file, path)
    _refuse_of_zero(zero, path, environ)
    mixed, said = _mixed(file, path), environ["ACCELERATE_MIXED_PRECISION"].lower()
    steps, clip = (
        file.get(key) if path else environ.get(variable)
        for key, variable in (
            ("gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
            ("gradient_clipping", "ACCELERATE_GRADIENT_CLIPPING"),
        )
    )
    note = f"{name}: {IN_ITS_PLACE.format('FSDP2' if stage else 'DDP')}"
    if stage == 1:
        note += "; gradients are sharded, too"
    if keys := keys_asked_for(environ, DEEPSPEED_WITHOUT_EFFECT):
        note += f"; {have_no_effect(keys)}"
    return LaunchPlan(
        name,
        precision_of(mixed or said, name),
        ZERO[stage],
        accumulation_of(steps, name),
        clip_norm=_clip(clip, name),
        notes=(note, *_without_effect(file, path), *_about_precision(file, path, mixed, said)),
    )


def _about_precision(file: Mapping[str, Any], path: str, mixed: str, said: str) -> Iterator[str]:
    """Yield sentences where a file's precision is left to accelerate, or is not accelerate's."""
    told = False  # transformers' template leaves both bf16 and fp16 to it
    for table in (*BF16, *FP16):
        if not told and _truth(_table(file, table).get("enabled"), f"{path}: {table}.enabled") == "auto":
            told, nothing = True, ", which decides nothing: vlafit's default holds (--train.precision)"
            end = nothing if said in ("no", "") and not mixed else ""
            yield f'{path}: {table}.enabled "auto" follows accelerate\'s mixed_precision {said!r}{end}'
        elif table in file and not mixed and said == {"bfloat16": "bf16"}.get(table, table):
            yield f"{path}: {table}.enabled false has no effect: accelerate's mixed_precision {said!r} holds"
    if mixed and said not in ("no", "", mixed):
        yield f"{path}: its precision {mixed} holds; accelerate's mixed_precision {said!r} has no effect"


def _refuse_of_zero(zero: Mapping[str, Any], path: str, environ: Mapping[str, str]) -> None:
    where = f"{path}: zero_optimization"
    for key in OLD_OFFLOAD:
        if key in zero and _truth(zero[key], f"{where}.{key}") is not False:
            raise ConfigError(f"{where}.{key} cannot be honoured: set it to false. {LESS_MEMORY}")
    for key, instead in REFUSED_OF_ZERO.items():
        if key in zero and not _is_off(zero[key]):
            raise ConfigError(f"{where}.{key} cannot be honoured: remove it; {instead}")
    size, world = zero.get("mics_shard_size", -1), int(environ.get("WORLD_SIZE", "1"))
    if not isinstance(size, int) or size > 0:
        copies = f"{world // size}" if isinstance(size, int) and 1 < size < world else "COPIES"
        raise ConfigError(
            f"{where}.mics_shard_size {json.dumps(size)} cannot be honoured: remove it; --train.sharding "
            f"full --train.replicas {copies} (processes / mics_shard_size) shards within groups, as it does"
        )


def _refuse_in_a_file(file: Mapping[str, Any], path: str) -> None:
    for key in (*BF16, *FP16, AUTOCAST):
        if file.get(key) is not None and not isinstance(file[key], Mapping):
            raise ConfigError(
                f'{path}: {key} {json.dumps(file[key])} is no table: write {{"enabled": true}} or remove it'
            )
    for key, instead in REFUSED_IN_A_FILE.items():
        if key in file and not _is_off(file[key]):
            raise ConfigError(
                f"{path}: the {key} of a DeepSpeed file cannot be honoured: remove it; {instead}"
            )
    for table in BF16:
        for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
            if _truth(_table(file, table).get(key), f"{path}: {table}.{key}") is not False:
                raise ConfigError(
                    f"{path}: {table}.{key} true cannot be honoured: set it to false. Without sharding, "
                    "--train.weights bf16 keeps what is trained in bf16, and --optim.states 8bit the states"
                )
    if (operation := file.get("gradient_allreduce_op", "mean")) != "mean":
        raise ConfigError(
            f"{path}: gradient_allreduce_op {json.dumps(operation)} cannot be honoured: remove it; the loss "
            "is the mean over all samples of a step, so its gradient does not grow with the processes"
        )


def _mixed(file: Mapping[str, Any], path: str) -> str:
    """Return the precision that a DeepSpeed file enables by name; empty where it enables none."""
    if any(_enabled(file, name, path) for name in FP16):
        return "fp16"
    if any(_enabled(file, name, path) for name in BF16):
        return "bf16"
    if _enabled(file, AUTOCAST, path):
        dtype = str(file[AUTOCAST].get("dtype", "fp16"))  # torch's autocast without a dtype
        return AUTOCAST_DTYPES.get(dtype, dtype)
    return ""


def _without_effect(file: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield sentences about a DeepSpeed file's keys that change nothing."""
    for key in BATCHES:
        if (rows := file.get(key, "auto")) != "auto":
            yield f"{path}: {key} {rows} has no effect: train.batch_size holds"
    others = [key for key in file if key not in (*READ_OF_A_FILE, *REFUSED_IN_A_FILE, *BATCHES)]
    for table, read in READ_OF_TABLES.items():
        if table == "zero_optimization" or _enabled(file, table, path):
            others += [f"{table}.{key}" for key in _table(file, table) if key not in read]
    if others:
        yield f"{path}: {have_no_effect(others)}"


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


def _table(file: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a table of a DeepSpeed file; empty where the key has no table."""
    table = file.get(key)
    return table if isinstance(table, Mapping) else {}


def _enabled(file: Mapping[str, Any], key: str, path: str) -> bool:
    return _truth(_table(file, key).get("enabled"), f"{path}: {key}.enabled") is True


def _truth(value: object, where: str) -> bool | Literal["auto"]:
    """Return a truth value as DeepSpeed reads one, or "auto". Raises ConfigError for other values."""
    text = str(value).lower()
    if value is None or text in FALSE:
        return False
    if text == "auto":
        return "auto"
    if text in TRUE:
        return True
    raise ConfigError(f'{where} {json.dumps(value)} is none of true, false and "auto"')


def _is_off(value: object) -> bool:
    if isinstance(value, Mapping):
        value = value.get("enabled", True)
    return value is None or str(value).lower() in FALSE


def _clip(value: Any, where: str) -> float | None:
    if value in (None, "", "auto", "none"):
        return None
    try:
        norm = float(value)
    except (TypeError, ValueError):
        norm = math.nan
    if not 0 <= norm < math.inf:
        raise ConfigError(
            f"{where}: gradient_clipping {value!r} is not a number of at least 0 (0: no clipping)"
        )
    return norm
