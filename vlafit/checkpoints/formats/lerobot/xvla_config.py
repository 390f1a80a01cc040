"""X-VLA's sizes in config.json, both ways: LeRobot's file, and the authors', which lacks the robot.

The sizes of Florence-2 are in the table `florence_config`, in Microsoft's keys or in those of transformers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig
from vlafit.checkpoints.voting import value_at
from vlafit.errors import WeightsError, brief, did_you_mean
from vlafit.nn.florence2 import MLP_RATIO
from vlafit.policies import build_config, family, merge_dotted
from vlafit.policies._xvla_spaces import SPACES
from vlafit.policies.xvla import XVLAConfig

COMPUTED: dict[str, dict[str, object]] = {  # what our Florence-2 computes, also where the file is silent
    "vision_config": {
        "mlp_ratio": MLP_RATIO,
        "qkv_bias": True,
        "in_channels": 3,
        "activation_function": "gelu",
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    },
    "text_config": {"activation_function": "gelu", "scale_embedding": False},
}
TABLES = {"image_pos_embed": "learned_abs_2d", "visual_temporal_embedding": "COSINE"}
"""Tables of Microsoft's `vision_config`, and the only `type` of each that is computed here."""
OF_VISION = {
    "stage_width": ("dim_embed", "embed_dim"),
    "stage_blocks": ("depths",),
    "stage_heads": ("num_heads",),
    "stage_groups": ("num_groups",),
    "window": ("window_size",),
    "positions": ("image_pos_embed.max_pos_embeddings", "max_position_embeddings"),
    "frames": ("visual_temporal_embedding.max_temporal_embeddings", "max_temporal_embeddings"),
    "kernel": ("patch_size",),
    "stride": ("patch_stride",),
    "padding": ("patch_padding",),
    "norm_first": ("patch_prenorm",),
    "drop_path": ("drop_path_rate",),
}
OF_TEXT = {
    "width": ("d_model",),
    "depth": ("encoder_layers",),
    "mlp": ("encoder_ffn_dim",),
    "heads": ("encoder_attention_heads",),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings",),
    "dropout": ("dropout",),
    "attention_dropout": ("attention_dropout",),
    "activation_dropout": ("activation_dropout",),
}
OF_HEAD = {
    "width": ("hidden_size",),
    "depth": ("depth",),
    "heads": ("num_heads",),
    "time_dim": ("dim_time",),
    "positions": ("max_len_seq",),
}
OF_POLICY = {
    "chunk": ("chunk_size", "num_actions"),
    "max_tokens": ("tokenizer_max_length",),
    "domains": ("num_domains",),
    "prompts": ("len_soft_prompts",),
    "hetero": ("use_hetero_proj",),
    "state_dim": ("max_state_dim",),
}
"""Our field -> the keys that hold it, LeRobot's first, then the authors'."""


@dataclass(frozen=True)
class Section:
    """A table of config.json and where it is."""

    values: Mapping[str, Any]
    where: str

    def first(self, keys: Sequence[str]) -> Any:
        """Return the value of the first key that is there; dotted keys nest. None where none is."""
        return next((value for key in keys if (value := value_at(self.values, key)) is not None), None)

    def need(self, keys: Sequence[str]) -> Any:
        """Return the value of the first key that is there, or raise WeightsError naming them."""
        value = self.first(keys)
        if value is None:
            raise WeightsError(f"{self.where}: {' or '.join(keys)} is missing; it is a size of the weights")
        return value

    def table(self, key: str) -> "Section":
        """Return the table under `key`, or raise WeightsError."""
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            raise WeightsError(f"{self.where}: {key} is {value!r}, and must be a table with sizes")
        return Section(value, f"{self.where}: {key}")


