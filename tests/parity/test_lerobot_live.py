"""The newest LeRobot, in an environment of its own, against us: they load what we export, and we what they
save.

LeRobot needs another Python and other versions than we do. Make an environment for it (`pip install
"lerobot[pi,smolvla]"`, Python 3.12 or newer), and name its interpreter in VLAFIT_LEROBOT_PYTHON.
"""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from tests.policies.tiny import random_policy
from vlafit.checkpoints import lerobot_export
from vlafit.codec import Codec, CodecConfig, train_word_tokenizer
from vlafit.nn.batch import stack
from vlafit.policies import pi0, smolvla
from vlafit.types import Embodiment, Feature, Observation, Sample

PYTHON = os.environ.get("VLAFIT_LEROBOT_PYTHON", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="VLAFIT_LEROBOT_PYTHON names no interpreter that has LeRobot"),
]

TASKS = ("pick up the red_block", "open the drawer")
HEADS = {"heads": 8, "kv_heads": 1}  # LeRobot's pi0 has no others


def policy_of(kind: str):
    """A tiny random policy that LeRobot can be told the sizes of."""
    if kind == "smolvla":
        return random_policy(dataclasses.replace(smolvla.SIZES["smolvla-tiny"], max_tokens=48))
    config = pi0.SIZES[f"{kind}-tiny"]
    sizes = {"vision": dataclasses.replace(config.vision, image_size=16),
             "language": dataclasses.replace(config.language, **HEADS)}  # fmt: skip
    return random_policy(dataclasses.replace(config, **sizes, max_tokens=64))


def codec_of(policy, kind: str, scaled: bool) -> Codec:
    """A codec fitted by us; both cameras are of the policy's size, the second one not if `scaled`."""
    needs, rng = policy.needs(), np.random.default_rng(0)
    robot = Embodiment(
        name="arm",
        cameras=(
            Feature("top", (needs.image_size, needs.image_size, 3)),
            Feature("wrist", (10, 24, 3) if scaled else (needs.image_size, needs.image_size, 3)),
        ),
        state=Feature("state", (4,)),
        action=Feature("action", (3,), labels=("x", "gripper", "y")),
        hz=10.0,
        control="delta_position",
    )
    config = CodecConfig(
        ("top", "wrist"),
        needs.image_size,
        needs.state_dim,
        needs.action_dim,
        needs.chunk,
        normalisation="quantile" if kind == "pi05" else "mean_std",
        relative=() if kind == "smolvla" else (True, False, True),
        prompt=needs.prompt,
        max_tokens=needs.max_tokens,
        framing="smolvla" if kind == "smolvla" else "lerobot",
    )
    states, actions = rng.normal(3.0, 2.0, (200, 4)), rng.normal(0.0, 0.2, (200, 3))
    words = train_word_tokenizer([*TASKS, "Task: , State: -1 0 7 255;\nAction: "], 300)
    return Codec.fit(config, robot, states, actions, words)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
def test_lerobot_computes_from_our_export_what_we_do_and_we_load_what_it_saves(
    kind: str, scaled: bool, tmp_path: Path
):
    policy, rng = policy_of(kind), np.random.default_rng(1)
    codec = codec_of(policy, kind, scaled)
    exported = tmp_path / "exported"
    exported.mkdir()
    lerobot_export.write(exported, policy, codec)  # past the refusal: no tiny size has a name
    if kind != "smolvla":
        values = json.loads((exported / "config.json").read_text())
        values |= {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
        (exported / "config.json").write_text(json.dumps(values))
    samples = []
    for task in TASKS:
        images = {c.name: rng.integers(0, 256, c.shape, dtype=np.uint8) for c in codec.embodiment.cameras}
        view = Observation(images, rng.normal(3.0, 2.0, 4).astype(np.float32), task)
        actions = rng.normal(0.0, 0.2, (codec.config.chunk, 3)).astype(np.float32)
        samples.append(Sample(view, actions, np.ones(len(actions), bool), ("", task, 0)))
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, codec.config.chunk, codec.config.action_dim, generator=generator)
    time = torch.tensor([0.3, 0.8])
    inputs = {
        f"observation.images.{name}": torch.stack(
            [torch.from_numpy(s.observation.images[name]).permute(2, 0, 1) / 255 for s in samples]
        )
        for name in ("top", "wrist")
    }
    inputs["observation.state"] = torch.from_numpy(np.stack([s.observation.state for s in samples]))
    inputs["action"] = torch.from_numpy(np.stack([s.actions for s in samples]))
    save_file({**inputs, "noise": noise, "time": time}, tmp_path / "inputs.safetensors")
    (tmp_path / "sizes.json").write_text(json.dumps(dataclasses.asdict(policy.config)))
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS))

    side = Path(__file__).with_name("lerobot_side.py")
    command = [PYTHON, str(side), str(exported), str(tmp_path / "inputs.safetensors"), str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = load_file(tmp_path / "out" / "found.safetensors")

    batch = stack([codec.encode(sample) for sample in samples])
    width = theirs["observation.language.tokens"].shape[1]
    assert torch.equal(batch.tokens[:, :width], theirs["observation.language.tokens"])
    assert torch.equal(batch.token_mask[:, :width], theirs["observation.language.attention_mask"])
    torch.testing.assert_close(batch.state[:, :4], theirs["observation.state"], atol=1e-4, rtol=1e-5)
    assert batch.actions is not None
    torch.testing.assert_close(batch.actions[..., :3], theirs["action"], atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        loss = policy.loss(batch, noise, time)["loss"]
        actions = policy.act(batch, noise)
    # Scaled images are rounded to whole grey levels here, and stay floats there.
    close = {"atol": 3e-2 if scaled else 1e-4, "rtol": 0.0}
    torch.testing.assert_close(loss, theirs["loss"], **close)
    torch.testing.assert_close(actions[..., :3], theirs["actions"], **close)
    for i, sample in enumerate(samples):
        padded = np.zeros(actions.shape[1:], np.float32)
        padded[:, :3] = theirs["actions"][i]
        robot = codec.decode(padded, sample.observation).actions
        np.testing.assert_allclose(robot, theirs["robot"][i], atol=1e-4)

    given = {"vision.heads": 2, "language.head_dim": 8}
    saved = tmp_path / "out" / "saved"
    if kind == "smolvla":
        shutil.copytree(exported / "vlm", saved / "vlm")
    again = vlafit.load_checkpoint(saved, config=given)
    assert again.policy.config == policy.config
    assert all(torch.equal(p, again.policy.get_parameter(n)) for n, p in policy.named_parameters())
    if again.codec is None:  # older versions save no tokenizer
        again = vlafit.load_checkpoint(saved, config=given, tokenizer=exported / "tokenizer")
    assert again.codec is not None
    repeated = stack([again.codec.encode(sample) for sample in samples])
    assert torch.equal(repeated.tokens, batch.tokens) and torch.equal(repeated.images, batch.images)
    torch.testing.assert_close(repeated.state, batch.state, atol=1e-4, rtol=1e-5)
