"""Write config.json as LeRobot does, and say which sizes it has no names for.

LeRobot builds a network from names of sizes, so only those it can name go there (`size_refusals`).
"""

import math
from typing import Any, Literal

from vlafit.checkpoints.formats.lerobot.read_config import ALWAYS
from vlafit.checkpoints.formats.lerobot.read_processors import ACTION, EMPTY, IMAGES, MODES, STATE
from vlafit.checkpoints.formats.lerobot.relative_actions import mask_of
from vlafit.checkpoints.formats.lerobot.smolvla_config import PUBLIC_VLM, expert_mlp
from vlafit.checkpoints.formats.lerobot.xvla_config import lerobot_values
from vlafit.checkpoints.formats.openpi.variants import gemma_refusals, variants
from vlafit.checkpoints.precision import dtype_name
from vlafit.codec import Codec
from vlafit.codec.action_text import SKIPPED
from vlafit.codec.normaliser import Normalisation
from vlafit.nn.policy import Policy
from vlafit.policies.pi0 import Pi0Config
from vlafit.policies.pi0_fast import Pi0FastConfig
from vlafit.policies.smolvla import SIZES, SmolVLAConfig
from vlafit.policies.xvla import XVLAConfig

PERIODS = ("min_period", "max_period")  # SmolVLA's file has no more of the keys in ALWAYS
Kind = Literal["pi0", "pi05", "pi0_fast", "smolvla", "xvla"]
TEXT_TOKENIZER, ACTION_TOKENIZER = "tokenizer", "action_tokenizer"  # folders that pi0-FAST names
LOCAL_VLM = "vlm"  # folder of the vision-language model, where no public one has the size; see write.py
WRITTEN: dict[Normalisation, str] = {
    "mean_std": "MEAN_STD",
    "quantile": "QUANTILES",
    **{mode: key for key, mode in MODES.items()},
}


def size_refusals(policy: Policy) -> list[str]:
    """Say which sizes LeRobot cannot name."""
    config = policy.config
    if isinstance(config, Pi0Config):
        reasons = gemma_refusals(config, "LeRobot")
        if config.pi05 and config.state_input != "prompt":
            reasons.append("LeRobot's pi0.5 always writes the state into the prompt, this policy does not")
        return reasons
    if isinstance(config, XVLAConfig):
        if not config.attends_padding:
            return ["LeRobot's X-VLA reads the padding of the prompt, this policy does not (attends_padding)"]
        return []
    if isinstance(config, Pi0FastConfig):
        reasons = gemma_refusals(config, "LeRobot")
        if config.rules != "lerobot":
            reasons.append(
                "LeRobot's pi0-FAST begins the action part with the token that begins a sequence, this "
                f"policy (rules {config.rules!r}) does not"
            )
        return reasons
    assert isinstance(config, SmolVLAConfig)
    reasons = []
    width, mlp = _expert_of(config)
    if (width, mlp) != (config.expert.width, config.expert.mlp):
        reasons.append(
            f"LeRobot gives an expert of width {config.expert.width} an MLP of {mlp}, this policy's is "
            f"{config.expert.mlp}"
        )
    return reasons


def _has_public_vlm(config: SmolVLAConfig) -> bool:
    """Whether the published SmolVLM2 is the model below the policy, except for text layers that it cut
    off.
    """
    sizes, public = ((c.vision, {**vars(c.language), "depth": 0}) for c in (config, SIZES["smolvla"]))
    return sizes == public and config.language.depth <= 32


