"""Tiny checkpoints in the layouts of the public ones that were fine-tuned on LIBERO, their weights random.

LeRobot's have its feature names of LIBERO, statistics in the processors, and only the name of a tokenizer;
openpi's have norm_stats.json in assets/physical-intelligence/libero; OpenVLA-OFT's its component files and
statistics by dataset.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoints import test_openvla
from tests.checkpoints.forms import SMOLVLA, dummy
from tests.policies.tiny import random_policy
from vlafit.checkpoints.formats.lerobot import names as lerobot
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.name_map import back
from vlafit.codec.prompts import FORMS
from vlafit.codec.tokenizer import train_word_tokenizer
from vlafit.policies.pi0 import Pi0Config

JAX = Path(__file__).parents[1] / "fixtures" / "openpi_jax" / "ckpt_pure"
SENTENCE = "pick up the alphabet soup and place it in the basket"
HEADS = "vision.heads=2"  # of these tiny ones alone: public sizes tell it
ASSET = "physical-intelligence/libero"
STATE = {
    "mean": [-0.05, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027],
    "std": [0.11, 0.15, 0.38, 0.34, 0.91, 0.33, 0.014, 0.014],
    "q01": [-0.43, -0.29, 0.01, 1.29, -2.63, -1.18, 0.001, -0.041],
    "q99": [0.18, 0.39, 1.27, 3.66, 2.48, 0.55, 0.040, -0.001],
}
ACTION = {
    "mean": [0.06, 0.09, -0.09, 0.0005, 0.005, -0.005, -0.04],
    "std": [0.33, 0.38, 0.44, 0.04, 0.06, 0.08, 0.99],
    "q01": [-0.75, -0.88, -0.94, -0.12, -0.17, -0.19, -1.0],
    "q99": [0.91, 0.86, 0.94, 0.13, 0.19, 0.33, 1.0],
}
"""Statistics of about the size of LIBERO's."""


def write_tokenizer(folder: Path) -> Path:
    """Write a stand-in for PaliGemma's tokenizer, which no checkpoint holds."""
    texts = [SENTENCE, *FORMS["pi05"].vocabulary, " ".join(map(str, range(10)))]
    train_word_tokenizer(texts, 400).save(folder)
    return folder


def pi0_config(family: str, chunk: int) -> Pi0Config:
    """Tiny, with the public sizes of frames (224), states and actions (32)."""
    config = dummy(family)
    return replace(
        config,
        vision=replace(config.vision, image_size=224, patch=14),
        language=replace(config.language, vocab=400),
        state_dim=32,
        action_dim=32,
        chunk=chunk,
        max_tokens=160,
    )


def _write(folder: Path, name: str, values: Any) -> None:
    (folder / name).write_text(json.dumps(values, indent=4))


def _libero_features(size: int = 256) -> tuple[dict[str, Any], dict[str, Any]]:
    picture = {"type": "VISUAL", "shape": [3, size, size]}
    inputs = {
        "observation.images.image": picture,
        "observation.images.image2": picture,
        "observation.state": {"type": "STATE", "shape": [8]},
    }
    return inputs, {"action": {"type": "ACTION", "shape": [7]}}


def _normalisers(folder: Path, modes: dict[str, str], before: list[dict], after: list[dict]) -> None:
    """Write both processors as LeRobot saves them, `before` and `after` the normaliser's step."""
    inputs, outputs = _libero_features()
    common = {"eps": 1e-8, "norm_map": modes}
    state = {f"observation.state.{n}": torch.tensor(v) for n, v in STATE.items()}
    action = {f"action.{n}": torch.tensor(v) for n, v in ACTION.items()}
    pre, post = (f"policy_{kind}processor" for kind in ("pre", "post"))
    file = f"{pre}_step_{len(before)}_normalizer_processor.safetensors"
    inner = {"registry_name": "normalizer_processor", "config": {**common, "features": inputs | outputs}}
    outer = {"registry_name": "unnormalizer_processor", "config": {**common, "features": outputs}}
    undo = f"{post}_step_0_unnormalizer_processor.safetensors"
    save_file(state | action, folder / file)
    save_file(state | action, folder / undo)
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    steps = [*before, inner | {"state_file": file}, *after, device]
    _write(folder, f"{pre}.json", {"name": pre, "steps": steps})
    _write(folder, f"{post}.json", {"name": post, "steps": [outer | {"state_file": undo}, device]})


def _tokenizing(length: int, name: str) -> dict[str, Any]:
    config = {"max_length": length, "task_key": "task", "padding_side": "right", "padding": "max_length"}
    return {
        "registry_name": "tokenizer_processor",
        "config": config | {"truncation": True, "tokenizer_name": name},
    }


