"""pi0 against transformers' own PI0ForConditionalGeneration, live, on random tiny weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vlafit
from tests.policies.tiny import random_batch, random_draws
from vlafit.checkpoints.assign import fit
from vlafit.checkpoints.formats.hf_transformers.names import LIVE
from vlafit.checkpoints.name_map import back, translate
from vlafit.nn.batch import Batch, unit_images
from vlafit.policies.pi0 import SIZES, Pi0, build

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", minversion="5.23")  # the names are those of this version

CONFIG = replace(SIZES["pi0-tiny"], time_angles="float32")  # as transformers rounds them
IMAGE = CONFIG.language.vocab - 1  # id of transformers' image token


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    c = CONFIG
    text = {
        "model_type": "gemma",
        "hidden_size": c.language.width,
        "num_hidden_layers": c.language.depth,
        "intermediate_size": c.language.mlp,
        "num_attention_heads": c.language.heads,
        "num_key_value_heads": c.language.kv_heads,
        "head_dim": c.language.head_dim,
        "vocab_size": c.language.vocab,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": c.vision.width,
        "num_hidden_layers": c.vision.depth,
        "intermediate_size": c.vision.mlp,
        "num_attention_heads": c.vision.heads,
        "patch_size": c.vision.patch,
        "image_size": c.vision.image_size,
        "vision_use_head": False,
    }
    config = transformers.PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": vision,
            "projection_dim": c.language.width,
            "image_token_id": IMAGE,
        },
        dit_config={**text, "hidden_size": c.expert.width, "intermediate_size": c.expert.mlp},
        chunk_size=c.chunk,
        max_state_dim=c.state_dim,
        max_action_dim=c.action_dim,
    )
    model = transformers.PI0ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, std, generator=generator)
    return model


@pytest.fixture(scope="module")
def ours(theirs: torch.nn.Module) -> Pi0:
    policy = build(CONFIG)
    fit(policy, translate(theirs.state_dict(), LIVE).weights, where="transformers")
    return policy


@pytest.fixture(scope="module")
def batch() -> Batch:
    made = random_batch(CONFIG)
    made.tokens.clamp_(max=IMAGE - 1)
    return made


def their_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    patches = (CONFIG.vision.image_size // CONFIG.vision.patch) ** 2
    images = torch.where(batch.image_mask, IMAGE, 0).repeat_interleave(patches, 1)
    return {
        "state": batch.state,
        "input_ids": torch.cat([images, batch.tokens], 1),
        "attention_mask": torch.cat([images == IMAGE, batch.token_mask], 1).long(),
        "pixel_values": unit_images(batch.images),
        "pixel_attention_mask": batch.image_mask,
    }


def test_velocity_and_loss_equal_those_of_transformers(theirs: torch.nn.Module, ours: Pi0, batch: Batch):
    noise, time = random_draws(CONFIG, draws=1)
    with torch.no_grad():
        out = theirs(**their_inputs(batch), noise=noise[0], timestep=time[0], actions=batch.actions)
        velocity = ours.velocity(batch, noise[0], time[0])
        loss = ours.flow_loss(batch, noise[0], time[0])["loss"]
    assert out.logits.std() > 0.3
    assert (velocity - out.logits).abs().max() < 2e-5
    assert abs(loss - out.loss) < 1e-5


@pytest.mark.parametrize("steps", [1, 10])
def test_samples_equal_those_of_transformers(theirs: torch.nn.Module, ours: Pi0, batch: Batch, steps: int):
    noise, _ = random_draws(CONFIG, draws=1)
    expected = theirs.sample_actions(**their_inputs(batch), noise=noise[0], num_steps=steps)
    assert (ours.sample(batch, noise[0], steps) - expected).abs().max() < 1e-4


def test_every_name_has_its_counterpart(theirs: torch.nn.Module, ours: Pi0):
    assert set(back(ours.state_dict(), LIVE)) | set(LIVE.unused) == set(theirs.state_dict())


def test_a_folder_that_transformers_saved_loads_exactly(theirs: torch.nn.Module, ours: Pi0, tmp_path: Path):
    theirs.save_pretrained(tmp_path)
    loaded = vlafit.load_checkpoint(tmp_path)
    assert loaded.report.form == "transformers"
    state = loaded.policy.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert loaded.policy.config.vision.heads == CONFIG.vision.heads
    assert loaded.policy.config.chunk == CONFIG.chunk
