"""Read SmolVLA's sizes from LeRobot's config.json and from the SmolVLM's config.json beside it.

LeRobot's config.json has the padded widths and the numbers of layers; the sizes of the vision-language model
are in that model's own config.json, or known where it is the public one.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlafit.checkpoints.formats.lerobot.read_config import CONVERT, LeRobotConfig
from vlafit.checkpoints.tensor_files import read_json_object
from vlafit.checkpoints.voting import Stated
from vlafit.errors import WeightsError, brief
from vlafit.policies import merge_dotted
from vlafit.policies.smolvla import SIZES

PUBLIC_VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"  # that of smolvla_base, and LeRobot's default
NEVER: dict[str, str] = {
    "add_image_special_tokens": "it puts special tokens around images",
    "adapt_to_pi_aloha": "it converts Aloha's joints inside the policy",
}
# What our SmolVLM computes, and what transformers takes where the file is silent: the defaults of its
# LlamaConfig and SmolVLMVisionConfig (5.23).
COMPUTED: dict[str, dict[str, tuple[object, object]]] = {
    "text_config": {
        "rms_norm_eps": (1e-5, 1e-6),
        "hidden_act": ("silu", "silu"),
        "attention_bias": (False, False),
        "mlp_bias": (False, False),
    },
    "vision_config": {
        "hidden_act": ("gelu_pytorch_tanh", "gelu_pytorch_tanh"),
        "layer_norm_eps": (1e-6, 1e-6),
        "num_channels": (3, 3),
    },
}


def expert_mlp(width: int) -> int:
    """Return the MLP that LeRobot gives an expert of this width (its get_intermediate_size)."""
    return 256 * -(-4 * int(2 * width / 3) // 256)


def smolvla_evidence(
    config: LeRobotConfig | None, folder: Path, depth: int
) -> tuple[dict[str, Any], list[Stated]]:
    """Return config values and stated sizes from config.json and the vision-language model's own config."""
    if config is None:
        return {}, []
    for key, why in NEVER.items():
        if config.get(key, bool):
            remedy = CONVERT if key == "adapt_to_pi_aloha" else ""
            raise WeightsError(f"{config.path}: {key} is true: {why}, which is not supported here{remedy}")
    layers = config.get("num_vlm_layers", int) or 0
    shallow = config.get("num_expert_layers", int) or 0
    deep = layers if layers > 0 else depth
    if shallow > 0 and shallow != deep:
        raise WeightsError(
            f"{config.path}: num_expert_layers is {shallow} for {deep} layers of the language model; an"
            " expert that is less deep is not supported here"
        )
    stated = config.state({"max_state_dim": "state_dim", "max_action_dim": "action_dim"})
    if layers > 0:
        stated += config.state({"num_vlm_layers": "language.depth"})
    every = config.get("self_attn_every_n_layers", int)
    mode = config.get("attention_mode", str)
    if mode is not None and "cross" not in mode:
        stated.append(Stated("expert.self_every", 1, f"config.json (attention_mode {mode!r})"))
    elif every is not None:
        source = "config.json (self_attn_every_n_layers)"
        stated.append(Stated("expert.self_every", min(max(every, 0), depth), source))
    values: dict[str, Any] = {
        "chunk": config.get("chunk_size", int),
        "max_tokens": config.get("tokenizer_max_length", int),
        "image_size": _side(config),
    }
    name = str(config.values.get("vlm_model_name"))
    # By its last word: an export names the folder beside it by an absolute path, and may have moved.
    vlm = folder / Path(name).name / "config.json"
    if vlm.is_file() and folder.resolve() in vlm.resolve().parents:
        more, sizes = _vlm_evidence(vlm, layers)
        values, stated = merge_dotted(values, more), stated + sizes
    elif name == PUBLIC_VLM:
        stated += _public(stated, f"config.json (vlm_model_name {name!r})")
    factor = config.get("expert_width_multiplier", (int, float))
    width = next((one.value for one in stated if one.key == "language.width"), None)
    if factor is not None and width is not None:
        source = f"config.json (expert_width_multiplier {factor:g} of {width})"
        stated.append(Stated("expert.width", int(width * factor), source))
        stated.append(Stated("expert.mlp", expert_mlp(int(width * factor)), source))
    return {key: value for key, value in values.items() if value is not None}, stated


def _side(config: LeRobotConfig) -> int | None:
    sides = config.get("resize_imgs_with_padding", list)
    if sides is not None and (len(sides) != 2 or sides[0] != sides[1]):
        raise WeightsError(
            f"{config.path}: resize_imgs_with_padding is {sides}; only squares are supported here"
        )
    return sides[0] if sides is not None else None


_OF_TEXT = {
    "hidden_size": "width",
    "intermediate_size": "mlp",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
}
_OF_VISION = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "intermediate_size": "mlp",
    "patch_size": "patch",
    "image_size": "image_size",
}


def _vlm_evidence(path: Path, layers: int) -> tuple[dict[str, Any], list[Stated]]:
    """Return what the vision-language model's own config says; `layers` are kept, 0: all."""
    try:
        values = read_json_object(path)
        vision, text = values["vision_config"], values["text_config"]
        known = {
            "vision": {"heads": vision["num_attention_heads"]},
            "language": {"head_dim": text["head_dim"]},
        }
        stated = [
            Stated(f"{part}.{field}", section[key], f"{path.parent.name}/{path.name} ({name}.{key})")
            for part, name, section, keys in (
                ("vision", "vision_config", vision, _OF_VISION),
                ("language", "text_config", text, _OF_TEXT),
            )
            for key, field in keys.items()
            if key in section
        ]
        for name, constants in COMPUTED.items():
            for key, (value, silent) in constants.items():
                if values[name].get(key, silent) != value:
                    raise WeightsError(
                        f"{path}: {name}.{key} is {values[name].get(key, silent)!r}; only {value!r} is"
                        " supported here"
                    )
        if "scale_factor" in values:
            source = f"{path.parent.name}/{path.name} (scale_factor)"
            stated.append(Stated("vision.shuffle", values["scale_factor"], source))
        if layers <= 0 and "num_hidden_layers" in text:
            source = f"{path.parent.name}/{path.name} (text_config.num_hidden_layers)"
            stated.append(Stated("language.depth", text["num_hidden_layers"], source))
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not the config.json of a SmolVLM ({brief(error)})") from error
    return known, stated


def _public(stated: Sequence[Stated], source: str) -> list[Stated]:
    """Return the public sizes of what nobody states; the depth where no layers were cut off is not known."""
    known = {one.key for one in stated}
    return [
        Stated(f"{part}.{key}", value, source)
        for part, sizes in asdict(SIZES["smolvla"]).items()
        if part in ("vision", "language")
        for key, value in sizes.items()
        if f"{part}.{key}" not in known
    ]
