"""Write a codec as LeRobot's processors: both pipelines with their statistics, and the tokenizer.

Their formulas have no floors and their pipelines fewer forms than our codec; what they cannot repeat is
refused (`codec_refusals`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from vlafit.checkpoints.formats.lerobot.action_tokens import base_vocabulary
from vlafit.checkpoints.formats.lerobot.processor_steps import (
    ACTION_TOKENS,
    DOMAIN,
    FAST_PROMPT,
    IMAGENET,
    STATE_PROMPT,
    TO_FLOAT,
)
from vlafit.checkpoints.formats.lerobot.read_processors import ACTION, POST, PRE, STATE
from vlafit.checkpoints.formats.lerobot.write_config import Kind, modes_of
from vlafit.checkpoints.tensor_files import write_json
from vlafit.codec import Codec, Tokenizer
from vlafit.codec.normaliser import LEROBOT_EPSILON, Normalisation, Normaliser
from vlafit.codec.statistics import ARRAYS, Statistics

NEWLINE: dict[Kind, str] = {"pi0": "pi0_new_line_processor", "smolvla": "smolvla_new_line_processor"}
PROBES = ("pick up the red block", "open the drawer, then close it", "put 2 cups on the shelf!")


def codec_refusals(codec: Codec, kind: Kind) -> list[str]:
    """Say what of the codec LeRobot's pipelines cannot do."""
    config, refusals = codec.config, []
    wanted = {
        "pi0": ("line", "pi0"),
        "pi05": ("pi05",),
        "pi0_fast": ("pi0_fast_lerobot",),
        "smolvla": ("line",),
        "xvla": ("text",),
    }[kind]
    if config.prompt not in wanted:
        refusals.append(
            f"LeRobot asks {kind} with a prompt of the form {wanted[0]!r}, this codec with {config.prompt!r}"
        )
    if config.prompt_state:
        refusals.append(
            f"its prompt holds {config.prompt_state} numbers of the state, zeros at the end, as in LeRobot "
            "0.4; LeRobot 0.6 writes only the state's own"
        )
    if kind in ("smolvla", "xvla") and any(config.relative):
        refusals.append(
            f"LeRobot makes {kind}'s processors without a step for relative actions, so vlafit writes none "
            "(processors that have such a step are read)"
        )
    own = kind if kind in ("smolvla", "xvla") else "lerobot"
    places = "lerobot" if config.framing == "openpi" else config.framing
    scaled = [c for c in codec.embodiment.cameras if c.shape[:2] != (config.image_size,) * 2]
    if scaled and places != own:
        refusals.append(
            f"LeRobot pads images of {kind} elsewhere than this codec ({config.framing}), and camera "
            f"{scaled[0].name!r} is {scaled[0].shape[0]}x{scaled[0].shape[1]}, not {config.image_size} "
            "squared"
        )
    methods: dict[str, Normalisation] = {"state": config.normalisation, "action": config.of_actions}
    for name, method in methods.items():
        lost = _lost(codec.statistics[name], method)
        if lost:
            refusals.append(
                f"LeRobot keeps statistics in float32, in which the range of {name} dimension {lost[0]} "
                "beside its offset is lost"
            )
    if config.action_tokens is not None and kind == "pi0_fast":
        have, counted = config.action_tokens.vocabulary, base_vocabulary(codec.required_tokenizer)
        if have != counted:
            refusals.append(
                f"LeRobot counts action tokens down from the tokenizer's {counted} tokens, this codec from "
                f"{have}"
            )
    if config.prompt == "pi0" and not _in_one_piece(codec.required_tokenizer):
        refusals.append(
            "LeRobot tokenises the prompt in one piece, which this tokenizer does not do as it does the "
            "pieces"
        )
    return refusals


def write_processors(folder: Path, codec: Codec, kind: Kind, config: Mapping[str, Any]) -> None:
    """Write both pipelines; `config` is what config.json says."""
    modes = modes_of(codec)
    output = dict(config["output_features"])
    everything = dict(config["input_features"]) | output
    normaliser = {"eps": LEROBOT_EPSILON, "features": everything, "norm_map": modes}
    step = {name: _step(name, values) for name, values in {
        "rename_observations_processor": {"rename_map": {}},
        "to_batch_processor": {},
        "device_processor": {"device": "cpu", "float_dtype": None},
        "normalizer_processor": normaliser,
        STATE_PROMPT: {},
        FAST_PROMPT: {},
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
        case "pi0_fast":
            actions = _step(ACTION_TOKENS, {
                "trust_remote_code": True,
                "max_action_tokens": config["max_action_tokens"],
                "action_tokenizer_name": config["action_tokenizer_name"],
                "fast_skip_tokens": config["fast_skip_tokens"],
                "paligemma_tokenizer_name": config["text_tokenizer_name"],
            })  # fmt: skip
            pre = [*opening, relative, normal, step[FAST_PROMPT], asking, actions, device]
        case "xvla":
            seen = [_step(TO_FLOAT, {"image_keys": None, "validate_range": True})]
            seen += [_step(IMAGENET, {"image_keys": None})]
            domain = _step(DOMAIN, {"domain_id": codec.embodiment_id or 0})
            pre = [*opening, asking, *seen, domain, device, normal]
    undo = _step("unnormalizer_processor", {"eps": LEROBOT_EPSILON, "features": output, "norm_map": modes})
    post = [undo]
    if kind in ("pi0", "pi05", "pi0_fast"):
        post.append(_step("absolute_actions_processor", {"enabled": any(codec.config.relative)}))
    post.append(dict(device))
    statistics = _statistics(codec)
    if kind == "xvla" and set(modes.values()) == {"IDENTITY"}:
        statistics = {}  # nothing reads them
    for name, steps in ((PRE, pre), (POST, post)):
        for i, one in enumerate(steps):
            if statistics and one["registry_name"] in ("normalizer_processor", "unnormalizer_processor"):
                stem = name.removesuffix(".json")
                one["state_file"] = f"{stem}_step_{i}_{one['registry_name']}.safetensors"
                save_file(statistics, folder / one["state_file"])
        write_json(folder / name, {"name": name.removesuffix(".json"), "steps": steps})


def _step(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"registry_name": name, "config": dict(config)}


def _statistics(codec: Codec) -> dict[str, Tensor]:
    """Return statistics with which LeRobot's formulas, which have no floors, do what vlafit does."""
    tensors: dict[str, Tensor] = {}
    columns: tuple[tuple[str, str, Normalisation], ...] = (
        (STATE, "state", codec.config.normalisation),
        (ACTION, "action", codec.config.of_actions),
    )
    for feature, name, method in columns:
        statistics = codec.statistics[name]
        arrays = {n: a for n in ARRAYS if (a := getattr(statistics, n)) is not None}
        arrays |= _effective(statistics, method)
        tensors |= {
            f"{feature}.{n}": torch.from_numpy(np.asarray(a, dtype=np.float32)) for n, a in arrays.items()
        }
        tensors[f"{feature}.count"] = torch.tensor([float(statistics.count)])
    return tensors


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


def tokenizer_for(codec: Codec) -> Tokenizer:
    """Return a tokenizer that, asked as LeRobot asks, gives the tokens that the codec gives."""
    words = codec.required_tokenizer
    if codec.config.special_tokens == "tokenizer":
        return words
    content = json.loads(words.backend.to_str())
    if codec.config.prompt in ("line", "text"):
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
