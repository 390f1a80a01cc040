"""Read the sizes of a GR00T N1.7 from NVIDIA's config.json, and those of its backbone from that model's own.

Where the backbone is the public one its sizes are known; else its config.json is looked for in a folder of
its name, inside the checkpoint or beside it. The token ids of a chat turn are known for Qwen's vocabulary; of
another one they come from the tokenizer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlafit.checkpoints.tensor_files import read_json_if_present, read_json_object
from vlafit.checkpoints.voting import Stated
from vlafit.codec import Tokenizer
from vlafit.codec import tokenizer as tokenizers
from vlafit.config import at
from vlafit.errors import WeightsError, brief
from vlafit.nn.flow import BETA_A, TIME_SCALE
from vlafit.nn.policy import MOST_SAMPLING_STEPS, is_sampling_steps
from vlafit.policies import merge_dotted
from vlafit.policies.groot import BUCKETS, SIZES, ChatConfig

MODEL_TYPE = "Gr00tN1d7"
MAX_TOKENS = SIZES["groot"].max_tokens  # of an instruction; no program limits it
PUBLIC_BACKBONES = ("nvidia/Cosmos-Reason2-2B", "Qwen/Qwen3-VL-2B-Instruct")  # of the same sizes
CHAT = SIZES["groot"].chat
IMAGE_MARK, PUBLIC_IMAGE_TOKEN = "<|image_pad|>", 151655  # at each place of an image; Qwen's vocabulary
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>")

REMEDIES = {
    "chat": "the folder of its backbone's tokenizer, which has these tokens: --tokenizer FOLDER (train: "
    "--policy.tokenizer FOLDER), policy.tokenizer in a recipe, tokenizer=FOLDER in Python"
}
"""How to give what no shape tells, where that is no number."""
COMPUTED: dict[str, tuple[object, ...]] = {  # what vlafit computes; a key that is not there is silent
    "backbone_model_type": ("qwen",),
    "reproject_vision": (False,),
    "state_history_length": (1,),
    "add_pos_embed": (True,),
    "use_vlln": (True,),
    "use_alternate_vl_dit": (True,),
    "exclude_state": (False,),
    "strict_action_padding_mask": (False,),
    "noise_beta_alpha": (BETA_A,),
    "noise_beta_beta": (1.0,),
    "noise_s": (TIME_SCALE,),
    "num_timestep_buckets": (BUCKETS,),
    "diffusion_model_cfg.positional_embeddings": (None,),
    "diffusion_model_cfg.norm_type": ("ada_norm",),
    "diffusion_model_cfg.interleave_self_attention": (True,),
    "diffusion_model_cfg.final_dropout": (True,),
    "vl_self_attention_cfg.positional_embeddings": (None,),
    "vl_self_attention_cfg.final_dropout": (True,),
}
SIZES_OF = {  # sizes that tensors have, too
    "max_state_dim": "state_dim",
    "max_action_dim": "action_dim",
    "hidden_size": "expert.hidden",
    "input_embedding_dim": "expert.width",
    "max_num_embodiments": "embodiments",
    "max_seq_len": "positions",
    "select_layer": "language.depth",
    "backbone_embedding_dim": "language.width",
    "diffusion_model_cfg.num_layers": "expert.depth",
    "diffusion_model_cfg.output_dim": "expert.hidden",
    "vl_self_attention_cfg.num_layers": "expert.memory_depth",
}
VALUES_OF = {  # what no shape tells
    "action_horizon": "chunk",
    "attend_text_every_n_blocks": "expert.text_every",
    "state_dropout_prob": "state_dropout",
    "diffusion_model_cfg.num_attention_heads": "expert.heads",
    "diffusion_model_cfg.dropout": "expert.dropout",
    "vl_self_attention_cfg.num_attention_heads": "expert.memory_heads",
}
_VISION = {
    "hidden_size": "width",
    "depth": "depth",
    "intermediate_size": "mlp",
    "patch_size": "patch",
    "spatial_merge_size": "merge",
}
_TEXT = {
    "hidden_size": "width",
    "intermediate_size": "mlp",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
}
_BACKBONE_COMPUTED: dict[str, object] = {
    "vision_config.temporal_patch_size": 2,
    "vision_config.in_channels": 3,
    "vision_config.hidden_act": "gelu_pytorch_tanh",
    "text_config.hidden_act": "silu",
    "text_config.attention_bias": False,
    "text_config.rms_norm_eps": 1e-6,
    "text_config.rope_parameters.rope_type": "default",
    "text_config.rope_parameters.mrope_interleaved": True,
    "text_config.rope_scaling.rope_type": "default",
    "text_config.rope_scaling.mrope_interleaved": True,
}


def read_config(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """Return NVIDIA's config.json in `folder`, and its path; None where there is none of GR00T N1.7."""
    path = folder / "config.json"
    values = read_json_if_present(path)
    return (path, values) if values is not None and values.get("model_type") == MODEL_TYPE else None


