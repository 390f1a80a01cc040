"""Write a policy and its codec as LeRobot saves them: config.json, weights, both pipelines, the tokenizer.

LeRobot builds a network from names of sizes, so only those it can name are written (`refusals`). Two tensors
that feed nothing are part of its state: the language head, written as a copy of the embedding, and the head
of pi0's expert, written as zeros.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from vlafit.checkpoints import lerobot
from vlafit.checkpoints.gemma_sizes import gemma_refusals, variants
from vlafit.checkpoints.lerobot_processors import (
    ACTION,
    EMPTY,
    IMAGES,
    MODES,
    POST,
    PRE,
    STATE,
    STATE_PROMPT,
    mask_of,
)
from vlafit.codec import Codec, Tokenizer
from vlafit.codec.statistics import ARRAYS, LEROBOT_EPSILON, Normalisation, Normaliser, Statistics
from vlafit.errors import WeightsError
from vlafit.nn.policy import Policy
from vlafit.policies.pi0 import Pi0, Pi0Config
from vlafit.policies.smolvla import SIZES, SmolVLA, SmolVLAConfig

Kind = Literal["pi0", "pi05", "smolvla"]
SMOLVLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"  # LeRobot's default for SmolVLA
PALIGEMMA = "google/paligemma-3b-pt-224"  # LeRobot's tokenizer for pi0, where a checkpoint holds none
LOCAL_VLM = "vlm"  # folder of the vision-language model's config, where no public model has the size
NEWLINE: dict[Kind, str] = {"pi0": "pi0_new_line_processor", "smolvla": "smolvla_new_line_processor"}
WRITTEN: dict[Normalisation, str] = {
    "mean_std": "MEAN_STD",
    "quantile": "QUANTILES",
    **{ours: theirs for theirs, ours in MODES.items()},
}
PROBES = ("pick up the red block", "open the drawer, then close it", "put 2 cups on the shelf!")


def kind_of(policy: Policy) -> Kind | None:
    """Return what LeRobot calls the policy's family; None where it has none."""
    if isinstance(policy, SmolVLA):
        return "smolvla"
    if isinstance(policy, Pi0):
        return "pi05" if policy.config.pi05 else "pi0"
    return None


def refusals(policy: Policy, codec: Codec | None) -> list[str]:
    """Say why LeRobot cannot hold this policy or codec; empty where it can."""
    kind = kind_of(policy)
    if kind is None:
        return ["LeRobot has no such family"]
    found = size_refusals(policy)
    if codec is None:
        return [
            *found,
            "the checkpoint has no codec, and LeRobot needs its processors: normalisation and tokenizer",
        ]
    return found + codec_refusals(codec, kind)


def size_refusals(policy: Policy) -> list[str]:
    """Say which sizes LeRobot cannot name."""
    config = policy.config
    if isinstance(config, Pi0Config):
        found = gemma_refusals(config, "LeRobot")
        if config.pi05 and config.state_input != "prompt":
            found.append("LeRobot's pi0.5 always writes the state into the prompt, this policy does not")
        return found
    assert isinstance(config, SmolVLAConfig)
    public = SIZES["smolvla"]
    found = []
    if (config.vision, {**vars(config.language), "depth": 0}) != (
        public.vision,
        {**vars(public.language), "depth": 0},
    ) or config.language.depth > 32:
        found.append(
            "LeRobot builds SmolVLA from a published SmolVLM2, and this policy has not the sizes of "
            f"{SMOLVLM}"
        )
    width, mlp = _expert_of(config)
    if (width, mlp) != (config.expert.width, config.expert.mlp):
        found.append(
            f"LeRobot gives an expert of width {config.expert.width} an MLP of {mlp}, this policy's is "
            f"{config.expert.mlp}"
        )
    return found


