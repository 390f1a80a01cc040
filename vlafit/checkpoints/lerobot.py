"""LeRobot's checkpoints of pi0, pi0.5 and SmolVLA: names, and what config.json says that shapes do not.

pi0 and pi0.5 come in two layouts: as `save_pretrained` writes them (every name begins with ``model.``, and
both of the tied pair are there), or as on the Hub (openpi's names, which only config.json tells apart from
openpi's).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlafit import config as configuration
from vlafit.checkpoints import openpi
from vlafit.checkpoints.names import NameMap, Translated, translate
from vlafit.checkpoints.shapes import depth_of, infer_config, shape_of
from vlafit.errors import WeightsError
from vlafit.policies import merge
from vlafit.policies.pi0 import Pi0Config
from vlafit.policies.smolvla import SIZES, SmolVLAConfig

_WITH_EXPERT = "model.vlm_with_expert."
_VLM = f"{_WITH_EXPERT}vlm.model."
_PROJECTIONS = (
    "state_proj.",
    "action_in_proj.",
    "action_out_proj.",
    "action_time_mlp_in.",
    "action_time_mlp_out.",
    "time_mlp_in.",
    "time_mlp_out.",
)

FORM = "LeRobot"

SMOLVLA = NameMap(
    form=FORM,
    prefixes=(
        ("vision.layers.", f"{_VLM}vision_model.encoder.layers."),
        ("vision.patch_embedding.", f"{_VLM}vision_model.embeddings.patch_embedding."),
        ("vision.position_embedding.", f"{_VLM}vision_model.embeddings.position_embedding."),
        ("vision.post_layernorm.", f"{_VLM}vision_model.post_layernorm."),
        ("projector.", f"{_VLM}connector.modality_projection."),
        ("language.", f"{_VLM}text_model."),
        ("expert.", f"{_WITH_EXPERT}lm_expert."),
        *((name, f"model.{name}") for name in _PROJECTIONS),
    ),
    unused=(f"{_WITH_EXPERT}vlm.lm_head.weight",),
)

PI0 = NameMap(  # as save_pretrained writes it
    form=FORM,
    prefixes=(
        *((ours, f"model.{theirs}") for ours, theirs in openpi.NAMES.prefixes),
        *((name, f"model.{name}") for name in _PROJECTIONS),
    ),
    ties={ours: f"model.{theirs}" for ours, theirs in openpi.NAMES.ties.items()},
    unused=tuple(f"model.{name}" for name in openpi.NAMES.unused),
)

BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
"""Statistics that LeRobot stored among the weights until its processors came (0.4)."""

TYPES = ("pi0", "pi05", "smolvla")
HEAD_DIM = {576: 64, 960: 64, 2048: 64}  # SmolLM2 135M, 360M and 1.7B by width: the decoders of SmolVLM2
TOWER_HEADS = {768: 12, 1152: 16}  # SigLIP B/16 and So400m/14, by width: the towers of SmolVLM2
ALWAYS: dict[str, object] = {
    "min_period": 4e-3,
    "max_period": 4.0,
}  # of the time embedding; no other is written
SMOLVLA_NEVER: dict[str, str] = {
    "add_image_special_tokens": "it puts special tokens around images",
    "adapt_to_pi_aloha": "it converts Aloha's joints inside the policy",
}


@dataclass(frozen=True)
class Described:
    """config.json of a LeRobot checkpoint."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Return the value of `key`, or None where there is none. Raises WeightsError for another type."""
        value = self.values.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise WeightsError(f"{self.path}: {key} is {value!r}, which is not what LeRobot writes there")
        return value


def describe(folder: Path) -> Described | None:
    """Return config.json in `folder` if it is one that LeRobot wrote, whatever the policy."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(values, dict) and "type" in values and {"input_features", "chunk_size"} & set(values):
        return Described(path, values)
    return None


def recognise(tensors: Mapping[str, Any], folder: Path) -> bool:
    """Whether these tensor names are LeRobot's, or openpi's with LeRobot's config.json beside them."""
    if any(name.startswith((_WITH_EXPERT, f"model.{openpi.PREFIX}")) for name in map(_plain, tensors)):
        return True
    return openpi.recognise(tensors) and describe(folder) is not None