def evidence(
    folder: Path, tokenizer: Tokenizer | None = None
) -> tuple[dict[str, Any], list[Stated], int | None]:
    """Return config values and stated sizes from config.json and the backbone's, and the sampling steps.

    `tokenizer` tells the token ids of a chat turn where nothing else does. Raises WeightsError for a setting
    that vlafit does not compute.
    """
    found = read_config(folder)
    if found is None:
        return {}, [], None
    path, values = found
    for key, allowed in COMPUTED.items():
        value = at(values, key, allowed[0])
        if value not in allowed or type(value) is not type(allowed[0]):
            raise WeightsError(f"{path}: {key} is {value!r}; only {allowed[0]!r} is supported here")
    own: dict[str, Any] = {}
    for key, field in VALUES_OF.items():
        if (value := _number(path, values, key)) is not None:
            own = merge_dotted(own, {field: value})
    if (side := image_side(path, values)) is not None:
        own["image_size"] = side
    stated = [
        Stated(field, int(value), f"{path.name} ({key})")
        for key, field in SIZES_OF.items()
        if (value := _number(path, values, key)) is not None
    ]
    more, sizes = _backbone(folder, path, values, tokenizer)
    steps = _number(path, values, "num_inference_timesteps")
    if steps is not None and not is_sampling_steps(steps):
        raise WeightsError(
            f"{path}: num_inference_timesteps is {steps}; a policy samples in 1 to {MOST_SAMPLING_STEPS} "
            "steps"
        )
    return merge_dotted(own, more), [*stated, *sizes], None if steps is None else int(steps)


