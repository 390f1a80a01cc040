"""adapter_config.json: what it says of each module's adapter; what we do not repeat is refused."""

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
}
BEGUN = (True, False, "gaussian", "orthogonal")  # ways to begin that leave the weights below alone


def reader(said: Mapping[str, Any], path: Path) -> Callable[[str], dict[str, Any]]:
    """Return a function from a module's name to the options of its adapter, as a rule has them."""
    from peft.utils.other import get_pattern_key

    kind = said["peft_type"]

    def of(key: str, default: Any = None) -> Any:
        if key not in said and default is None:
            raise WeightsError(f"{path}: has no {key}")
        return said.get(key, default)

    def by_pattern(patterns: str, key: str, module: str) -> Any:
        table = said.get(patterns) or {}
        return table.get(get_pattern_key(list(table), module), of(key))

    def sizes(alpha: str, module: str) -> dict[str, Any]:
        rank = by_pattern("rank_pattern", "r", module)
        return {"rank": rank, "alpha": by_pattern("alpha_pattern", alpha, module)}

    def options(module: str) -> dict[str, Any]:
        match kind:
            case "LORA":
                found = {"mode": "dora" if said.get("use_dora") else "lora", **sizes("lora_alpha", module)}
                return found | {"dropout": of("lora_dropout", 0.0), "rslora": bool(said.get("use_rslora"))}
            case "LOHA":
                return {"mode": "loha", **sizes("alpha", module)}
            case "LOKR":
                return {"mode": "lokr", **sizes("alpha", module), "factor": of("decompose_factor", -1)}
            case "ADALORA":
                found = {"mode": "adalora", "rank": of("init_r"), "alpha": of("lora_alpha")}
                found |= {"dropout": of("lora_dropout", 0.0), "target_rank": of("target_r")}
                return found | {"orthogonal": of("orth_reg_weight", 0.5)}
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

    return options


def require_repeated(group: Group, theirs: Mapping[str, str], said: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError for settings of adapter_config.json with which peft computes otherwise than we."""
    renamed = replace(group, layers={theirs[layer]: a for layer, a in group.layers.items()})
    ours = json.loads(json.dumps(peft_config(renamed).to_dict(), default=_plain))
    unread = {
        *UNREAD,
        *({"r", "lora_alpha", "alpha"} if said["peft_type"] in ("LORA", "LOHA", "LOKR") else ()),
    }
    odd = []
    for key, value in said.items():
        same = _ordered(value) == _ordered(ours[key]) if key in ours else not value
        if key not in unread and not same:
            odd.append(f"{key} is {value!r}")
    if said.get("init_lora_weights", True) not in BEGUN:
        odd.append(f"init_lora_weights is {said['init_lora_weights']!r}, which changes the weights below")
    if said["peft_type"] == "ADALORA" and said.get("rank_pattern"):
        odd.append("rank_pattern is what AdaLoRA pruned")
    if odd:
        raise WeightsError(f"{path}: settings that are not supported here: {'; '.join(odd)}")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else getattr(value, "value", str(value))


def _ordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value
