"""LeRobot's own GR00T N1.7 against ours: it runs what we export, and we load what it saves.

Each row of the tables of embodiments is one robot's; LeRobot finds it by a tag, and our export makes one for
a row that LeRobot has none for. See test_lerobot_live for the environment.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.forms import GROOT
from vlafit import checkpoints
from vlafit.checkpoints.export import write
from vlafit.codec import Codec
from vlafit.nn.batch import stack
from vlafit.policies import groot
from vlafit.types import Observation, Sample

PYTHON = os.environ.get("VLAFIT_LEROBOT_PYTHON", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON, reason="VLAFIT_LEROBOT_PYTHON names no interpreter that has LeRobot"),
]

TASKS = ("Pick up the red_block!", "open it")
BOUND = 1e-4  # the recording's
STEPS = 4


def of_row(row: int) -> tuple[groot.Groot, Codec]:
    """The recorded sizes with every weight drawn anew, for the robot of one row, and the recorded codec."""
    loaded = checkpoints.load(GROOT, tokenizer=GROOT / "char_tokenizer")
    assert isinstance(loaded.policy, groot.Groot)
    assert loaded.codec is not None
    policy = groot.build(replace(loaded.policy.config, embodiment_rows=(row,)), "cpu")
    generator = torch.Generator().manual_seed(row)
    with torch.no_grad():
        for parameter in policy.parameters():
            std = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, std, generator=generator)
    policy.steps = STEPS
    return policy.eval(), loaded.codec


def drawn(codec: Codec, seed: int) -> list[Sample]:
    rng, robot = np.random.default_rng(seed), codec.embodiment
    samples = []
    for task in TASKS:
        frames = {c.name: rng.integers(0, 256, c.shape, dtype=np.uint8) for c in robot.cameras}
        seen = Observation(frames, rng.normal(size=robot.state.shape).astype(np.float32), task)
        actions = rng.normal(size=(codec.config.chunk, *robot.action.shape)).astype(np.float32)
        samples.append(Sample(seen, actions, np.ones(len(actions), bool), ("", task, 0)))
    return samples


def ask_lerobot(
    exported: Path, samples: list[Sample], noise: torch.Tensor, time: torch.Tensor, folder: Path
) -> dict[str, torch.Tensor]:
    """Return what LeRobot computes from what we exported; what it saves is in folder/out/saved."""
    seen = [sample.observation for sample in samples]
    inputs = {
        f"observation.images.{name}": torch.stack(
            [torch.from_numpy(view.images[name]).permute(2, 0, 1) / 255 for view in seen]
        ).contiguous()
        for name in seen[0].images
    }
    inputs["observation.state"] = torch.from_numpy(np.stack([view.state for view in seen]))
    inputs["action"] = torch.from_numpy(np.stack([sample.actions for sample in samples]))
    save_file({**inputs, "noise": noise, "time": 1 - time}, folder / "inputs.safetensors")
    (folder / "tasks.json").write_text(json.dumps(TASKS))
    side = Path(__file__).with_name("groot_side.py")
    command = [PYTHON, str(side), str(exported), str(folder / "inputs.safetensors"), str(folder / "out")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(folder / "out" / "found.safetensors")


@pytest.mark.parametrize("row", [10, 2, 5], ids=["new embodiment", "libero_sim", "a row without a tag"])
def test_lerobot_computes_from_our_export_what_we_do_and_we_load_what_it_saves(row: int, tmp_path: Path):
    policy, codec = of_row(row)
    samples = drawn(codec, row)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, codec.config.chunk, codec.config.action_dim, generator=generator)
    time = torch.tensor([0.25, 0.75])  # both programs put these into the same of 1000 buckets
    exported = tmp_path / "exported"
    write(policy, codec, "lerobot", exported, "drawn weights")
    theirs = ask_lerobot(exported, samples, noise, time, tmp_path)
    assert theirs["embodiment_id"].tolist() == [row, row]

    def require_equal(policy: groot.Groot, codec: Codec) -> None:
        batch = stack([codec.encode(sample) for sample in samples])
        batch = replace(batch, action_mask=theirs["action_mask"].bool())
        torch.testing.assert_close(batch.state, theirs["state"][:, 0], atol=BOUND, rtol=0)
        torch.testing.assert_close(batch.actions, theirs["action"], atol=BOUND, rtol=0)
        with torch.no_grad():
            ours = {
                "velocity": -policy.velocity(batch, noise, time),
                "loss": policy.flow_loss(batch, noise, time)["loss"],
                "actions": policy.sample(batch, noise, STEPS)[..., :6],
            }
        found = {name: float((value - theirs[name]).abs().max()) for name, value in ours.items()}
        print(f"row {row}: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
        assert max(found.values()) < BOUND
        for i, sample in enumerate(samples):
            padded = np.zeros((codec.config.chunk, codec.config.action_dim), np.float32)
            padded[:, :6] = theirs["actions"][i]
            robot = codec.decode(padded, sample.observation).actions
            np.testing.assert_allclose(robot, theirs["robot"][i], atol=BOUND)

    require_equal(policy, codec)
    saved = tmp_path / "out" / "saved"
    again = checkpoints.load(saved, tokenizer=exported / "tokenizer", config=_sizes(policy))
    assert isinstance(again.policy, groot.Groot)
    assert again.codec is not None
    assert again.policy.config == policy.config
    assert all(torch.equal(p, again.policy.get_parameter(n)) for n, p in policy.named_parameters())
    require_equal(again.policy.eval(), again.codec)


def _sizes(policy: groot.Groot) -> dict[str, object]:
    """What only the folder that LeRobot opens first says, which is not beside what LeRobot saves."""
    c, chat = policy.config, vars(policy.config.chat)
    return {
        "chat": {name: list(value) if isinstance(value, tuple) else value for name, value in chat.items()},
        "vision.heads": c.vision.heads,
        "vision.deepstack": list(c.vision.deepstack),
        "language.sections": list(c.language.sections),
        "expert.heads": c.expert.heads,
        "expert.memory_heads": c.expert.memory_heads,
    }
