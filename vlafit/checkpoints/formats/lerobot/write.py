"""Write a policy and its codec as LeRobot saves them: config.json, weights, both pipelines, the tokenizer.

LeRobot builds pi0 from names of sizes, so only those it can name are written (`refusals`), and SmolVLA from a
vision-language model, which lies beside it where nobody published one of its sizes. Two tensors
that feed nothing are part of its state: the language head, written as a copy of the embedding, and the head
of pi0's expert, written as zeros.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlafit.checkpoints.assign import stored_as
from vlafit.checkpoints.formats.lerobot import names as lerobot
from vlafit.checkpoints.formats.lerobot import write_action_tokenizer
from vlafit.checkpoints.formats.lerobot import write_groot as groot
from vlafit.checkpoints.formats.lerobot.processor_steps import ACTION_TOKENS
from vlafit.checkpoints.formats.lerobot.read_processors import PRE
from vlafit.checkpoints.formats.lerobot.write_config import (
    ACTION_TOKENIZER,
    LOCAL_VLM,
    TEXT_TOKENIZER,
    Kind,
    describe,
    size_refusals,
)
from vlafit.checkpoints.formats.lerobot.write_processors import (
    codec_refusals,
    tokenizer_for,
    write_processors,
)
from vlafit.checkpoints.formats.lerobot.xvla import POSITIONS
from vlafit.checkpoints.formats.openpi.variants import dropped_token_loss
from vlafit.checkpoints.tensor_files import read_json_object, write_json
from vlafit.codec import Codec, Tokenizer
from vlafit.nn.deferred import save_tensors
from vlafit.nn.policy import ParameterInfo, Policy
from vlafit.policies.act import Act
from vlafit.policies.groot import Groot
from vlafit.policies.pi0 import Pi0
from vlafit.policies.pi0_fast import Pi0Fast
from vlafit.policies.smolvla import SmolVLA, SmolVLAConfig
from vlafit.policies.xvla import XVLA

WEIGHTS = "model.safetensors"
MARKS = {  # special tokens of SmolVLM's processor: its attribute, their text
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def kind_of(policy: Policy) -> Kind | None:
    """Return LeRobot's name of the policy's family; None where it has none."""
    if isinstance(policy, XVLA):
        return "xvla"
    if isinstance(policy, SmolVLA):
        return "smolvla"
    if isinstance(policy, Pi0Fast):
        return "pi0_fast"
    if isinstance(policy, Pi0):
        return "pi05" if policy.config.pi05 else "pi0"
    return None


def refusals(policy: Policy, codec: Codec | None) -> list[str]:
    """Say why LeRobot cannot hold this policy or codec; empty where it can."""
    if isinstance(policy, Groot):
        return groot.refusals(policy, codec)
    kind = kind_of(policy)
    if kind is None:
        if isinstance(policy, Act):
            return ["vlafit does not write ACT in LeRobot's form"]
        return ["LeRobot has no such family"]
    reasons = size_refusals(policy)
    words = None if codec is None else codec.tokenizer
    if isinstance(policy, XVLA) and words is not None and words.pad != policy.config.pad_token:
        reasons.append(
            f"LeRobot pads X-VLA's prompts with the tokenizer's token {words.pad}, this policy with "
            f"{policy.config.pad_token} (pad_token)"
        )
    if codec is None:
        return [
            *reasons,
            "the checkpoint has no codec, and LeRobot needs its processors: normalisation and tokenizer",
        ]
    return reasons + codec_refusals(codec, kind)


def write(folder: Path, policy: Policy, codec: Codec) -> tuple[str, ...]:
    """Write everything into the empty `folder`; return what to know about it."""
    kind = kind_of(policy)
    assert kind is not None
    if isinstance(policy, XVLA) and codec.embodiment_id is None:
        codec = codec.with_changes(embodiment_id=policy.config.domain)
    save_tensors(_tensors(policy), folder / WEIGHTS, {"format": "pt"})
    config = describe(policy, codec, kind)
    write_json(folder / "config.json", config)
    if isinstance(policy, SmolVLA) and config.get("vlm_model_name") == LOCAL_VLM:
        write_vlm(folder / LOCAL_VLM, policy.config, tokenizer_for(codec))
    write_processors(folder, codec, kind, config)
    tokenizer_for(codec).save(folder / "tokenizer")
    if codec.action_tokenizer is not None and kind == "pi0_fast":
        write_action_tokenizer.write(folder / ACTION_TOKENIZER, codec.action_tokenizer)
    notes = [
        "LeRobot up to 0.6.1 does not look for the tokenizer in the folder: give make_pre_post_processors"
        " preprocessor_overrides={'tokenizer_processor': {'tokenizer_name': '<folder>/tokenizer'}}"
    ]
    scaled = [c.name for c in codec.embodiment.cameras if c.shape[:2] != (codec.config.image_size,) * 2]
    if scaled and codec.config.framing == "openpi":
        notes.append(
            f"LeRobot scales images ({', '.join(scaled)}) without antialiasing; this codec did it with"
        )
    if isinstance(policy, Pi0) and policy.config.action_tokens:
        notes.append(dropped_token_loss("LeRobot"))
    uneven = [c.name for c in codec.embodiment.cameras if c.shape[0] != c.shape[1]]
    if uneven and codec.config.framing == "xvla":
        notes.append(
            f"LeRobot pads images that are no squares ({', '.join(uneven)}) with ImageNet's mean, and rounds "
            "nothing; frames here have whole grey levels: the padding is 0.47 of 255 apart at most, scaled "
            "pixels 0.5"
        )
    if kind == "xvla" and codec.config.mask_padding:
        notes.append("LeRobot counts steps past an episode's end in the loss, which this codec left out")
    if isinstance(policy, Pi0Fast) and policy.config.tied:
        notes.append("LeRobot trains output layer and embedding apart, which are one tensor here")
    if codec.config.prompt == "pi0":
        notes.append("LeRobot does not strip instructions, nor turn newlines inside them into blanks")
    return tuple(notes)


def name_vlm(folder: Path, place: Path) -> tuple[str, ...]:
    """Name the vision-language model that was written into `folder` by where it will lie; say so.

    LeRobot looks for a relative path in the working directory.
    """
    path = folder / "config.json"
    config = read_json_object(path)
    if config["type"] == "pi0_fast":
        return _name_tokenizers(folder, place, config)
    if config.get("vlm_model_name") != LOCAL_VLM:
        return ()
    write_json(path, config | {"vlm_model_name": str(place / LOCAL_VLM)})
    return (
        f"config.json names the vision-language model, of a size that nobody published, by its absolute path:"
        f" {place / LOCAL_VLM}. Where the folder moves, change vlm_model_name there",
    )


def _name_tokenizers(folder: Path, place: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """Name pi0-FAST's tokenizers by where they will lie, in config.json and the preprocessor; say so."""
    text, actions = (str(place / name) for name in (TEXT_TOKENIZER, ACTION_TOKENIZER))
    named = {"text_tokenizer_name": text, "action_tokenizer_name": actions}
    write_json(folder / "config.json", config | named)
    pipeline = read_json_object(folder / PRE)
    for step in pipeline["steps"]:
        if step["registry_name"] == ACTION_TOKENS:
            step["config"] |= {"action_tokenizer_name": actions, "paligemma_tokenizer_name": text}
    write_json(folder / PRE, pipeline)
    return (
        f"config.json and {PRE} name both tokenizers by their absolute paths: {text} and {actions}. Where "
        "the folder moves, change text_tokenizer_name, action_tokenizer_name and paligemma_tokenizer_name; "
        f"LeRobot runs {write_action_tokenizer.CODE} in the second",
    )


