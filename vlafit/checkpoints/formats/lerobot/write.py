"""Write a policy and its codec as LeRobot saves them: config.json, weights, both pipelines, the tokenizer.

LeRobot builds pi0 from names of sizes, so only those it can name are written (`refusals`), and SmolVLA from a
vision-language model, which lies beside it where nobody published one of its sizes. Two tensors
that feed nothing are part of its state: the language head, written as a copy of the embedding, and the head
of pi0's expert, written as zeros.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlafit.checkpoints.assign import stored_as
from vlafit.checkpoints.formats.lerobot import names as lerobot
from vlafit.checkpoints.formats.lerobot import write_vlm as lerobot_vlm
from vlafit.checkpoints.formats.lerobot.write_config import (
    LOCAL_VLM,
    Kind,
    describe,
    size_refusals,
    write_json,
)
from vlafit.checkpoints.formats.lerobot.write_processors import (
    codec_refusals,
    tokenizer_for,
    write_processors,
)
from vlafit.codec import Codec
from vlafit.nn.policy import ParameterInfo, Policy
from vlafit.policies.pi0 import Pi0
from vlafit.policies.smolvla import SmolVLA

WEIGHTS = "model.safetensors"


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


def write(folder: Path, policy: Policy, codec: Codec) -> tuple[str, ...]:
    """Write everything into the empty `folder`; return what to know about it."""
    kind = kind_of(policy)
    assert kind is not None
    save_file(_tensors(policy), folder / WEIGHTS, metadata={"format": "pt"})
    config = describe(policy, codec, kind)
    write_json(folder / "config.json", config)
    if config.get("vlm_model_name") == LOCAL_VLM:
        lerobot_vlm.write(folder / LOCAL_VLM, policy.config, tokenizer_for(codec))
    write_processors(folder, codec, kind, config)
    tokenizer_for(codec).save(folder / "tokenizer")
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


def name_vlm(folder: Path, place: Path) -> tuple[str, ...]:
    """Name the vision-language model that was written into `folder` by where it will lie; say so.

    LeRobot looks for a relative path in the working directory.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("vlm_model_name") != LOCAL_VLM:
        return ()
    write_json(path, config | {"vlm_model_name": str(place / LOCAL_VLM)})
    return (
        f"config.json names the vision-language model, of a size that nobody published, by its absolute path:"
        f" {place / LOCAL_VLM}. Where the folder moves, change vlm_model_name there",
    )


def precise(info: ParameterInfo, policy: Policy) -> bool:
    """Whether LeRobot keeps a parameter in float32 when the policy is bfloat16."""
    if isinstance(policy, SmolVLA):  # which has no such setting there; as ours
        return stored_as(info, torch.bfloat16) == torch.float32
    return info.part in ("vision", "projector", "projections") or info.kind == "norm"


def repeat_beside_adapters(folder: Path, base: Path) -> None:
    """Write into `folder` what LeRobot looks for beside adapters: all that lies in `base` but the weights.

    There config.json says that adapters are used; LeRobot finds `base` through adapter_config.json.
    """
    for path in sorted(base.iterdir()):
        if path.name == "config.json":
            config = json.loads(path.read_text(encoding="utf-8"))
            write_json(folder / path.name, config | {"use_peft": True})
        elif path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.name != WEIGHTS:
            shutil.copy2(path, folder / path.name)


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
