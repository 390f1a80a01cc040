"""Read X-VLA's checkpoints: LeRobot's, in two layouts of tensor names, and the authors' own folders.

LeRobot 0.6.1 writes Florence-2 under transformers' names. Files before it, and the authors', have Microsoft's
names and the projection of images transposed; the authors' lack the prefix ``model.``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlafit.checkpoints.assign import raise_mismatch
from vlafit.checkpoints.codecs import ChosenCodec
from vlafit.checkpoints.formats.base import CheckpointFiles, Format, OpenedCheckpoint
from vlafit.checkpoints.formats.lerobot import features, names, processor_steps, xvla_steps
from vlafit.checkpoints.formats.lerobot.families import require_type
from vlafit.checkpoints.formats.lerobot.read_config import (
    LeRobotConfig,
    read_config,
    require_supported,
    sampling_steps,
)
from vlafit.checkpoints.formats.lerobot.xvla_config import config_of, robot_facts
from vlafit.checkpoints.name_map import Translated, translate
from vlafit.checkpoints.options import LoadOptions
from vlafit.checkpoints.tensor_files import read_json_if_present
from vlafit.codec import Codec
from vlafit.errors import WeightsError
from vlafit.nn.policy import Policy
from vlafit.policies.xvla import XVLAConfig

PREFIX = "model."  # of LeRobot's names, which the authors' lack
PARTS = (
    "vlm.vision_tower.",
    "vlm.multi_modal_projector.",
    "vlm.language_model.",
    "vlm.image_",
    "vlm.visual_",
    "transformer.",
)
OWN = (
    "soft_prompt_hub.",
    "transformer.action_encoder.",
    "transformer.action_decoder.",
    "vlm.vision_tower.convs.",
)
"""Some of these are in every X-VLA, and in no other family's names."""
POSITIONS, PROJECTION = "expert.position_embedding.weight", "projector.image_projection.weight"
OLD = (  # Microsoft's names -> transformers'
    (r"^(vlm\.vision_tower\.convs\.\d+)\.proj\.", r"\1.conv."),
    (r"\.(conv[12])\.fn\.dw\.", r".\1."),
    (r"\.(?:window_attn|channel_attn)\.norm\.", ".norm1."),
    (r"\.(window_attn|channel_attn)\.fn\.", r".\1."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.fn\.net\.", ".ffn."),
    (r"^vlm\.image_projection$", "vlm.multi_modal_projector.image_projection.weight"),
    (r"^vlm\.image_pos_embed\.", "vlm.multi_modal_projector.image_position_embed."),
    (r"^vlm\.(image_proj_norm|visual_temporal_embed)\.", r"vlm.multi_modal_projector.\1."),
    (r"^vlm\.language_model\.model\.", "vlm.language_model."),
)
BACK = (  # transformers' names -> Microsoft's
    (r"^(vlm\.vision_tower\.convs\.\d+)\.conv\.", r"\1.proj."),
    (r"(_block)\.(conv[12])\.", r"\1.\2.fn.dw."),
    (r"\.(window|channel)_attn\.", r".\1_attn.fn."),
    (r"\.spatial_block\.norm1\.", ".spatial_block.window_attn.norm."),
    (r"\.channel_block\.norm1\.", ".channel_block.channel_attn.norm."),
    (r"(_block)\.ffn\.", r"\1.ffn.fn.net."),
    (r"(_block)\.norm2\.", r"\1.ffn.norm."),
    (r"^vlm\.multi_modal_projector\.image_projection\.weight$", "vlm.image_projection"),
    (r"^vlm\.multi_modal_projector\.image_position_embed\.", "vlm.image_pos_embed."),
    (r"^vlm\.multi_modal_projector\.", "vlm."),
    (r"^vlm\.language_model\.", "vlm.language_model.model."),
)
UNUSED = "vlm.language_model.final_logits_bias"  # of BART's decoder, which X-VLA lacks


def recognise(tensor_names: Iterable[str]) -> bool:
    """Whether most of these names are X-VLA's, in any layout, whole or damaged."""
    every = [names.plain(name).removeprefix(PREFIX) for name in tensor_names]
    own = sum(name.startswith(PARTS) for name in every)
    return 2 * own > len(every) and any(sign in name for name in every for sign in OWN)


def modern(name: str) -> str:
    """Return LeRobot 0.6.1's name for that of a tensor in any layout."""
    return PREFIX + _renamed(names.plain(name).removeprefix(PREFIX), OLD)


def _renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def open_checkpoint(
    format: Format, files: CheckpointFiles, config: LeRobotConfig | None, options: LoadOptions
) -> OpenedCheckpoint:
    """Translate the names and read config.json. Raises WeightsError as `Format.open` does."""
    tensors, where = files.tensors, str(files.path)
    require_type(config, "xvla", files.folder, where)
    translated = _translate(tensors, where)
    values: Mapping[str, Any] | None
    cameras, frames, actions = 0, [], None
    path = files.folder / "config.json"
    if config is not None:
        require_supported(config)
        values, (cameras, frames, actions) = config.values, robot_facts(config)
    else:
        values = read_json_if_present(path)
    if values is None or "florence_config" not in values:
        raise WeightsError(
            f"{path}: {'is missing' if values is None else 'has no florence_config'}; it holds the sizes of "
            "an X-VLA, which its tensors do not tell. Copy it from where the weights come from"
        )
    fields = options.config.fields
    made = config_of(path, values, cameras, frames, actions, translated.weights, fields)
    made, unnamed = _in_named_domain(made, files.folder, fields)
    return OpenedCheckpoint(
        where,
        format,
        "xvla",
        translated,
        config=made,
        chunk=values.get("chunk_size", values.get("num_actions")),
        steps=sampling_steps(config),
        codec_folder=files.folder,
        conflicts=translated.conflicts,
        notes=features.notes(config) + _views_note(values, config, made.views) + unnamed,
    )


def _in_named_domain(
    config: XVLAConfig, folder: Path, fields: Mapping[str, object]
) -> tuple[XVLAConfig, tuple[str, ...]]:
    """Return the config in the processors' domain unless the caller gives one, and a note that says so.

    Raises WeightsError for a domain that the policy does not have.
    """
    if "domain" in fields:
        return config, ()
    domain = xvla_steps.domain_in(folder, config.domains)
    if domain is not None:
        note = f"domain {domain} of 0 to {config.domains - 1}, named in {processor_steps.PRE}"
        return replace(config, domain=domain), (note,)
    return config, (
        f"no file names a domain: the policy works in domain {config.domain} of 0 to {config.domains - 1}, "
        "as in LeRobot; give that of your robot: config domain=N",
    )


def _views_note(values: Mapping[str, Any], config: LeRobotConfig | None, views: int) -> tuple[str, ...]:
    """Return a note where LeRobot makes more views than the policy has: it counts empty cameras twice."""
    empty = values.get("empty_cameras") or 0
    if config is None or not isinstance(empty, int) or not empty:
        return ()
    listed = sum(
        isinstance(one, Mapping) and one.get("type") == "VISUAL"
        for one in (values.get("input_features") or {}).values()
    )
    stated = values.get("num_image_views") or 0
    there = max(stated, listed + empty)
    if there <= views:
        return ()
    return (
        f"{config.path}: says {stated} views and lists {listed} cameras, empty ones included, which LeRobot "
        f"0.6.1 counts again when it loads them: it computes with {there} views then, and with {views} when "
        f"it trained them, as here; config views = {there} makes the others",
    )


def _translate(tensors: Mapping[str, Tensor], where: str) -> Translated:
    """Return the tensors under our names, in our shapes; `file_name` finds those of the file."""
    stored: dict[str, str] = {}
    twice = []
    for name in tensors:
        first = stored.setdefault(modern(name), name)
        if first != name:
            twice.append(f"{name} beside {first}")
    if twice:
        raise_mismatch(where, {"surplus": sorted(twice)})
    _require_one_prefix(tensors, where)
    unused = tuple(name for name in tensors if modern(name) == PREFIX + UNUSED)
    plain = translate({modern(n): t for n, t in tensors.items() if n not in unused}, names.XVLA)
    weights = dict(plain.weights)
    if (table := weights.get(POSITIONS)) is not None and table.ndim == 3 and table.shape[0] == 1:
        weights[POSITIONS] = table[0]
    if PROJECTION in weights and stored[names.XVLA.file_name(PROJECTION)].endswith("image_projection"):
        weights[PROJECTION] = weights[PROJECTION].T
    has_prefix = any(name.startswith(PREFIX) for name in tensors)
    is_old = any(
        names.plain(name).removeprefix(PREFIX) != modern(name).removeprefix(PREFIX) for name in tensors
    )

    def file_name(name: str) -> str:
        new = plain.file_name(name)
        if new in stored:
            return stored[new]
        missing = new.removeprefix(PREFIX)
        return (PREFIX if has_prefix else "") + (_renamed(missing, BACK) if is_old else missing)

    tied = tuple(stored[name] for name in plain.tied)
    return replace(plain, weights=weights, tied=tied, unused=unused, file_name=file_name)


def _require_one_prefix(tensors: Iterable[str], where: str) -> None:
    """Raise WeightsError where some names begin with LeRobot's prefix and others, as the authors', do not."""
    own = [name for name in tensors if names.plain(name).removeprefix(PREFIX).startswith(PARTS)]
    with_prefix = [name for name in own if name.startswith(PREFIX)]
    without = [name for name in own if not name.startswith(PREFIX)]
    if with_prefix and without:
        few = min(with_prefix, without, key=len)
        counterparts = [n.removeprefix(PREFIX) if few is with_prefix else PREFIX + n for n in few]
        raise_mismatch(where, {"missing": sorted(counterparts), "surplus": sorted(few)})


# ------------------------------------------------------------------------------------------------ processors


def finish_codec(
    chosen: ChosenCodec, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions
) -> ChosenCodec:
    """Return the processors' codec for this policy, in its domain.

    There is none where LeRobot takes frames that are no squares. Raises WeightsError for a padding token
    that the policy does not read.
    """
    codec, config = chosen.codec, policy.config
    if not isinstance(codec, Codec):
        return chosen
    assert opened.codec_folder is not None
    lerobot, side = read_config(opened.codec_folder), config.image_size
    if lerobot is None or lerobot.values.get("resize_imgs_with_padding") is None:
        for camera in codec.embodiment.cameras:
            if camera.shape[:2] != (side, side):
                return ChosenCodec(
                    None,
                    f"LeRobot takes frames of camera {camera.name!r}, {camera.shape[0]}x{camera.shape[1]}, "
                    f"as they are (resize_imgs_with_padding is null), and this policy squares of {side}; let "
                    'fine-tuning fit a codec: data.statistics = "data"',
                )
    pad = None if codec.tokenizer is None else codec.tokenizer.pad
    if pad is not None and pad != config.pad_token and config.attends_padding:
        raise WeightsError(
            f"{opened.path}: the tokenizer pads with {pad}, and the policy reads padding of "
            f"{config.pad_token}; give the tokenizer that it was trained with, or --config pad_token={pad}"
        )
    return ChosenCodec(codec.with_changes(embodiment_id=config.domain), chosen.reason, chosen.notes)