def chat_of(tokenizer: Tokenizer, where: str) -> ChatConfig:
    """Return the token ids of a chat turn in Qwen's form. Raises WeightsError for a mark that is no token."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    lacking = [mark for mark in MARKS if mark not in vocabulary]
    if lacking:
        raise WeightsError(
            f"{where}: its tokenizer has no token {lacking[0]!r}, which GR00T writes into every prompt; give "
            "the tokenizer of its backbone"
        )
    start, end, image_start, image_end, pad = (vocabulary[mark] for mark in MARKS)
    opening, closing = (start, *tokenizer.encode("user\n")), (end, *tokenizer.encode("\n"))
    return ChatConfig(opening, image_start, image_end, closing, pad)


def image_token(tokenizer: Tokenizer | None, chat: ChatConfig) -> int | None:
    """Return the token at each place of an image, by which programs find those places; None where unknown."""
    if tokenizer is None:
        return PUBLIC_IMAGE_TOKEN if chat == CHAT else None
    return tokenizer.backend.get_vocab(with_added_tokens=True).get(IMAGE_MARK)


def own_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer that lies in the checkpoint, as vlafit exports it; None without one."""
    return tokenizers.load(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None


def tokenizer_tells(folder: Path) -> bool:
    """Whether nothing but a tokenizer tells the tokens of a chat turn: its backbone is not a public one."""
    found = read_config(folder)
    name = None if found is None else found[1].get("model_name")
    if found is None or name in PUBLIC_BACKBONES:
        return False
    place = find_folder(folder, str(name))
    return place is None or _marks(read_json_object(place / "config.json")) != _marks_of(CHAT)


def find_folder(folder: Path, name: str) -> Path | None:
    """Return the folder that another file of the checkpoint names, inside the checkpoint or beside it.

    By its last word: exports name it by an absolute path, and may have moved.
    """
    word = Path(name).name
    if word in ("", ".", "..") or "\0" in word:
        return None
    inside = [folder / word, folder.parent / word]
    return next((place for place in inside if (place / "config.json").is_file() and place != folder), None)


def _backbone(
    folder: Path, path: Path, values: Mapping[str, Any], tokenizer: Tokenizer | None
) -> tuple[dict[str, Any], list[Stated]]:
    name = values.get("model_name")
    place = find_folder(folder, str(name))
    if name in PUBLIC_BACKBONES:
        return _public(f"{path.name} (model_name {name!r})")
    if place is None:
        words = tokenizer or own_tokenizer(folder)
        return ({} if words is None else {"chat": asdict(chat_of(words, str(folder)))}), []
    file = place / "config.json"
    content = read_json_object(file)
    where = f"{place.name}/{file.name}"
    try:
        more, stated = _backbone_sizes(content, file, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file}: not the config.json of a Qwen3-VL ({brief(error)})") from error
    marks = _marks(content)
    words = tokenizer or own_tokenizer(folder) or own_tokenizer(place)
    if marks == _marks_of(CHAT):
        more["chat"] = asdict(CHAT)
    elif words is not None:
        chat = chat_of(words, str(folder))
        if marks != _marks_of(chat):
            raise WeightsError(
                f"{file}: vision_start_token_id and vision_end_token_id are {marks}, and the tokenizer has "
                f"{_marks_of(chat)}: it is not the tokenizer of this backbone"
            )
        more["chat"] = asdict(chat)
    return more, stated


def _marks(content: Mapping[str, Any]) -> tuple[object, object]:
    """Return the tokens around an image in a backbone's config.json."""
    return content.get("vision_start_token_id"), content.get("vision_end_token_id")


def _marks_of(chat: ChatConfig) -> tuple[int, int]:
    return chat.image_start, chat.image_end


def _backbone_sizes(
    content: Mapping[str, Any], file: Path, where: str
) -> tuple[dict[str, Any], list[Stated]]:
    vision, text = content["vision_config"], content["text_config"]
    for key, value in _BACKBONE_COMPUTED.items():
        if at(content, key, value) != value:
            raise WeightsError(
                f"{file}: {key} is {at(content, key, value)!r}; only {value!r} is supported here"
            )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    base = rope.get("rope_theta", text.get("rope_theta"))
    if not isinstance(base, int | float) or isinstance(base, bool):
        raise WeightsError(f"{file}: text_config: rope_theta is {base!r}, which is no number")
    heads = _whole(vision["num_heads"], file, "vision_config.num_heads")
    layers, sections = (
        [_whole(one, file, key, least=0) for one in table[key.rpartition(".")[2]]]
        for table, key in (
            (vision, "vision_config.deepstack_visual_indexes"),
            (rope, "text_config.rope_parameters.mrope_section"),
        )
    )
    more = {
        "vision": {"heads": heads, "deepstack": layers},
        "language": {"sections": sections, "rope_base": float(base)},
    }
    stated = [
        Stated(f"{part}.{field}", _whole(section[key], file, f"{name}.{key}"), f"{where} ({name}.{key})")
        for part, name, section, keys in (
            ("vision", "vision_config", vision, _VISION),
            ("language", "text_config", text, _TEXT),
        )
        for key, field in keys.items()
        if key in section
    ]
    places = _whole(vision["num_position_embeddings"], file, "vision_config.num_position_embeddings")
    stated.append(
        Stated("vision.side", math.isqrt(places), f"{where} (vision_config.num_position_embeddings)")
    )
    return more, stated


def _whole(value: object, file: Path, key: str, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise WeightsError(f"{file}: {key} is {value!r}; it must be a whole number from {least}")
    return value


def _public(source: str) -> tuple[dict[str, Any], list[Stated]]:
    """Return the values and sizes of the public backbone, of which some text layers were cut off."""
    sizes = {
        part: values for part, values in asdict(SIZES["groot"]).items() if part in ("vision", "language")
    }
    shapeless = {"vision": ("heads", "deepstack"), "language": ("sections", "rope_base")}
    more = {part: {key: sizes[part][key] for key in keys} for part, keys in shapeless.items()}
    stated = [
        Stated(f"{part}.{key}", value, source)
        for part, values in sizes.items()
        for key, value in values.items()
        if key not in shapeless[part] and (part, key) != ("language", "depth")
    ]
    return more | {"chat": asdict(CHAT)}, stated


def _number(path: Path, values: Mapping[str, Any], key: str) -> float | int | None:
    value = at(values, key, None)
    whole = key not in ("state_dropout_prob", "diffusion_model_cfg.dropout")
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int if whole else int | float)
    ):
        raise WeightsError(f"{path}: {key} is {value!r}, which is not what NVIDIA writes there")
    return value


def image_side(path: Path, values: Mapping[str, Any]) -> int | None:
    """Return the pixels along an image's side; None where config.json does not say."""
    key = "image_target_size"
    sides: Sequence[Any] | None = values.get(key)
    if sides is None:
        return None
    if (
        not isinstance(sides, list)
        or len(sides) != 2
        or sides[0] != sides[1]
        or not isinstance(sides[0], int)
    ):
        raise WeightsError(f"{path}: {key} is {sides}; only squares are supported here")
    return sides[0]