def config_of(
    path: Path,
    values: Mapping[str, Any],
    cameras: int,
    frames: Sequence[tuple[int, int]],
    actions: int | None,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, object],
) -> XVLAConfig:
    """Return the config that config.json at `path` amounts to, with the user's `fields` in place of its own.

    `cameras` counts those that the file lists, `frames` are their sizes, and `actions` is the robot's width
    of an action, None where the file does not say. `tensors` are by our names. Raises WeightsError for a
    setting that is not computed here and for sizes that nothing tells.
    """
    top = Section(values, str(path))
    if values.get("use_proprio", True) is not True:
        raise WeightsError(f"{path}: use_proprio is {values['use_proprio']!r}; only true is supported here")
    space = str(top.need(("action_mode",))).lower()
    if space != "auto" and space not in SPACES:
        raise WeightsError(
            f"{path}: action_mode {space!r} is not known{did_you_mean(space, ['auto', *SPACES])}"
        )
    florence = top.table("florence_config")
    read: dict[str, Any] = {
        "vision": _vision(florence.table("vision_config")),
        "language": _fields(_checked(florence.table("text_config"), "text_config"), OF_TEXT),
        "expert": _fields(top, OF_HEAD) | {"mlp": int(top.need(("hidden_size",)) * top.need(("mlp_ratio",)))},
        "action_space": space,
        "pad_token": florence.table("text_config").first(("pad_token_id",)),
        **{field: top.first(keys) for field, keys in OF_POLICY.items()},
    }
    _require_one_width(florence, read["language"]["width"])
    read["image_size"] = _side(path, values, frames)
    views = top.first(("num_image_views",))
    if views is not None or cameras:
        read["views"] = max(views or 0, cameras)
    read |= _widths(read, space, top, actions, tensors)
    made = merge_dotted({key: value for key, value in read.items() if value is not None}, fields)
    missing = [
        key
        for key in ("image_size", "views", "state_dim", "action_dim", *OF_POLICY)
        if value_at(made, key) is None
    ]
    if missing:
        given = " ".join(f"--config {key}=N" for key in missing)
        trained = " ".join(f"--policy.config.{key} N" for key in missing)
        frame = ", ".join(dict.fromkeys(f"{height}x{width}" for height, width in frames))
        hint = f"; LeRobot takes its frames of {frame} as they are, vlafit squares" if frame else ""
        raise WeightsError(
            f"{path}: neither it nor the tensors determine {', '.join(missing)}{hint}. Give them: {given} of "
            f"inspect, eval, serve and export (train: {trained}), policy.config.KEY in a recipe, "
            "config={KEY: N} in Python"
        )
    return build_config(family("xvla"), made, f"{path}: config")


def _vision(section: Section) -> dict[str, Any]:
    for name, kind in TABLES.items():
        table = section.values.get(name)
        if table is not None and (not isinstance(table, Mapping) or table.get("type") != kind):
            raise WeightsError(f"{section.where}: {name} is {table!r}; only type {kind!r} is supported here")
    return _fields(_checked(section, "vision_config"), OF_VISION)


def _checked(section: Section, name: str) -> Section:
    """Return the section, or raise WeightsError for a setting that is not computed here."""
    for key, value in COMPUTED[name].items():
        if section.values.get(key, value) != value:
            raise WeightsError(
                f"{section.where}: {key} is {section.values[key]!r}; only {value!r} is supported here"
            )
    return section


