"""Write a GR00T N1.7 and its codec as LeRobot saves them: config.json, weights, processors, the tokenizer.

LeRobot builds the network from the checkpoint that `base_model_path` names, and reads its weights first.
Where NVIDIA's public one has other sizes, a base lies beside, with the same weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlafit.checkpoints.formats.groot import names
from vlafit.checkpoints.formats.groot.config import PUBLIC_BACKBONES
from vlafit.checkpoints.formats.groot.write import (
    ATTENDS,
    BACKBONE,
    chat_refusals,
    has_public_backbone,
    write_backbone,
    write_model,
)
from vlafit.checkpoints.formats.lerobot.groot_gripper import LIBERO, libero_form
from vlafit.checkpoints.formats.lerobot.groot_processors import EMBODIMENTS, ENCODE, PACK, POST, PRE, UNPACK
from vlafit.checkpoints.formats.lerobot.stored_statistics import ACTION, STATE
from vlafit.checkpoints.formats.lerobot.write_config import image_key
from vlafit.checkpoints.precision import dtype_name
from vlafit.checkpoints.tensor_files import write_json
from vlafit.codec import Codec
from vlafit.codec.described import learned
from vlafit.codec.images import groot_crop
from vlafit.codec.statistics import ARRAYS
from vlafit.nn.deferred import save_tensors
from vlafit.nn.policy import Policy
from vlafit.policies.groot import SIZES, Groot, GrootConfig

PREFIX = "_groot_model."
NAMES = names.name_map(PREFIX, "LeRobot GR00T")
PUBLIC_BASE = "nvidia/GR00T-N1.7-3B"
BASE = "base"  # folder of the checkpoint that LeRobot opens first, where it is not the public one
OWN_TAG = "vlafit"  # of an embodiment whose row has no tag in LeRobot's table


def refusals(policy: Groot, codec: Codec | None) -> list[str]:
    """Say why LeRobot cannot hold this policy or codec; empty where it can."""
    reasons = chat_refusals(policy, codec)
    if len(policy.config.embodiment_rows) > 1:
        reasons.append(
            f"it learned {len(policy.config.embodiment_rows)} embodiments (embodiment_rows), and LeRobot's "
            "processors know one"
        )
    if not policy.config.attend_padding:
        reasons.append(ATTENDS.format(program="LeRobot's GR00T"))
    if codec is None:
        return [*reasons, "the checkpoint has no codec, and LeRobot needs its processors"]
    c = codec.config
    if c.normalisation != c.of_actions or c.normalisation not in ("groot_min_max", "identity"):
        reasons.append(
            "LeRobot maps states and actions of GR00T to their range and clips them ('groot_min_max'), this "
            f"codec normalises states by {c.normalisation!r} and actions by {c.of_actions!r}"
        )
    if c.prompt not in ("groot", "text"):
        reasons.append(f"LeRobot asks GR00T with a prompt of the form 'groot', this codec with {c.prompt!r}")
    if c.framing not in ("groot", "nvidia_area"):
        reasons.append(
            f"LeRobot frames images of GR00T as 'groot' or 'nvidia_area', this codec as {c.framing!r}"
        )
    if any(c.relative):
        reasons.append(
            "LeRobot normalises GR00T's relative actions by statistics of each step, vlafit does not"
        )
    return reasons


def holds_gripper(policy: Policy, codec: Codec) -> bool:
    """Whether all that is learned of the columns in another form is LIBERO's gripper, which LeRobot has."""
    form = codec.config.action_form
    own = libero_form(codec.embodiment.action.shape[0])
    return isinstance(policy, Groot) and not own.is_plain and form == own and len(learned(codec)) == 1


