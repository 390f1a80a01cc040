"""Write a policy for openpi: weights, and norm_stats.json.

pi0 and pi0.5 as its PyTorch code saves them, with its config.json; pi0-FAST, which only its JAX code has, as
an Orbax folder (`write_jax.py`).
"""

import json
from pathlib import Path

import numpy as np
import torch

from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.formats.openpi import write_jax
from vlafit.checkpoints.formats.openpi.norm_stats import FILE
from vlafit.checkpoints.formats.openpi.variants import dropped_token_loss, gemma_refusals, variants
from vlafit.checkpoints.name_map import back
from vlafit.checkpoints.precision import dtype_name
from vlafit.codec import Codec
from vlafit.codec.normaliser import EPSILON, Normaliser
from vlafit.nn.deferred import save_tensors
from vlafit.nn.policy import ParameterInfo, Policy
from vlafit.policies.pi0 import Pi0, Pi0Config
from vlafit.policies.pi0_fast import Pi0Fast

ASSET = "vlafit"  # the asset's name, where the robot has none that can be a folder's
IMAGE_SIZE = 224  # openpi, models/model.py: IMAGE_RESOLUTION


def refusals(policy: Policy, codec: Codec | None) -> list[str]:
    """Say why openpi cannot hold this policy or codec; empty where it can."""
    if not isinstance(policy, Pi0 | Pi0Fast):
        return ["openpi has no such family: it holds pi0, pi0.5 and pi0-FAST"]
    config = policy.config
    reasons = size_refusals(policy)
    if isinstance(policy, Pi0Fast):
        reasons += write_jax.refusals(policy, codec)
        return reasons + (codec_refusals(codec, "pi0-FAST", "quantile") if codec is not None else [])
    assert isinstance(config, Pi0Config)
    if config.state_dim != config.action_dim:
        reasons.append(
            f"openpi pads states as wide as actions; this policy's are {config.state_dim} and "
            f"{config.action_dim}"
        )
    # openpi, training/config.py: quantiles for every model but pi0, whatever the user says
    named, wanted = ("pi0.5", "quantile") if config.pi05 else ("pi0", "mean_std")
    return reasons + (codec_refusals(codec, named, wanted) if codec is not None else [])


def size_refusals(policy: Pi0 | Pi0Fast) -> list[str]:
    """Say which sizes openpi has no names for."""
    config = policy.config
    reasons = gemma_refusals(config, "openpi")
    if config.vision.image_size != IMAGE_SIZE:
        reasons.append(
            f"openpi's images have {IMAGE_SIZE} pixels a side, this policy's {config.vision.image_size}"
        )
    return reasons


def keeps_float32(info: ParameterInfo, policy: Policy) -> bool:
    """Whether openpi keeps a parameter in float32 when the policy is bfloat16."""
    if info.part == "vision":
        return info.kind in ("conv", "embedding")
    return info.kind == "norm" or info.part == "projections"


def codec_refusals(codec: Codec, policy: str, wanted: str) -> list[str]:
    """Say how the codec normalises otherwise than openpi does for this policy."""
    reasons = []
    for what, method in (("states", codec.config.normalisation), ("actions", codec.config.of_actions)):
        if method not in (wanted, f"lerobot_{wanted}"):
            reasons.append(f"openpi normalises {policy} by {wanted}, this codec its {what} by {method}")
    return reasons


def write(folder: Path, policy: Pi0 | Pi0Fast, codec: Codec | None) -> tuple[str, ...]:
    """Write everything into the empty `folder`; return what to know about it."""
    if isinstance(policy, Pi0Fast):
        return (*write_jax.write(folder, policy, codec), *_write_statistics(folder, codec))
    return (*_write_weights(folder, policy), *_write_statistics(folder, codec))


def _write_weights(folder: Path, policy: Pi0) -> list[str]:
    config = policy.config
    weights = {name: p.detach().cpu().contiguous() for name, p in policy.named_parameters()}
    embedding = weights["language.embed_tokens.weight"]
    dead = torch.zeros(embedding.shape[0], config.expert.width, dtype=embedding.dtype)
    tensors = back(weights, openpi.NAMES) | {openpi.NAMES.unused[0]: dead}
    name, tied = next(iter(openpi.NAMES.ties.items()))
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt", openpi.NAMES.file_name(name): tied})
    sizes = variants(config)
    described = {
        "action_dim": config.action_dim,
        "action_horizon": config.chunk,
        "paligemma_variant": sizes["language"],
        "action_expert_variant": sizes["expert"],
        "precision": dtype_name(policy),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    notes = ["openpi's config must say pi05=True" if config.pi05 else "openpi's config must say pi05=False"]
    if config.pi05 and config.state_input == "none":
        notes.append("openpi's config must say discrete_state_input=False")
    if config.action_tokens:
        notes.append(dropped_token_loss("openpi"))
    if policy.steps != type(policy).steps:
        notes.append(f"openpi must sample with num_steps={policy.steps}")
    return notes


def _write_statistics(folder: Path, codec: Codec | None) -> list[str]:
    if codec is None:
        return ["no norm_stats.json: the checkpoint has no codec"]
    notes = []
    named = codec.embodiment.name
    asset = named if named and Path(named).name == named else ASSET
    (folder / "assets" / asset).mkdir(parents=True)
    content = {"norm_stats": {"state": _statistics(codec, "state"), "actions": _statistics(codec, "action")}}
    (folder / "assets" / asset / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    notes.append(f"openpi's data config must have asset_id={asset!r}, whose statistics are in assets/")
    if any(codec.config.relative):
        mask = ", ".join(str(on) for on in codec.config.relative)
        notes.append(f"openpi's data config must make actions relative by DeltaActions(mask=({mask}))")
    if codec.config.prompt == "line":
        notes.append(
            "openpi cleans instructions (underscores and newlines become blanks); this codec did not"
        )
    notes.append("openpi always asks with PaliGemma's tokenizer; the codec's must be that")
    return notes


def _statistics(codec: Codec, name: str) -> dict[str, list[float]]:
    """Return statistics with which openpi's formulas, which have no floors, do what vlafit does."""
    statistics = codec.statistics[name]
    method = codec.config.normalisation if name == "state" else codec.config.of_actions
    normal = Normaliser.fit(statistics, method)
    arrays = {n: getattr(statistics, n) for n in ("mean", "std", "q01", "q99")}
    if method.endswith("mean_std"):
        arrays |= {"mean": normal.offset, "std": np.maximum(normal.scale - EPSILON, 0.0)}
    else:
        arrays |= {"q01": normal.offset, "q99": normal.offset + normal.scale - EPSILON}
    return {n: array.tolist() for n, array in arrays.items() if array is not None}