def _fields(section: Section, keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {field: section.need(names) for field, names in keys.items()}


def _require_one_width(florence: Section, width: object) -> None:
    """Raise WeightsError where image tokens and words are not equally wide."""
    for section in (florence, florence.table("vision_config")):
        stated = section.values.get("projection_dim")
        if stated is not None and stated != width:
            raise WeightsError(
                f"{section.where}: projection_dim is {stated!r}, and d_model of text_config {width!r}; image "
                "tokens and words must be equally wide"
            )


def _side(path: Path, values: Mapping[str, Any], frames: Sequence[tuple[int, int]]) -> int | None:
    """Return the side of the policy's images; None where it takes frames of several sizes, or no squares."""
    sides = values.get("resize_imgs_with_padding")
    if sides is not None:
        if not isinstance(sides, Sequence) or len(sides) != 2 or sides[0] != sides[1]:
            raise WeightsError(
                f"{path}: resize_imgs_with_padding is {sides}; only squares are supported here"
            )
        return sides[0]
    shapes = set(frames)
    height, width = next(iter(shapes)) if len(shapes) == 1 else (0, 1)
    return height if height == width else None


def _widths(
    read: Mapping[str, Any], space: str, top: Section, actions: int | None, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the padded widths, and how many actions of the space "auto" count."""
    bias, encoder = (tensors.get(f"action_{name}.weight") for name in ("decoder.bias", "encoder.fc"))
    stored = bias.shape[1] if bias is not None and bias.ndim == 2 else None
    widths: dict[str, Any] = {}
    if space == "auto":
        widths["action_dim"] = top.first(("max_action_dim",)) or stored
        widths["real_dim"] = actions or 0
    else:
        widths["action_dim"] = SPACES[space].width  # type: ignore[index]  # looked up above
    if read["state_dim"] is None and encoder is not None and encoder.ndim == 2 and widths["action_dim"]:
        inputs = encoder.shape[1] // read["expert"]["width"]  # actions, state and time together
        widths["state_dim"] = inputs - widths["action_dim"] - read["expert"]["time_dim"]
    return widths


def lerobot_values(config: XVLAConfig, cameras: int, steps: int | None) -> dict[str, Any]:
    """Return what LeRobot's config.json holds of X-VLA alone; `cameras` counts those that it lists."""
    c, expert = config, config.expert
    return {
        "dtype": "float32",
        "florence_config": florence_values(c),
        "tokenizer_name": "facebook/bart-large",
        "tokenizer_padding_side": "right",
        "pad_language_to": "max_length",
        "hidden_size": expert.width,
        "depth": expert.depth,
        "num_heads": expert.heads,
        "mlp_ratio": _ratio(expert.mlp, expert.width),
        "num_domains": c.domains,
        "len_soft_prompts": c.prompts,
        "dim_time": expert.time_dim,
        "max_len_seq": expert.positions,
        "use_hetero_proj": c.hetero,
        "action_mode": c.action_space,
        "num_denoising_steps": steps,
        "use_proprio": True,
        "domain_feature_key": None,
        "resize_imgs_with_padding": [c.image_size, c.image_size],
        "num_image_views": max(c.views, cameras),
        "freeze_vision_encoder": False,
        "freeze_language_encoder": False,
        "train_policy_transformer": True,
        "train_soft_prompts": True,
        "optimizer_lr": 1e-4,
        "optimizer_betas": [0.9, 0.99],
        "optimizer_eps": 1e-8,
        "optimizer_weight_decay": 0.0,
        "optimizer_grad_clip_norm": 10.0,
        "optimizer_soft_prompt_lr_scale": 1.0,
        "optimizer_soft_prompt_warmup_lr_scale": None,
        "scheduler_warmup_steps": 1000,
        "scheduler_decay_steps": 30000,
        "scheduler_decay_lr": 2.5e-6,
    }


def florence_values(config: XVLAConfig) -> dict[str, Any]:
    """Return the table `florence_config` in Microsoft's keys; the decoder, which X-VLA lacks, has a layer."""
    v, lang = asdict(config.vision), asdict(config.language)
    special = {"pad_token_id": config.pad_token, "bos_token_id": 0, "eos_token_id": 2}
    heads = lang["heads"]
    return {
        "model_type": "florence2",
        **special,
        "is_encoder_decoder": True,
        "projection_dim": lang["width"],
        "vocab_size": lang["vocab"],
        "vision_config": {
            "model_type": "davit",
            **{keys[0]: _plain(v[field]) for field, keys in OF_VISION.items() if "." not in keys[0]},
            "enable_checkpoint": False,
            "projection_dim": lang["width"],
            "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": v["frames"]},
            "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": v["positions"]},
            "image_feature_source": COMPUTED["vision_config"]["image_feature_source"],
        },
        "text_config": {
            "model_type": "florence2_language",
            **{keys[0]: lang[field] for field, keys in OF_TEXT.items()},
            "decoder_layers": 1,
            "decoder_attention_heads": heads,
            "decoder_ffn_dim": lang["mlp"],
            "activation_function": "gelu",
            "scale_embedding": False,
            **special,
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,
        },
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _ratio(hidden: int, width: int) -> float:
    """Return the factor by which LeRobot finds the MLP's width; it cuts the product to a whole number."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def robot_facts(lerobot: LeRobotConfig) -> tuple[int, list[tuple[int, int]], int | None]:
    """Return how many cameras LeRobot's config.json lists, the sizes of their frames, and the action's width.

    `empty_cameras` are listed, too, but have no frames.
    """
    inputs, outputs = (lerobot.get(key, dict) or {} for key in ("input_features", "output_features"))
    try:
        visual = {key: one["shape"] for key, one in inputs.items() if one["type"] == "VISUAL"}
        frames = [(shape[1], shape[2]) for key, shape in visual.items() if ".empty_camera_" not in key]
        action = outputs.get("action")
        actions = None if action is None else int(action["shape"][-1])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise WeightsError(
            f"{lerobot.path}: its features are not what LeRobot writes ({brief(error)})"
        ) from error
    missing = sum(1 for key in visual if ".empty_camera_" in key)
    more = max(0, (lerobot.get("empty_cameras", int) or 0) - missing)
    return len(visual) + more, frames, actions