BEGIN = [
    {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
    {"registry_name": "to_batch_processor", "config": {}},
]


def write_lerobot_pi05(folder: Path, executed: int = 10, empty: int = 0) -> Path:
    """As lerobot/pi05_libero_finetuned; `empty` cameras were added in training."""
    folder.mkdir(parents=True)
    config = pi0_config("pi05", 12)
    inputs, outputs = _libero_features()
    for i in range(empty):
        inputs[f"observation.images.empty_camera_{i}"] = {"type": "VISUAL", "shape": [3, 224, 224]}
    modes = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
    values = {"type": "pi05", "n_obs_steps": 1, "input_features": inputs, "output_features": outputs}
    values |= {"chunk_size": 12, "n_action_steps": executed, "normalization_mapping": modes}
    values |= {"paligemma_variant": "dummy", "action_expert_variant": "dummy", "empty_cameras": empty}
    values |= {"max_state_dim": 32, "max_action_dim": 32, "image_resolution": [224, 224]}
    values |= {"tokenizer_max_length": 160}
    _write(folder, "config.json", values)
    weights = {lerobot.PI0.file_name(n): t for n, t in random_policy(config).state_dict().items()}
    dead = torch.ones(config.language.vocab, config.expert.width)
    save_file({n: t.clone() for n, t in weights.items()} | {lerobot.PI0.unused[0]: dead},
              folder / "model.safetensors")  # fmt: skip
    words = _tokenizing(160, "google/paligemma-3b-pt-224")
    _normalisers(
        folder,
        modes,
        BEGIN,
        [{"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}}, words],
    )
    return folder


def write_lerobot_smolvla(folder: Path, executed: int = 1) -> Path:
    """As HuggingFaceVLA/smolvla_libero, with its tokenizer beside it."""
    folder.mkdir(parents=True)
    for name in ("tiny_vlm", "tokenizer"):
        shutil.copytree(SMOLVLA / name, folder / name)
    shutil.copy(SMOLVLA / "model.safetensors", folder)
    values = json.loads((SMOLVLA / "config.json").read_text())
    values["input_features"], values["output_features"] = _libero_features()
    _write(folder, "config.json", values | {"n_action_steps": executed, "tokenizer_max_length": 96})
    words = _tokenizing(96, "tokenizer") | {"artifacts": {"tokenizer_name": "tokenizer"}}
    newline = {"registry_name": "smolvla_new_line_processor", "config": {}}
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    _normalisers(folder, modes, [*BEGIN, newline, words], [])
    return folder


def write_openpi(folder: Path, family: str = "pi05", *, padded: bool = False) -> Path:
    """As openpi's pi0_libero and pi05_libero, in PyTorch. `padded`: statistics 32 wide, as older ones are."""
    folder.mkdir(parents=True)
    config = pi0_config(family, 10)
    state = {n: t.detach().clone() for n, t in random_policy(config).state_dict().items()}
    values = {"action_dim": 32, "action_horizon": 10, "precision": "float32"}
    values |= {"paligemma_variant": "dummy", "action_expert_variant": "dummy"}
    _write(folder, "config.json", values)
    dead = torch.ones(config.language.vocab, config.expert.width)
    weights = {n: t.contiguous() for n, t in back(state, openpi.NAMES).items()}
    save_file(weights | {openpi.NAMES.unused[0]: dead}, folder / "model.safetensors")
    return _write_norm_stats(folder, padded)


def write_openpi_orbax(folder: Path) -> Path:
    """As openpi's JAX code saves pi0_libero: Orbax's tree and norm_stats.json; chunks of 6."""
    shutil.copytree(JAX / "params", folder / "params")
    return _write_norm_stats(folder, padded=False)


def _write_norm_stats(folder: Path, padded: bool) -> Path:
    stats = {}
    for name, numbers in (("state", STATE), ("actions", ACTION)):
        width = 32 if padded else len(numbers["mean"])
        stats[name] = {n: [*v, *[0.0] * (width - len(v))] for n, v in numbers.items()}
    asset = folder / "assets" / ASSET
    asset.mkdir(parents=True)
    _write(asset, "norm_stats.json", {"norm_stats": stats})
    return folder


def write_oft(folder: Path, tokenizer: Path) -> Path:
    """As OpenVLA-OFT's, its component files already converted, with LIBERO's statistics."""
    test_openvla.write(folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    stats: dict[str, Any] = {}
    for name, numbers in (("action", ACTION), ("proprio", STATE)):
        stats[name] = {n: list(v) for n, v in numbers.items()}
        stats[name] |= {"min": [v - 0.05 for v in numbers["q01"]], "max": [v + 0.05 for v in numbers["q99"]]}
    for name, value in (("min", 0.0), ("max", 1.0), ("q01", 0.0), ("q99", 1.0), ("mean", 0.52), ("std", 0.5)):
        stats["action"][name][6] = value
    stats["action"]["mask"] = [True] * 6 + [False]
    stats |= {"num_transitions": 66984, "num_trajectories": 454}
    _write(folder, "dataset_statistics.json", {"libero_object_no_noops": stats})
    return folder
