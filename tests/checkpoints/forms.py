"""Tiny checkpoints as other programs write them, with all that config files state, and ways to cut them."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.policies.tiny import random_policy
from vlafit.checkpoints.formats.groot import names as groot_names
from vlafit.checkpoints.formats.hf_transformers import names as transformers
from vlafit.checkpoints.formats.lerobot import names as lerobot
from vlafit.checkpoints.formats.lerobot import write_groot as groot_lerobot
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.name_map import NameMap, back
from vlafit.policies import groot, pi0, smolvla
from vlafit.policies.pi0 import SIZES, Pi0Config

Tensors = dict[str, Tensor]
SMOLVLA = Path(__file__).parents[1] / "fixtures" / "lerobot_smolvla"
GROOT = Path(__file__).parents[1] / "fixtures" / "lerobot_groot"
GROOT_CHAT = {  # what the stand-in tokenizer of that folder tells
    "chat": {
        "opening": [190, 86, 84, 70, 83, 96],
        "image_start": 192,
        "image_end": 193,
        "closing": [191, 96],
        "pad": 196,
    }
}


def dummy(family: str) -> Pi0Config:
    """A tiny policy whose decoders are openpi's variant "dummy", but for the vocabulary."""
    config = SIZES[f"{family}-tiny"]
    sizes = {"width": 64, "depth": 4, "mlp": 128, "heads": 8, "kv_heads": 1, "head_dim": 16}
    return replace(
        config,
        language=replace(config.language, **sizes, vocab=40),
        expert=replace(config.expert, width=64, mlp=128),
        state_dim=5,
        action_dim=5,
    )


@dataclass(frozen=True)
class Form:
    """How one program writes a policy. `told` is what its files do not say; `cut` what they contradict."""

    name: str
    names: NameMap
    axes: Mapping[str, str]
    write: Callable[[Path], Tensors]
    told: Mapping[str, object]
    cut: tuple[str, ...]
    unused: tuple[str, ...] = ()
    """Knowingly unused tensors, of which the numbers may be anything."""


def _dead(config: Pi0Config) -> Tensor:
    return torch.ones(config.language.vocab, config.expert.width)


def _write_openpi(family: str) -> Callable[[Path], Tensors]:
    def write(folder: Path) -> Tensors:
        config = dummy(family)
        values = {"action_dim": 5, "action_horizon": 4, "precision": "float32"}
        values |= {"paligemma_variant": "dummy", "action_expert_variant": "dummy_lora"}
        (folder / "config.json").write_text(json.dumps(values))
        state = {n: t.detach().clone() for n, t in random_policy(config).state_dict().items()}
        return back(state, openpi.NAMES) | {openpi.NAMES.unused[0]: _dead(config)}

    return write


def _write_lerobot(family: str) -> Callable[[Path], Tensors]:
    def write(folder: Path) -> Tensors:
        config = dummy(family)
        values = {"type": family, "chunk_size": 4, "input_features": {}, "tokenizer_max_length": 12}
        values |= {"paligemma_variant": "dummy", "action_expert_variant": "dummy"}
        values |= {"max_state_dim": 5, "max_action_dim": 5, "image_resolution": [8, 8]}
        (folder / "config.json").write_text(json.dumps(values))
        state = {n: t.detach().clone() for n, t in random_policy(config).state_dict().items()}
        return {lerobot.PI0.file_name(name): tensor for name, tensor in state.items()} | {
            lerobot.PI0.unused[0]: _dead(config)
        }

    return write


def _write_transformers(folder: Path) -> Tensors:
    config = dummy("pi0")
    v, lang, expert = config.vision, config.language, config.expert
    text = {
        "num_hidden_layers": lang.depth,
        "num_attention_heads": lang.heads,
        "num_key_value_heads": lang.kv_heads,
        "head_dim": lang.head_dim,
    }
    tower = {
        "hidden_size": v.width,
        "num_hidden_layers": v.depth,
        "intermediate_size": v.mlp,
        "num_attention_heads": v.heads,
        "patch_size": v.patch,
        "image_size": v.image_size,
    }
    own = {"hidden_size": lang.width, "intermediate_size": lang.mlp, "vocab_size": lang.vocab}
    values = {
        "vlm_config": {"text_config": text | own, "vision_config": tower},
        "dit_config": text | {"hidden_size": expert.width, "intermediate_size": expert.mlp},
        "chunk_size": 4,
        "max_state_dim": 5,
        "max_action_dim": 5,
    }
    (folder / "config.json").write_text(json.dumps(values))
    state = {n: t.detach().clone() for n, t in random_policy(config).state_dict().items()}
    # The expert's own embedding has as many rows as its own config says, which nobody reads.
    return back(state, transformers.SAVED) | {transformers.SAVED.unused[0]: torch.ones(7, expert.width)}