def open_weights(
    tensors: Mapping[str, Tensor], folder: Path, given: Mapping[str, object], where: str
) -> tuple[Pi0Config | SmolVLAConfig, Translated]:
    """Return the policy's config, and the weights under our names.

    Raises WeightsError where config.json asks for something that we do not compute, or another family's
    weights lie beside it, or a key of `config` must be given.
    """
    named = {_plain(name): tensor for name, tensor in tensors.items()}
    buffers = tuple(name for name in named if name.startswith(BUFFERS))
    rest = {name: tensor for name, tensor in named.items() if name not in buffers}
    told = describe(folder)
    is_smolvla = any(name.startswith(_WITH_EXPERT) for name in rest)
    if is_smolvla:
        kind, names = "smolvla", SMOLVLA
    else:
        in_model = any(name.startswith("model.") for name in rest)
        names = PI0 if in_model else replace(openpi.NAMES, form=FORM)
        kind = "pi05" if f"{'model.' if in_model else ''}time_mlp_in.weight" in rest else "pi0"
    if told is not None and told.values["type"] != kind:
        raise WeightsError(
            f"{where}: config.json says type {told.values['type']!r}, the tensors are those of {kind}: "
            "config.json "
            "or the weights are another checkpoint's"
        )
    # Once LeRobot has trained a policy its head and embedding are two tensors, and the head feeds nothing.
    heads = tuple(
        theirs for ours, theirs in names.ties.items() if theirs in rest and names.theirs(ours) in rest
    )
    rest = {name: tensor for name, tensor in rest.items() if name not in heads}
    translated = translate(rest, names, where)
    translated = replace(translated, unused=translated.unused + heads + buffers)
    if is_smolvla:
        return _smolvla_config(translated.weights, folder, told, given, where), translated
    return infer_config(translated.weights, _known_of_pi0(told, kind), given, where), translated


def _plain(name: str) -> str:
    """Return a tensor's name without what torch.compile puts into it."""
    return name.replace("._orig_mod.", ".")


