"""Read each module's adapter settings from adapter_config.json; what vlafit does not repeat is refused."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlafit.errors import WeightsError
from vlafit.tuning.inject import Group, peft_config

UNREAD = {  # keys of adapter_config.json that change nothing here, and why
    "auto_mapping": "which class to build; the tensors tell",
    "base_model_name_or_path": "looked at before",
    "revision": "looked at before",
    "inference_mode": "whether it was to be trained on",
    "peft_version": "who wrote it",
    "task_type": "which class of peft wraps the model",
    "target_modules": "matched with the modules",
    "modules_to_save": "their weights lie beside the adapters",
    "init_lora_weights": "how it began; PiSSA and its like are refused",
    "init_weights": "how it began",
    "rank_pattern": "read layer by layer",
    "alpha_pattern": "read layer by layer",
    "total_step": "how long AdaLoRA trained",
    "lora_ga_config": "how it began",
    "eva_config": "how it began",
}
BEGUN = (True, False, "gaussian", "orthogonal", "eva")  # ways to begin that leave the weights below alone


def reader(config: Mapping[str, Any], path: Path) -> Callable[[str], dict[str, Any]]:
    """Return a function from a module's name to the options of its adapter, as a rule has them."""
    from peft.utils.other import get_pattern_key

    kind = config["peft_type"]

    def of(key: str, default: Any = None) -> Any:
        if key not in config and default is None:
            raise WeightsError(f"{path}: has no {key}")
        return config.get(key, default)

    def by_pattern(patterns: str, key: str, module: str) -> Any:
        table = config.get(patterns) or {}
        return table.get(get_pattern_key(list(table), module), of(key))

    def sizes(alpha: str, module: str) -> dict[str, Any]:
        rank = by_pattern("rank_pattern", "r", module)
        return {"rank": rank, "alpha": by_pattern("alpha_pattern", alpha, module)}

    def settings(module: str) -> dict[str, Any]:
        match kind:
            case "LORA":
                options = {
                    "mode": "dora" if config.get("use_dora") else "lora",
                    **sizes("lora_alpha", module),
                }
                return options | {
                    "dropout": of("lora_dropout", 0.0),
                    "rslora": bool(config.get("use_rslora")),
                }
            case "LOHA":
                return {"mode": "loha", **sizes("alpha", module)}
            case "LOKR":
                return {"mode": "lokr", **sizes("alpha", module), "factor": of("decompose_factor", -1)}
            case "ADALORA":
                options = {"mode": "adalora", "rank": of("init_r"), "alpha": of("lora_alpha")}
                options |= {"dropout": of("lora_dropout", 0.0), "target_rank": of("target_r")}
                return options | {"orthogonal": of("orth_reg_weight", 0.5)}
            case "OFT":
                return {"mode": "oft", "block": of("oft_block_size")}
            case "IA3":
                return {"mode": "ia3"}
            case "MISS":
                return {"mode": "miss", "rank": of("r"), "dropout": of("miss_dropout", 0.0)}
        raise WeightsError(
            f"{path}: adapters of the kind {kind} are not known here; merge them into their base with peft"
            " (merge_and_unload), and load what that saves"
        )

    return settings


def require_repeated(group: Group, modules: Mapping[str, str], config: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError for settings of adapter_config.json with which peft computes something else than
    vlafit.
    """
    renamed = replace(group, layers={modules[layer]: a for layer, a in group.layers.items()})
    written = json.loads(json.dumps(peft_config(renamed).to_dict(), default=_plain))
    unread = {
        *UNREAD,
        *({"r", "lora_alpha", "alpha"} if config["peft_type"] in ("LORA", "LOHA", "LOKR") else ()),
    }
    unsupported = []
    for key, value in config.items():
        same = _ordered(value) == _ordered(written[key]) if key in written else not value
        if key not in unread and not same:
            unsupported.append(f"{key} is {value!r}")
    if config.get("init_lora_weights", True) not in BEGUN:  # such as PiSSA: peft's tuners/lora/layer.py
        unsupported.append(
            f"init_lora_weights is {config['init_lora_weights']!r}, which changes the weights below"
        )
    if config["peft_type"] == "ADALORA" and config.get("rank_pattern"):
        unsupported.append("rank_pattern is what AdaLoRA pruned")
    if unsupported:
        raise WeightsError(f"{path}: settings that are not supported here: {'; '.join(unsupported)}")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else getattr(value, "value", str(value))


def _ordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value