def codec_refusals(codec: Codec, kind: Kind) -> list[str]:
    """Say what of the codec LeRobot's pipelines cannot do."""
    config, found = codec.config, []
    wanted = {"pi0": ("line", "pi0"), "pi05": ("pi05",), "smolvla": ("line",)}[kind]
    if config.prompt not in wanted:
        found.append(
            f"LeRobot asks {kind} with a prompt of the form {wanted[0]!r}, this codec with {config.prompt!r}"
        )
    if kind == "smolvla" and any(config.relative):
        found.append("LeRobot's SmolVLA has no relative actions")
    framing = "smolvla" if kind == "smolvla" else "lerobot"
    scaled = [c for c in codec.embodiment.cameras if c.shape[:2] != (config.image_size,) * 2]
    if scaled and (config.framing == "smolvla") != (framing == "smolvla"):
        found.append(
            f"LeRobot pads images of {kind} elsewhere than this codec ({config.framing}), and camera "
            f"{scaled[0].name!r} is {scaled[0].shape[0]}x{scaled[0].shape[1]}, not {config.image_size} "
            "squared"
        )
    methods: dict[str, Normalisation] = {"state": config.normalisation, "action": config.of_actions}
    for name, method in methods.items():
        lost = _lost(codec.statistics[name], method)
        if lost:
            found.append(
                f"LeRobot keeps statistics in float32, in which the range of {name} dimension {lost[0]} "
                "beside its "
                "offset is lost"
            )
    if config.prompt == "pi0" and not _in_one_piece(codec.tokenizer):
        found.append(
            "LeRobot tokenises the prompt in one piece, which this tokenizer does not do as it does the "
            "pieces"
        )
    return found


def write(folder: Path, policy: Policy, codec: Codec) -> tuple[str, ...]:
    """Write everything into the empty `folder`; return what to know about it."""
    kind = kind_of(policy)
    assert kind is not None
    save_file(_tensors(policy), folder / "model.safetensors", metadata={"format": "pt"})
    config = _config(policy, codec, kind)
    _write_json(folder / "config.json", config)
    if config.get("vlm_model_name") == LOCAL_VLM:
        (folder / LOCAL_VLM).mkdir()
        _write_json(folder / LOCAL_VLM / "config.json", _vlm_config(policy.config))
    _write_processors(folder, codec, kind, config)
    _tokenizer(codec).save(folder / "tokenizer")
    notes = [
        "LeRobot up to 0.6.1 does not look for the tokenizer in the folder: give make_pre_post_processors"
        " preprocessor_overrides={'tokenizer_processor': {'tokenizer_name': '<folder>/tokenizer'}}"
    ]
    scaled = [c.name for c in codec.embodiment.cameras if c.shape[:2] != (codec.config.image_size,) * 2]
    if scaled and codec.config.framing == "openpi":
        notes.append(
            f"LeRobot scales images ({', '.join(scaled)}) without antialiasing; this codec did it with"
        )
    if codec.config.prompt == "pi0":
        notes.append("LeRobot does not strip instructions, nor turn newlines inside them into blanks")
    return tuple(notes)


def _tensors(policy: Policy) -> dict[str, Tensor]:
    weights = {name: p.detach().cpu().contiguous() for name, p in policy.named_parameters()}
    embedding = weights["language.embed_tokens.weight"]
    names = lerobot.SMOLVLA if isinstance(policy, SmolVLA) else lerobot.PI0
    found = {names.theirs(name): tensor for name, tensor in weights.items()}
    if isinstance(policy, SmolVLA):
        return found | {names.unused[0]: embedding.clone()}
    width = policy.config.expert.width
    dead = torch.zeros(embedding.shape[0], width, dtype=embedding.dtype)
    return found | {names.ties["language.embed_tokens.weight"]: embedding.clone(), names.unused[0]: dead}


# ---------------------------------------------------------------------------------------------- config.json