def _write_smolvla(folder: Path) -> Tensors:
    shutil.copytree(SMOLVLA, folder, dirs_exist_ok=True)
    return load_file(SMOLVLA / "model.safetensors")


def _write_lerobot_groot(folder: Path) -> Tensors:
    shutil.copytree(GROOT, folder, dirs_exist_ok=True)
    return load_file(GROOT / "model.safetensors")


def write_nvidia_groot(folder: Path) -> Tensors:
    """Write the same policy as NVIDIA lays it out: no prefix, and the token table by its own name."""
    shutil.copy(GROOT / "tiny_base" / "config.json", folder)
    shutil.copytree(GROOT / "tiny_backbone", folder / "tiny_backbone", dirs_exist_ok=True)
    words = "backbone.model.model.language_model.embed_tokens.weight"
    stripped = {n.removeprefix("_groot_model."): t for n, t in load_file(GROOT / "model.safetensors").items()}
    return {words if n == "backbone.model.lm_head.weight" else n: t for n, t in stripped.items()}


PI0_CUT = (
    "language.width",
    "language.mlp",
    "expert.width",
    "expert.mlp",
    "queries",
    "depth",
    "language.vocab",
)
WIDTHS = ("action_dim", "state_dim")
HEADS = {"vision.heads": 2}
GROOT_CUT = (
    "vision.mlp",
    "vision.depth",
    "language.width",
    "language.mlp",
    "queries",
    "depth",
    "language.vocab",
)
ALL = ("vision.mlp", "vision.depth", "patches", *PI0_CUT, *WIDTHS)
FORMS = [
    Form("openpi pi0", openpi.NAMES, pi0.SHAPES.axes, _write_openpi("pi0"), HEADS, (*PI0_CUT, *WIDTHS)),
    Form(
        "openpi pi05", openpi.NAMES, pi0.SHAPES.axes, _write_openpi("pi05"), HEADS, (*PI0_CUT, "action_dim")
    ),
    Form(
        "LeRobot pi0",
        lerobot.PI0,
        pi0.SHAPES.axes,
        _write_lerobot("pi0"),
        HEADS,
        (*PI0_CUT, *WIDTHS, "patches"),
    ),
    Form(
        "LeRobot pi05", lerobot.PI0, pi0.SHAPES.axes, _write_lerobot("pi05"), HEADS, (*PI0_CUT, "action_dim")
    ),
    Form("transformers", transformers.SAVED, pi0.SHAPES.axes, _write_transformers, {}, ALL),
    Form("SmolVLA", lerobot.SMOLVLA, smolvla.SHAPES.axes, _write_smolvla, {}, ALL),
    Form(
        "LeRobot GR00T", groot_lerobot.NAMES, groot.SHAPES.axes, _write_lerobot_groot, GROOT_CHAT, GROOT_CUT
    ),
    Form("NVIDIA GR00T", groot_names.NAMES, groot.SHAPES.axes, write_nvidia_groot, GROOT_CHAT, GROOT_CUT),
]
FORMS = [replace(form, unused=form.names.unused) for form in FORMS]


def save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors")


def cut(form: Form, tensors: Tensors, what: str) -> Tensors:
    """Return the tensors with a dimension shorter wherever it is, but for what is knowingly unused."""
    if what in ("depth", "vision.depth"):
        parts = ("vision",) if what == "vision.depth" else ("language", "expert")
        begin = rf"({'|'.join(parts)})\.layers\.(\d+)\."
        ours = {name: re.match(begin, form.names.policy_name(name)) for name in tensors}
        layers = {name: int(found[2]) for name, found in ours.items() if found}
        return {n: t for n, t in tensors.items() if layers.get(n) != max(layers.values())}
    tied = {theirs: ours for ours, theirs in form.names.ties.items()}
    out = {}
    for name, tensor in tensors.items():
        words = form.axes.get(
            re.sub(r"\.layers\.\d+\.", ".layers.*.", tied.get(name, form.names.policy_name(name)))
        )
        for axis, word in enumerate(words.split() if words and name not in form.unused else ()):
            factor, _, key = word.rpartition("*")
            if key == what:
                less = int(factor or 1) * {"queries": 16, "patches": tensor.shape[axis] - 1}.get(what, 2)
                tensor = tensor.narrow(axis, 0, tensor.shape[axis] - less)
        out[name] = tensor
    return out
