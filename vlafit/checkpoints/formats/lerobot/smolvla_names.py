"""The config of a SmolVLA policy in LeRobot's form: by its tensors, and what lies beside them must agree.

LeRobot's config.json has the padded widths and the numbers of layers; the sizes of the vision-language model
are in that model's own config.json, or known where it is the public one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlafit.checkpoints.infer.pi0 import (
    EMBEDDING,
    Inferred,
    Told,
    action_axes,
    decoder_axes,
    deeper,
    judge,
    read_heads,
    read_sizes,
    require_head_dim,
    require_known,
    tower_axes,
    untold,
)
from vlafit.checkpoints.infer.voting import (
    Stated,
    contradictions,
    depth_of,
    first_stated,
    misfits,
    value_at,
    vote,
)
from vlafit.errors import WeightsError
from vlafit.policies import merge
from vlafit.policies.smolvla import SIZES

if TYPE_CHECKING:
    from vlafit.checkpoints.formats.lerobot.names import Described

HEAD_DIM = {576: 64, 960: 64, 2048: 64}  # SmolLM2 135M, 360M and 1.7B by width: the decoders of SmolVLM2
TOWER_HEADS = {768: 12, 1152: 16}  # SigLIP B/16 and So400m/14, by width: the towers of SmolVLM2
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

AXES: dict[str, str] = {
    **tower_axes(),
    "projector.proj.weight": "language.width folded",
    **EMBEDDING,
    **decoder_axes("language"),
    **decoder_axes("expert"),
    # Cross layers make their keys of the prefix's keys, self layers of the expert's tokens.
    "expert.layers.*.self_attn.k_proj.weight": "keys -",
    "expert.layers.*.self_attn.v_proj.weight": "keys -",
    **action_axes("language.width"),
}


def expert_mlp(width: int) -> int:
    """Return the MLP that LeRobot gives an expert of this width (its get_intermediate_size)."""
    return 256 * -(-4 * int(2 * width / 3) // 256)


def infer_smolvla(
    weights: Mapping[str, Tensor],
    described: "Described | None",
    folder: Path,
    told: Told,
    given: Mapping[str, object],
    where: str,
    widths: Mapping[str, object] | None = None,
) -> Inferred:
    """Read dimensions from `weights` and compare them with LeRobot's config.json, as `infer_config` does."""
    public = SIZES["smolvla"]
    require_known(merge({}, given), asdict(public), f"{where}: config")
    depth = depth_of(weights, "language", "expert")
    values, stated = _told_by(described, folder, depth)
    said = merge(values, given)
    wanted = merge(given, widths or {})
    votes = vote(weights, AXES, told.witnesses, told.theirs)
    read, guessed = read_sizes(votes, stated, wanted, ("vision", "language", "expert"))
    vision, language, expert = (read[part] for part in ("vision", "language", "expert"))
    folded = votes.most("folded")
    vision |= {"depth": depth_of(weights, "vision"), "heads": TOWER_HEADS.get(vision["width"])}
    said_fold = first_stated(stated, "vision.shuffle") or 1
    vision["shuffle"] = said_fold if folded is None else max(1, math.isqrt(folded // vision["width"]))
    language |= {"depth": depth, "head_dim": HEAD_DIM.get(language["width"])}
    head_dim = value_at(said, "language.head_dim") or language["head_dim"]
    every = [one.value for one in stated if one.key == "expert.self_every"]
    expert["self_every"] = _self_every(weights, depth, expert["width"], votes.most("keys"), every)
    sizes: dict[str, Any] = {}
    if language["width"] == public.language.width:
        stated += _public(stated, said)
        sizes = {"image_size": public.image_size, "chunk": public.chunk, "max_tokens": public.max_tokens}
    if head_dim is not None:
        require_head_dim(head_dim, where)
        language |= read_heads(votes, stated, head_dim)
    odd = contradictions(read, stated, wanted, votes, told.witnesses, told.theirs)
    odd += untold(guessed)
    known = merge(merge(merge(sizes, read), deeper(read, stated)), said)
    stand_in = {
        "vision.heads": 1,
        "language.head_dim": 2,
        "expert.self_every": 1,
        "image_size": vision["patch"] * vision["shuffle"],
        "chunk": 1,
        "max_tokens": 1,
    }
    asked = {key: value for key, value in stand_in.items() if value_at(known, key) is None}
    if head_dim is None:
        known = merge({"language": read_heads(votes, stated, stand_in["language.head_dim"])}, known)
    models, shapeless = (public, SIZES["smolvla-tiny"]), misfits(weights, AXES, votes)
    return judge(weights, known, asked, given, models, (odd, shapeless), told.theirs, where)


def _self_every(
    weights: Mapping[str, Tensor], depth: int, width: int, keys: int | None, stated: Sequence[int]
) -> int | None:
    """Tell self from cross layers by what their keys are made of: the expert's tokens, or prefix keys.

    The rhythm that most layers agree with wins; None where both are equally wide, and nothing tells.
    """
    columns = {
        layer: tensor.shape[1]
        for layer in range(depth)
        for leaf in ("k_proj", "v_proj")
        if (tensor := weights.get(f"expert.layers.{layer}.self_attn.{leaf}.weight")) is not None
        and tensor.ndim == 2
    }
    if width == keys:
        return stated[0] if stated else None

    def agreeing(every: int) -> tuple[int, bool]:
        selves = {layer: every > 0 and layer % every == 0 for layer in columns}
        return sum((size == width) == selves[layer] for layer, size in columns.items()), every in stated

    return max(range(depth + 1), key=agreeing)


def _told_by(described: "Described | None", folder: Path, depth: int) -> tuple[dict[str, Any], list[Stated]]:
    """Return what config.json, and the vision-language model's own config inside the folder, tell."""
    if described is None:
        return {}, []
    for key, why in NEVER.items():
        if described.get(key, bool):
            raise WeightsError(f"{described.path}: {key} is true: {why}, which is not supported here")
    layers = described.get("num_vlm_layers", int) or 0
    shallow = described.get("num_expert_layers", int) or 0
    deep = layers if layers > 0 else depth
    if shallow > 0 and shallow != deep:
        raise WeightsError(
            f"{described.path}: num_expert_layers is {shallow} for {deep} layers of the language model; an"
            " expert that is less deep is not supported here"
        )
    stated = described.state({"max_state_dim": "state_dim", "max_action_dim": "action_dim"})
    if layers > 0:
        stated += described.state({"num_vlm_layers": "language.depth"})
    every = described.get("self_attn_every_n_layers", int)
    mode = described.get("attention_mode", str)
    if mode is not None and "cross" not in mode:
        stated.append(Stated("expert.self_every", 1, f"config.json (attention_mode {mode!r})"))
    elif every is not None:
        source = "config.json (self_attn_every_n_layers)"
        stated.append(Stated("expert.self_every", min(max(every, 0), depth), source))
    values: dict[str, Any] = {
        "chunk": described.get("chunk_size", int),
        "max_tokens": described.get("tokenizer_max_length", int),
        "image_size": _side(described),
    }
    name = str(described.values.get("vlm_model_name"))
    # By its last word: an export names the folder beside it by an absolute path, and may have moved.
    vlm = folder / Path(name).name / "config.json"
    if vlm.is_file() and folder.resolve() in vlm.resolve().parents:
        more, sizes = _told_by_vlm(vlm, layers)
        values, stated = merge(values, more), stated + sizes
    elif name == PUBLIC_VLM:
        stated += _public(stated, {}, f"config.json (vlm_model_name {name!r})")
    factor = described.get("expert_width_multiplier", (int, float))
    width = next((one.value for one in stated if one.key == "language.width"), None)
    if factor is not None and width is not None:
        source = f"config.json (expert_width_multiplier {factor:g} of {width})"
        stated.append(Stated("expert.width", int(width * factor), source))
        stated.append(Stated("expert.mlp", expert_mlp(int(width * factor)), source))
    return {key: value for key, value in values.items() if value is not None}, stated


def _side(described: "Described") -> int | None:
    sides = described.get("resize_imgs_with_padding", list)
    if sides is not None and (len(sides) != 2 or sides[0] != sides[1]):
        raise WeightsError(
            f"{described.path}: resize_imgs_with_padding is {sides}; only squares are supported here"
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


def _told_by_vlm(path: Path, layers: int) -> tuple[dict[str, Any], list[Stated]]:
    """Return what the vision-language model's own config says; `layers`: how many are kept, 0: all."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        vision, text = values["vision_config"], values["text_config"]
        told = {
            "vision": {"heads": vision["num_attention_heads"]},
            "language": {"head_dim": text["head_dim"]},
        }
        stated = [
            Stated(f"{part}.{ours}", section[theirs], f"{path.parent.name}/{path.name} ({name}.{theirs})")
            for part, name, section, keys in (
                ("vision", "vision_config", vision, _OF_VISION),
                ("language", "text_config", text, _OF_TEXT),
            )
            for theirs, ours in keys.items()
            if theirs in section
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not the config.json of a SmolVLM ({error!r})") from error
    return told, stated


def _public(stated: Sequence[Stated], said: Mapping[str, Any], source: str = "") -> list[Stated]:
    """Return the public sizes of what nobody states; the depth where no layers were cut off is not known."""
    known = {one.key for one in stated}
    source = source or "the public SmolVLA, as wide; say it in config if it is meant so"
    return [
        Stated(f"{part}.{key}", value, source)
        for part, sizes in asdict(SIZES["smolvla"]).items()
        if part in ("vision", "language")
        for key, value in sizes.items()
        if f"{part}.{key}" not in known and value_at(said, f"{part}.{key}") is None
    ]
