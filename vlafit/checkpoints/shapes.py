"""The config of a pi0 or pi0.5 policy that its tensors' shapes imply, given under our names."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from vlafit import config as configuration
from vlafit.errors import ConfigError, WeightsError, did_you_mean
from vlafit.policies import merge, override
from vlafit.policies.pi0 import SIZES, Pi0Config

KV_HEADS = (
    1  # openpi and LeRobot have no other number, so the keys' rows are one head: reference implementation
)
PROMPT_TOKENS = {False: 48, True: 200}  # pi0, pi0.5: reference implementation


def infer_config(
    weights: Mapping[str, Tensor], known: Mapping[str, object], given: Mapping[str, object], where: str
) -> Pi0Config:
    """Read dimensions from the shapes of `weights`.

    What shapes cannot tell comes from `known` (the checkpoint's own config) or `given` (the user's; it wins
    over everything), else from the format's constants or the public size of the same widths. Raises
    WeightsError naming the tensor that is missing, or the key of `config` to give.
    """

    def shape(name: str, dims: int) -> Sequence[int]:
        return shape_of(weights, name, dims, where, "pi0 or pi0.5")

    _require_known(merge({}, given), asdict(SIZES["pi0"]), f"{where}: config")
    told = merge(known, given)
    pi05 = any(name.startswith("time_mlp_") or name.endswith("norm.dense.weight") for name in weights)
    vision_width, _, patch, _ = shape("vision.patch_embedding.weight", 4)
    patches, _ = shape("vision.position_embedding.weight", 2)
    vocab, width = shape("language.embed_tokens.weight", 2)
    q_rows, _ = shape("language.layers.0.self_attn.q_proj.weight", 2)
    k_rows, _ = shape("language.layers.0.self_attn.k_proj.weight", 2)
    expert_width, action_dim = shape("action_in_proj.weight", 2)
    head_dim = k_rows // KV_HEADS
    language = told.get("language")
    if isinstance(language, Mapping):
        head_dim = language.get("head_dim", head_dim)
    if not isinstance(head_dim, int) or head_dim < 1:
        raise WeightsError(
            f"{where}: config: language.head_dim must be a whole number above 0, not {head_dim!r}"
        )
    read: dict[str, Any] = {
        "pi05": pi05,
        "state_input": "prompt" if pi05 else "continuous",
        "vision": {
            "width": vision_width,
            "depth": depth_of(weights, "vision"),
            "mlp": shape("vision.layers.0.mlp.fc1.weight", 2)[0],
            "patch": patch,
            "image_size": math.isqrt(patches) * patch,
        },
        "language": {
            "width": width,
            "depth": depth_of(weights, "language"),
            "mlp": shape("language.layers.0.mlp.gate_proj.weight", 2)[0],
            "heads": q_rows // head_dim,
            "kv_heads": k_rows // head_dim,
            "head_dim": head_dim,
            "vocab": vocab,
        },
        "expert": {"width": expert_width, "mlp": shape("expert.layers.0.mlp.gate_proj.weight", 2)[0]},
        # pi0.5 has no state token; its codec needs the padded width alone, which is that of the actions.
        "state_dim": action_dim if pi05 else shape("state_proj.weight", 2)[1],
        "action_dim": action_dim,
        "max_tokens": PROMPT_TOKENS[pi05],
    }
    public = SIZES["pi05" if pi05 else "pi0"]
    if (vision_width, width, expert_width) == (
        public.vision.width,
        public.language.width,
        public.expert.width,
    ):
        read = merge({"chunk": public.chunk, "vision": {"heads": public.vision.heads}}, read)
        _require_public(public, read, told, where)
    values = merge(read, told)
    for key, value in (("vision.heads", values["vision"].get("heads")), ("chunk", values.get("chunk"))):
        if value is None:
            raise WeightsError(
                f"{where}: neither the tensors nor a config beside them tell {key!r}; give it as config "
                f"{{{key!r}: ...}}"
            )
    try:
        return configuration.build(Pi0Config, values, f"{where}: config")
    except ConfigError as error:
        override(public, given, f"{where}: config")  # raises for what is wrong in itself with the user's
        raise WeightsError(f"{where}: its tensors' shapes do not go together: {error}") from error


def _require_known(given: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for a key of the user that no config has, before anything is found missing."""
    for key, value in given.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, fields)}")
        if isinstance(value, Mapping) and isinstance(fields[key], Mapping):
            _require_known(value, fields[key], f"{where}: {key}")


def _require_public(public: Pi0Config, read: Mapping, told: Mapping, where: str) -> None:
    """Refuse a checkpoint that is as wide as the public size and yet another: layers or rows are missing.

    Number of layers, rows of the vocabulary and the like are free as far as the other tensors go.
    """
    wanted = asdict(public)
    odd = []
    for part in ("vision", "language", "expert"):
        given = told.get(part)
        known = given if isinstance(given, Mapping) else {}
        for key, value in read[part].items():
            if value != wanted[part][key] and key not in known:
                odd.append(f"{part}.{key} is {value}, not {wanted[part][key]}")
    if odd:
        raise WeightsError(
            f"{where}: as wide as the public pi0, and yet {'; '.join(odd)}: the checkpoint is not whole. If"
            " it is meant so, say it in config"
        )


def shape_of(weights: Mapping[str, Tensor], name: str, dims: int, where: str, what: str) -> Sequence[int]:
    """Return the shape of the tensor for our `name`. Raises WeightsError where it is missing or odd."""
    if name not in weights:
        raise WeightsError(f"{where}: no tensor for our {name!r}: not a whole {what} checkpoint")
    if weights[name].ndim != dims:
        raise WeightsError(
            f"{where}: the tensor for our {name!r} has shape {tuple(weights[name].shape)};"
            f" it must have {dims} dimensions"
        )
    return weights[name].shape


def depth_of(weights: Mapping[str, Tensor], part: str) -> int:
    """Return the number of layers of `part`, by the highest one."""
    found = (re.match(rf"{part}\.layers\.(\d+)\.", name) for name in weights)
    return 1 + max((int(layer[1]) for layer in found if layer), default=0)