def write(folder: Path, policy: Policy, codec: Codec, final: Path) -> tuple[str, ...]:
    """Write everything into the empty `folder`, which will lie at `final`; return what to know about it."""
    assert isinstance(policy, Groot)
    weights = {name: p.detach().cpu() for name, p in policy.named_parameters()}
    tensors = names.written(weights, policy.config.vision.patch, NAMES)
    for name, tied in NAMES.ties.items():
        tensors[tied] = tensors.pop(NAMES.file_name(name))
    save_tensors(
        {n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    own_base = not has_public_sizes(policy.config)
    backbone = PUBLIC_BACKBONES[0] if has_public_backbone(policy.config) else str(final / BACKBONE)
    base = str(final / BASE) if own_base else PUBLIC_BASE
    write_json(folder / "config.json", _config(policy, codec, base))
    _write_processors(folder, policy, codec, backbone)
    words = codec.required_tokenizer
    words.save(folder / "tokenizer")
    notes = [
        f"LeRobot takes the tokenizer of {backbone}, not the one in tokenizer/",
    ]
    if not has_public_backbone(policy.config):
        write_backbone(folder / BACKBONE, policy.config, words)
    if own_base:
        (folder / BASE).mkdir()
        write_model(folder / BASE, policy, backbone)
        notes.append(
            f"LeRobot opens {final / BASE} first, which holds the same weights, because these sizes are not "
            f"those of {PUBLIC_BASE}. Where the folder moves, change base_model_path in config.json, and "
            f"model_name in {BASE}/config.json and {PRE}"
        )
    return tuple(notes)


def has_public_sizes(config: GrootConfig) -> bool:
    """Whether LeRobot builds this network from NVIDIA's public checkpoint."""
    public = SIZES["groot"]
    fields = ("image_size", "state_dim", "action_dim", "chunk", "positions", "embodiments", "expert")
    same = all(getattr(config, name) == getattr(public, name) for name in fields)
    return same and has_public_backbone(config) and config.language.depth == public.language.depth


def _config(policy: Groot, codec: Codec, base: str) -> dict[str, Any]:
    c, robot = policy.config, codec.embodiment
    inputs: dict[str, Any] = {}
    for name in filter(None, codec.config.cameras):
        height, width, _ = robot.camera(name).shape
        inputs[image_key(name)] = {"type": "VISUAL", "shape": [3, height, width]}
    inputs[STATE] = {"type": "STATE", "shape": list(robot.state.shape)}
    return {
        "type": "groot",
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": {ACTION: {"type": "ACTION", "shape": list(robot.action.shape)}},
        "device": "cpu",
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": False,
        "repo_id": None,
        "private": None,
        "tags": None,
        "license": None,
        "pretrained_path": None,
        "chunk_size": c.chunk,
        "n_action_steps": c.chunk,
        "max_state_dim": c.state_dim,
        "max_action_dim": c.action_dim,
        "normalization_mapping": dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY"),
        "base_model_path": base,
        "action_decode_transform": LIBERO if holds_gripper(policy, codec) else None,
        "embodiment_tag": _tag(c)[0],
        "tune_llm": False,
        "tune_visual": False,
        "tune_projector": True,
        "tune_diffusion_model": True,
        "tune_vlln": True,
        "tune_top_llm_layers": 0,
        "num_inference_timesteps": policy.steps,
        "use_flash_attention": False,
        "use_relative_actions": False,
        "relative_exclude_joints": [],
        "use_bf16": dtype_name(policy) == "bfloat16",
        "model_params_fp32": True,
        "image_size": [c.image_size, c.image_size],
    }


def _tag(config: GrootConfig) -> tuple[str, dict[str, int]]:
    """Return the tag of the embodiment's row, and a table that has it."""
    row = config.embodiment_rows[0]
    tags = [tag for tag, number in EMBODIMENTS.items() if number == row]
    return (tags[0], dict(EMBODIMENTS)) if tags else (OWN_TAG, {**EMBODIMENTS, OWN_TAG: row})


def _write_processors(folder: Path, policy: Groot, codec: Codec, backbone: str) -> None:
    c, size = policy.config, policy.config.image_size
    normalised = codec.config.normalisation != "identity"
    cameras = [name for name in codec.config.cameras if name]
    tag, mapping = _tag(c)
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    pack: dict[str, Any] = {
        "registry_name": PACK,
        "config": {
            "state_horizon": 1,
            "action_horizon": c.chunk,
            "valid_action_horizon": c.chunk,
            "video_horizon": None,
            "max_state_dim": c.state_dim,
            "max_action_dim": c.action_dim,
            "language_key": "task",
            "formalize_language": codec.config.prompt == "groot",
            "embodiment_tag": tag,
            "embodiment_mapping": mapping,
            "normalize_min_max": normalised,
            "state_dropout_prob": 0.0,
            "clip_outliers": True,
            "use_percentiles": False,
            "video_modality_keys": None if cameras == sorted(cameras) else cameras,
            "raw_stats": {},
            "modality_config": {},
        },
    }
    encode = {
        "registry_name": ENCODE,
        "config": {
            "model_name": backbone,
            "image_crop_size": [groot_crop(size)] * 2,
            "image_target_size": [size, size],
            "shortest_image_edge": None,
            "crop_fraction": codec.config.crop or None,
            "use_albumentations": codec.config.framing == "nvidia_area",
            "letter_box_transform": codec.config.letter_box,
            "device": "cpu",
        },
    }
    undo: dict[str, Any] = {
        "registry_name": UNPACK,
        "config": {
            "env_action_dim": codec.embodiment.action.shape[0],
            "normalize_min_max": normalised,
            "clip_normalized_action": True,
            "libero_gripper_action": holds_gripper(policy, codec),
            "libero_gripper_binarize": True,
        },
    }
    opening = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
    ]
    for name, steps in ((PRE, [*opening, pack, encode, device]), (POST, [undo, dict(device)])):
        stem = name.removesuffix(".json")
        for number, step in enumerate(steps):
            if step["registry_name"] in (PACK, UNPACK):
                step["state_file"] = f"{stem}_step_{number}_{step['registry_name']}.safetensors"
                save_file(_statistics(codec), folder / str(step["state_file"]))
        write_json(folder / name, {"name": stem, "steps": steps})


def _statistics(codec: Codec) -> dict[str, Tensor]:
    columns = ((STATE, codec.statistics["state"]), (ACTION, codec.statistics["action"]))
    return {
        f"{feature}.{name}": torch.from_numpy(np.asarray(array, dtype=np.float32))
        for feature, statistics in columns
        for name in ARRAYS
        if (array := getattr(statistics, name)) is not None
    }


def adapter_refusals(policy: Groot, layers: Sequence[str]) -> list[str]:
    """Say why LeRobot cannot load adapters on these layers; empty where it can."""
    reasons = names.table_refusals(layers)
    if not has_public_sizes(policy.config):
        reasons.append(
            "LeRobot opens a checkpoint of these sizes before the adapters' base, because they are not those "
            f"of {PUBLIC_BASE}, and vlafit writes only one below adapters: add --merge"
        )
    return reasons