def _known_of_pi0(told: Described | None, kind: str) -> dict[str, object]:
    if told is None:
        return {}
    _require_always(told)
    found: dict[str, object] = {
        "chunk": told.get("chunk_size", int),
        "max_tokens": told.get("tokenizer_max_length", int),
        "state_dim": told.get("max_state_dim", int) if kind == "pi05" else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _smolvla_config(
    weights: Mapping[str, Tensor],
    folder: Path,
    told: Described | None,
    given: Mapping[str, object],
    where: str,
) -> SmolVLAConfig:
    def shape(name: str, dims: int) -> Sequence[int]:
        return shape_of(weights, name, dims, where, "SmolVLA")

    vision_width, _, patch, _ = shape("vision.patch_embedding.weight", 4)
    patches, _ = shape("vision.position_embedding.weight", 2)
    width, folded = shape("projector.proj.weight", 2)
    vocab, _ = shape("language.embed_tokens.weight", 2)
    expert_width, action_dim = shape("action_in_proj.weight", 2)
    public = SIZES["smolvla"]
    read: dict[str, Any] = {
        "vision": {
            "width": vision_width,
            "depth": depth_of(weights, "vision"),
            "mlp": shape("vision.layers.0.mlp.fc1.weight", 2)[0],
            "heads": TOWER_HEADS.get(vision_width),
            "patch": patch,
            "image_size": math.isqrt(patches) * patch,
            "shuffle": math.isqrt(folded // vision_width),
        },
        "language": {
            "width": width,
            "depth": depth_of(weights, "language"),
            "mlp": shape("language.layers.0.mlp.gate_proj.weight", 2)[0],
            "head_dim": HEAD_DIM.get(width),
            "vocab": vocab,
        },
        "expert": {
            "width": expert_width,
            "mlp": shape("expert.layers.0.mlp.gate_proj.weight", 2)[0],
            "self_every": _self_every(weights, expert_width),
        },
        "state_dim": shape("state_proj.weight", 2)[1],
        "action_dim": action_dim,
    }
    if width == public.language.width:
        sizes = {"image_size": public.image_size, "chunk": public.chunk, "max_tokens": public.max_tokens}
        read = merge(sizes, read)
    values = merge(merge(read, _known_of_smolvla(told, folder, read["language"]["depth"])), given)
    for key in (
        "vision.heads",
        "language.head_dim",
        "expert.self_every",
        "image_size",
        "chunk",
        "max_tokens",
    ):
        section, _, leaf = key.rpartition(".")
        if (values[section] if section else values).get(leaf) is None:
            raise WeightsError(
                f"{where}: neither the tensors nor a config beside them tell {key!r}; give it as config "
                f"{{{key!r}: ...}}"
            )
    head_dim = values["language"]["head_dim"]
    if not isinstance(head_dim, int) or head_dim < 1:
        raise WeightsError(
            f"{where}: config: language.head_dim must be a whole number above 0, not {head_dim!r}"
        )
    heads = {
        "heads": shape("language.layers.0.self_attn.q_proj.weight", 2)[0] // head_dim,
        "kv_heads": shape("language.layers.0.self_attn.k_proj.weight", 2)[0] // head_dim,
    }
    values = merge({"language": heads}, values)
    return configuration.build(SmolVLAConfig, values, f"{where}: config")


def _self_every(weights: Mapping[str, Tensor], expert_width: int) -> int | None:
    """Tell self from cross layers by what their keys are made of: the expert's tokens, or prefix keys."""
    depth = depth_of(weights, "expert")
    keys = [weights.get(f"expert.layers.{i}.self_attn.k_proj.weight") for i in range(depth)]
    if any(key is None or key.ndim != 2 or key.shape[0] == expert_width for key in keys):
        return None
    selves = [i for i, key in enumerate(keys) if key is not None and key.shape[1] == expert_width]
    if not selves:
        return 0
    return selves[1] if len(selves) > 1 else depth


def _known_of_smolvla(told: Described | None, folder: Path, depth: int) -> dict[str, Any]:
    """Return what config.json, and the vision-language model's own config inside the folder, tell."""
    if told is None:
        return {}
    _require_always(told)
    for key, why in SMOLVLA_NEVER.items():
        if told.get(key, bool):
            raise WeightsError(f"{told.path}: {key} is true: {why}, which is not supported here")
    shallow = told.get("num_expert_layers", int)
    if shallow is not None and shallow > 0 and shallow != depth:
        raise WeightsError(
            f"{told.path}: num_expert_layers is {shallow} for {depth} layers of the language model; an "
            "expert "
            "that is less deep is not supported here"
        )
    known: dict[str, Any] = {
        "chunk": told.get("chunk_size", int),
        "max_tokens": told.get("tokenizer_max_length", int),
        "expert": {},
    }
    every = told.get("self_attn_every_n_layers", int)
    mode = told.get("attention_mode", str)
    if mode is not None and "cross" not in mode:
        known["expert"] = {"self_every": 1}
    elif every is not None:
        known["expert"] = {"self_every": max(every, 0)}
    sides = told.get("resize_imgs_with_padding", list)
    if sides is not None:
        if len(sides) != 2 or sides[0] != sides[1]:
            raise WeightsError(
                f"{told.path}: resize_imgs_with_padding is {sides}; only squares are supported here"
            )
        known["image_size"] = sides[0]
    # By its last word: an export names the folder beside it by an absolute path, and may have moved.
    vlm = folder / Path(str(told.values.get("vlm_model_name"))).name / "config.json"
    if vlm.is_file():
        known = merge(known, _known_of_vlm(vlm))
    return {key: value for key, value in known.items() if value is not None}


def _known_of_vlm(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {
            "vision": {"heads": values["vision_config"]["num_attention_heads"]},
            "language": {"head_dim": values["text_config"]["head_dim"]},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not the config.json of a SmolVLM ({error!r})") from error


def _require_always(told: Described) -> None:
    for key, value in ALWAYS.items():
        if told.values.get(key, value) != value:
            raise WeightsError(
                f"{told.path}: {key} is {told.values[key]!r}; only {value!r} is supported here"
            )
    if re.fullmatch(r"pi0|pi05|smolvla", str(told.values["type"])) is None:
        raise WeightsError(
            f"{told.path}: type {told.values['type']!r} is not one that is supported here "
            f"({', '.join(TYPES)})"
        )
