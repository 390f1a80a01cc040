"""Other families are refused by name, whatever lies beside their weights, and ours are not taken for one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from vlafit import checkpoints
from vlafit.checkpoints.formats.hf_transformers.names import SAVED
from vlafit.checkpoints.formats.lerobot.names import SMOLVLA
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.formats.unsupported import name_family
from vlafit.checkpoints.name_map import back
from vlafit.errors import StorageError, WeightsError
from vlafit.policies import smolvla
from vlafit.policies.pi0 import SIZES, build

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOWER = "paligemma.model.vision_tower.vision_model.encoder.layers.0.layer_norm1.weight"
DECODER = "paligemma.model.language_model.layers.0.mlp.up_proj.weight"

# A few tensors of each family, named as its own code names them (see strangers.py).
OTHERS = {
    "GR00T": [
        "backbone.eagle_model.language_model.model.layers.0.mlp.up_proj.weight",
        "action_head.model.transformer_blocks.0.attn1.to_q.weight",
    ],
    "GR00T (LeRobot)": [
        "_groot_model.backbone.eagle_model.mlp1.0.weight",
        "_groot_model.action_head.state_encoder.layer1.W",
    ],
    "OpenVLA-OFT's action head": ["module.model.mlp_resnet_blocks.0.ffn.0.weight", "module.model.fc1.weight"],
    "ACT": ["model.vae_encoder.layers.0.linear1.weight", "model.encoder.layers.0.linear1.weight"],
    "ACT (no VAE)": ["model.encoder.layers.0.self_attn.in_proj_weight", "model.action_head.weight"],
    "LeRobot's diffusion policy": ["diffusion.unet.down_modules.0.0.conv1.block.0.weight"],
    "VQ-BeT": ["vqbet.policy.transformer.wte.weight", "vqbet.action_head.vqvae_model.encoder.net.0.weight"],
    "TD-MPC": ["model._dynamics.0.weight", "model._Qs.0.0.weight", "model._pi.0.weight"],
    "LeRobot's first pi0-FAST": ["model.pi0_paligemma.language_model.model.norm.weight"],
    "PaliGemma alone": [f"paligemma_with_expert.{TOWER}", f"paligemma_with_expert.{DECODER}"],
}


@pytest.mark.parametrize("family", OTHERS)
def test_another_family_is_refused_by_its_name(family: str, tmp_path: Path):
    save_file({name: torch.zeros(2, 2) for name in OTHERS[family]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"type": "pi0", "chunk_size": 4, "input_features": {}}))
    with pytest.raises(WeightsError, match=f"weights of {family.split(' (')[0]}.*no checkpoints"):
        vlafit.load_policy(tmp_path)


def test_none_of_ours_is_taken_for_another():
    stored = [FIXTURES / "openpi_pi0", FIXTURES / "lerobot_smolvla"]
    names = [set(load_file(folder / "model.safetensors")) for folder in stored]
    for size in ("pi0", "pi05"):
        meta = {n: p.detach() for n, p in build(SIZES[size], "meta").named_parameters()}
        names += [{*meta}, {*back(meta, openpi.NAMES)}, {*back(meta, SAVED)}]
    small = smolvla.build(smolvla.SIZES["smolvla"], "meta")
    meta = {n: p.detach() for n, p in small.named_parameters()}
    names += [{*meta}, {*back(meta, SMOLVLA)}]
    assert [name_family(one) for one in names] == [""] * len(names)


@pytest.mark.parametrize("name", ["config.json", "policy_preprocessor.json", "tokenizer.json", "README.md"])
def test_a_pipe_in_a_checkpoint_is_refused_instead_of_waited_for(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(FIXTURES / "lerobot_smolvla", folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(StorageError) as caught:
        checkpoints.load(folder)
    assert all(fact in str(caught.value) for fact in (str(folder / name), "not a regular file", "pipe"))


def test_a_link_to_nothing_never_passes_for_a_file_that_a_checkpoint_does_not_have(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(FIXTURES / "lerobot_smolvla", folder)
    (folder / "policy_preprocessor.json").unlink(missing_ok=True)
    (folder / "policy_preprocessor.json").symlink_to("../blobs/0123")
    with pytest.raises(StorageError) as caught:
        checkpoints.load(folder)
    facts = (str(folder / "policy_preprocessor.json"), "../blobs/0123", "not there", "download")
    assert all(fact in str(caught.value) for fact in facts)