def _config(policy: Policy, codec: Codec, kind: Kind) -> dict[str, Any]:
    config, c = policy.config, codec.config
    modes = _modes(codec)
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
        "min_period": lerobot.ALWAYS["min_period"],
        "max_period": lerobot.ALWAYS["max_period"],
    }
    if isinstance(config, SmolVLAConfig):
        every = config.expert.self_every
        return common | {
            "resize_imgs_with_padding": [config.image_size, config.image_size],
            "adapt_to_pi_aloha": False,
            "use_delta_joint_actions_aloha": False,
            "num_steps": 10,
            "use_cache": True,
            "freeze_vision_encoder": True,
            "train_expert_only": True,
            "train_state_proj": True,
            "vlm_model_name": SMOLVLM if not size_refusals(policy) else LOCAL_VLM,
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
    language, expert = variants(config)
    return common | {
        "paligemma_variant": language,
        "action_expert_variant": expert,
        "dtype": "float32",
        "num_inference_steps": 10,
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
            features[_key(name)] = {"type": "VISUAL", "shape": [3, height, width]}
    for (
        name
    ) in codec.config.cameras:  # LeRobot puts missing cameras last; where they stand makes no difference
        if not name:
            side = codec.config.image_size
            features[f"{EMPTY}{empty}"] = {"type": "VISUAL", "shape": [3, side, side]}
            empty += 1
    return features | {STATE: {"type": "STATE", "shape": list(codec.embodiment.state.shape)}}


def _key(camera: str) -> str:
    return camera if camera.startswith("observation.") else IMAGES + camera


def _modes(codec: Codec) -> dict[str, str]:
    return {
        "VISUAL": "IDENTITY",
        "STATE": WRITTEN[codec.config.normalisation],
        "ACTION": WRITTEN[codec.config.of_actions],
    }


def _relative_names(codec: Codec) -> tuple[list[str] | None, list[str]]:
    """Return names of the action's dimensions, and which stay absolute, so that LeRobot finds our mask."""
    mask, labels = codec.config.relative, list(codec.embodiment.action.labels)
    absolute = [label for label, on in zip(labels, mask, strict=False) if not on]
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
    mlp = int(4 * int(2 * width / 3))
    return width, 256 * ((mlp + 255) // 256)


def _vlm_config(config: SmolVLAConfig) -> dict[str, Any]:
    v, lang = config.vision, config.language
    return {
        "model_type": "smolvlm",
        "scale_factor": v.shuffle,
        "text_config": {
            "model_type": "llama",
            "hidden_size": lang.width,
            "intermediate_size": lang.mlp,
            "num_hidden_layers": lang.depth,
            "num_attention_heads": lang.heads,
            "num_key_value_heads": lang.kv_heads,
            "head_dim": lang.head_dim,
            "vocab_size": lang.vocab,
            "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": v.width,
            "intermediate_size": v.mlp,
            "num_hidden_layers": v.depth,
            "num_attention_heads": v.heads,
            "patch_size": v.patch,
            "image_size": v.image_size,
        },
    }


# ----------------------------------------------------------------------------------------------- processors


def _write_processors(folder: Path, codec: Codec, kind: Kind, config: Mapping[str, Any]) -> None:
    modes = _modes(codec)
    output = dict(config["output_features"])
    everything = dict(config["input_features"]) | output
    normaliser = {"eps": LEROBOT_EPSILON, "features": everything, "norm_map": modes}
    step = {name: _step(name, values) for name, values in {
        "rename_observations_processor": {"rename_map": {}},
        "to_batch_processor": {},
        "device_processor": {"device": "cpu", "float_dtype": None},
        "normalizer_processor": normaliser,
        STATE_PROMPT: {},
    }.items()}  # fmt: skip
    asking = _step("tokenizer_processor", {
        "max_length": codec.config.max_tokens,
        "task_key": "task",
        "padding_side": "right",
        "padding": "longest" if kind == "smolvla" else "max_length",
        "truncation": True,
        "tokenizer_name": "tokenizer",
    })  # fmt: skip
    asking["artifacts"] = {"tokenizer_name": "tokenizer"}
    relative = _step("relative_actions_processor", {
        "enabled": any(codec.config.relative),
        "exclude_joints": config.get("relative_exclude_joints"),
        "action_names": config.get("action_feature_names"),
    })  # fmt: skip
    opening = [step["rename_observations_processor"], step["to_batch_processor"]]
    device, normal = step["device_processor"], step["normalizer_processor"]
    pre: list[dict[str, Any]]
    match kind:
        case "smolvla":
            pre = [*opening, _step(NEWLINE[kind], {}), asking, device, normal]
        case "pi0":
            pre = [*opening, _step(NEWLINE[kind], {}), asking, device, relative, normal]
        case "pi05":
            pre = [*opening, relative, normal, step[STATE_PROMPT], asking, device]
    undo = _step("unnormalizer_processor", {"eps": LEROBOT_EPSILON, "features": output, "norm_map": modes})
    post = [undo]
    if kind != "smolvla":
        post.append(_step("absolute_actions_processor", {"enabled": any(codec.config.relative)}))
    post.append(dict(device))
    statistics = _statistics(codec)
    for name, steps in ((PRE, pre), (POST, post)):
        for i, one in enumerate(steps):
            if one["registry_name"] in ("normalizer_processor", "unnormalizer_processor"):
                stem = name.removesuffix(".json")
                one["state_file"] = f"{stem}_step_{i}_{one['registry_name']}.safetensors"
                save_file(statistics, folder / one["state_file"])
        _write_json(folder / name, {"name": name.removesuffix(".json"), "steps": steps})


def _step(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"registry_name": name, "config": dict(config)}


def _statistics(codec: Codec) -> dict[str, Tensor]:
    """Return statistics with which LeRobot's formulas, which have no floors, do what ours do."""
    found: dict[str, Tensor] = {}
    columns: tuple[tuple[str, str, Normalisation], ...] = (
        (STATE, "state", codec.config.normalisation),
        (ACTION, "action", codec.config.of_actions),
    )
    for feature, name, method in columns:
        statistics = codec.statistics[name]
        arrays = {n: a for n in ARRAYS if (a := getattr(statistics, n)) is not None}
        arrays |= _effective(statistics, method)
        found |= {
            f"{feature}.{n}": torch.from_numpy(np.asarray(a, dtype=np.float32)) for n, a in arrays.items()
        }
        found[f"{feature}.count"] = torch.tensor([float(statistics.count)])
    return found


def _lost(statistics: Statistics, method: Normalisation) -> list[int]:
    """Return the dimensions whose divisor changes by more than 1 in 1000 when statistics become float32."""
    if method != "quantile":
        return []
    low, high = (
        array.astype(np.float32).astype(np.float64) for array in _effective(statistics, method).values()
    )
    scale = Normaliser.fit(statistics, method).scale
    return np.flatnonzero(np.abs(high - low - scale) > 1e-3 * scale).tolist()


def _effective(statistics: Statistics, method: Normalisation) -> dict[str, NDArray[np.float64]]:
    normal = Normaliser.fit(statistics, method)
    match method:
        case "mean_std":
            return {"mean": normal.offset, "std": normal.scale - LEROBOT_EPSILON}
        case "quantile":
            return {"q01": normal.offset, "q99": normal.offset + normal.scale}
        case _:
            return {}


# ------------------------------------------------------------------------------------------------ tokenizer


def _tokenizer(codec: Codec) -> Tokenizer:
    """Return a tokenizer that, asked as LeRobot asks, gives the tokens that the codec gives."""
    words = codec.tokenizer
    if codec.config.special_tokens == "tokenizer":
        return words
    content = json.loads(words.backend.to_str())
    if codec.config.prompt == "line":
        content["post_processor"] = None
    else:
        assert words.bos is not None
        bos = words.backend.id_to_token(words.bos)
        begin = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": begin,
            "pair": [*begin, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [words.bos], "tokens": [bos]}},
        }
    if codec.config.prompt == "pi0":  # whose underscores are blanks, which no step of LeRobot's does for pi0
        blanks = {"type": "Replace", "pattern": {"String": "_"}, "content": " "}
        rest = content["normalizer"]
        content["normalizer"] = {"type": "Sequence", "normalizers": [blanks, *([rest] if rest else [])]}
    backend = type(words.backend).from_str(json.dumps(content))
    return Tokenizer(backend, words.pad, words.bos, words.eos)


def _in_one_piece(words: Tokenizer) -> bool:
    return all(words.encode(text) + words.encode("\n") == words.encode(f"{text}\n") for text in PROBES)


def _write_json(path: Path, values: object) -> None:
    try:
        path.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written: {error.strerror}") from error