def keeps_float32(info: ParameterInfo, policy: Policy) -> bool:
    """Whether LeRobot keeps a parameter in float32 when the policy is bfloat16."""
    if isinstance(policy, SmolVLA | Groot | XVLA):  # no such setting there, or it casts all; as in vlafit
        return stored_as(info, torch.bfloat16) == torch.float32
    return info.part in ("vision", "projector", "projections") or info.kind == "norm"


def repeat_beside_adapters(folder: Path, base: Path) -> None:
    """Write into `folder` what LeRobot looks for beside adapters: all that lies in `base` but the weights.

    There config.json says that adapters are used; LeRobot finds `base` through adapter_config.json.
    """
    for path in sorted(base.iterdir()):
        if path.name == "config.json":
            config = read_json_object(path)
            write_json(folder / path.name, config | {"use_peft": True})
        elif path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.name != WEIGHTS:
            shutil.copy2(path, folder / path.name)


def _tensors(policy: Policy) -> dict[str, Tensor]:
    weights = {name: p.detach().cpu().contiguous() for name, p in policy.named_parameters()}
    if isinstance(policy, XVLA):
        weights[POSITIONS] = weights[POSITIONS][None]
        return {lerobot.XVLA.file_name(name): tensor for name, tensor in weights.items()}
    embedding = weights["language.embed_tokens.weight"]
    if isinstance(policy, Pi0Fast):
        weights.setdefault("lm_head.weight", embedding.clone())
        return {lerobot.PI0_FAST.file_name(name): tensor for name, tensor in weights.items()}
    names = lerobot.SMOLVLA if isinstance(policy, SmolVLA) else lerobot.PI0
    tensors = {names.file_name(name): tensor for name, tensor in weights.items()}
    if isinstance(policy, SmolVLA):
        return tensors | {names.unused[0]: embedding.clone()}
    width = policy.config.expert.width
    dead = torch.zeros(embedding.shape[0], width, dtype=embedding.dtype)
    return tensors | {names.ties["language.embed_tokens.weight"]: embedding.clone(), names.unused[0]: dead}


def write_vlm(folder: Path, config: SmolVLAConfig, words: Tokenizer) -> None:
    """Write the backbone config folder that LeRobot needs for non-standard SmolVLA sizes.

    LeRobot makes the network from the model that `vlm_model_name` names, of which it reads the config, and
    the processor for two token ids that it never embeds. The weights are SmolVLA's own. `words` is the
    policy's tokenizer, after whose ids the marks come.
    """
    folder.mkdir()
    write_json(folder / "config.json", _vlm_config(config))
    write_json(folder / "processor_config.json", {"processor_class": "SmolVLMProcessor"})
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "SmolVLMImageProcessor"})
    write_json(folder / "video_preprocessor_config.json", {"video_processor_type": "SmolVLMVideoProcessor"})
    words.save(folder)
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content = read_json_object(path)
    have = words.backend.get_vocab(with_added_tokens=True)
    for mark in (mark for mark in MARKS.values() if mark not in have):
        content["added_tokens"].append(
            {
                "id": 1 + max(words.vocab_size - 1, *(token["id"] for token in content["added_tokens"])),
                "content": mark,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    write_json(path, content)
    write_json(settings, read_json_object(settings) | {"extra_special_tokens": MARKS})


def _vlm_config(config: SmolVLAConfig) -> dict[str, Any]:
    """Return the config.json of a SmolVLM of these sizes."""
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