def describe(policy: Policy, codec: Codec, kind: Kind) -> dict[str, Any]:
    """Return what config.json says of the policy and its codec."""
    config, c = policy.config, codec.config
    modes = modes_of(codec)
    common = {
        "type": kind,
        "n_obs_steps": 1,
        "input_features": _inputs(codec),
        "output_features": {ACTION: {"type": "ACTION", "shape": list(codec.embodiment.action.shape)}},
        "device": "cpu",
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": False,
        "repo_id": None,
        "private": None,
        "tags": None,
        "license": None,
        "pretrained_path": None,
        "chunk_size": config.chunk,
        "n_action_steps": config.chunk,
        "normalization_mapping": modes,
        "max_state_dim": config.state_dim,
        "max_action_dim": config.action_dim,
        "empty_cameras": sum(not name for name in c.cameras),
        "tokenizer_max_length": c.max_tokens,
    }
    if isinstance(config, XVLAConfig):
        # LeRobot counts a listed empty camera twice; num_image_views alone makes the missing views.
        seen = {key: one for key, one in common["input_features"].items() if not key.startswith(EMPTY)}
        common |= {"input_features": seen, "empty_cameras": 0}
        return common | lerobot_values(config, len(seen) - 1, policy.steps)
    if isinstance(config, Pi0FastConfig):
        names, exclude = _relative_names(codec)
        return common | {
            "paligemma_variant": variants(config)["language"],
            "action_expert_variant": "gemma_300m",  # a field that LeRobot does not read
            "dtype": dtype_name(policy),
            "image_resolution": [c.image_size, c.image_size],
            "use_relative_actions": any(c.relative),
            "relative_exclude_joints": exclude,
            "action_feature_names": names,
            "max_action_tokens": config.action_tokens,
            "max_decoding_steps": config.action_tokens,
            "text_tokenizer_name": TEXT_TOKENIZER,
            "action_tokenizer_name": ACTION_TOKENIZER,
            "temperature": config.temperature,
            "fast_skip_tokens": SKIPPED,
            "validate_action_token_prefix": False,  # a chunk that cannot be decoded ends no evaluation
            "use_kv_cache": True,
        }
    common |= {key: value for key, value in ALWAYS.items() if kind != "smolvla" or key in PERIODS}
    if isinstance(config, SmolVLAConfig):
        every = config.expert.self_every
        return common | {
            "resize_imgs_with_padding": [config.image_size, config.image_size],
            "adapt_to_pi_aloha": False,
            "use_delta_joint_actions_aloha": False,
            "num_steps": policy.steps,
            "use_cache": True,
            "freeze_vision_encoder": True,
            "train_expert_only": True,
            "train_state_proj": True,
            "vlm_model_name": PUBLIC_VLM if _has_public_vlm(config) else LOCAL_VLM,
            "load_vlm_weights": False,
            "add_image_special_tokens": False,
            "attention_mode": "cross_attn",
            "prefix_length": -1,
            "pad_language_to": "longest",
            "num_expert_layers": -1,
            "num_vlm_layers": config.language.depth,
            "self_attn_every_n_layers": every if every else -1,
            "expert_width_multiplier": _multiplier(config),
        }
    names, exclude = _relative_names(codec)
    sizes = variants(config)
    return common | {
        "paligemma_variant": sizes["language"],
        "action_expert_variant": sizes["expert"],
        "dtype": dtype_name(policy),
        "num_inference_steps": policy.steps,
        "image_resolution": [c.image_size, c.image_size],
        "use_relative_actions": any(c.relative),
        "relative_exclude_joints": exclude,
        "action_feature_names": names,
    }


def _inputs(codec: Codec) -> dict[str, Any]:
    features: dict[str, Any] = {}
    empty = 0
    for name in codec.config.cameras:
        if name:
            height, width, _ = codec.embodiment.camera(name).shape
            features[image_key(name)] = {"type": "VISUAL", "shape": [3, height, width]}
    for name in codec.config.cameras:
        if not name:  # LeRobot puts missing cameras last; where they stand makes no difference
            side = codec.config.image_size
            features[f"{EMPTY}{empty}"] = {"type": "VISUAL", "shape": [3, side, side]}
            empty += 1
    return features | {STATE: {"type": "STATE", "shape": list(codec.embodiment.state.shape)}}


def image_key(camera: str) -> str:
    """Return LeRobot's name of the feature of a camera."""
    return camera if camera.startswith("observation.") else IMAGES + camera


def modes_of(codec: Codec) -> dict[str, str]:
    """Return LeRobot's names for how each kind of feature is normalised."""
    return {
        "VISUAL": "IDENTITY",
        "STATE": WRITTEN[codec.config.normalisation],
        "ACTION": WRITTEN[codec.config.of_actions],
    }


def _relative_names(codec: Codec) -> tuple[list[str] | None, list[str]]:
    """Return names of the action's dimensions, and which stay absolute, so that LeRobot finds our mask."""
    mask, labels = codec.config.relative, list(codec.embodiment.action.labels)
    named = zip(labels, mask, strict=True) if labels and mask else ()
    absolute = [label for label, on in named if not on]
    if not any(mask) or (labels and mask_of(labels, absolute, len(mask)) == mask):
        return labels or None, absolute
    made = [f"{'relative' if on else 'absolute'}_{i}" for i, on in enumerate(mask)]
    return made, ["absolute"] if not all(mask) else []


def _multiplier(config: SmolVLAConfig) -> float:
    """Return the factor by which LeRobot finds the expert's width; it cuts the product to a whole number."""
    width = config.language.width
    factor = config.expert.width / width
    return factor if int(width * factor) == config.expert.width else math.nextafter(factor, math.inf)


def _expert_of(config: SmolVLAConfig) -> tuple[int, int]:
    """Return the width and MLP of the expert that LeRobot makes (its get_intermediate_size)."""
    width = int(config.language.width * _multiplier(config))
    return width, expert_mlp(width)
