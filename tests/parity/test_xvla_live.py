"""LeRobot's own X-VLA against ours: it runs what we export, and we load what it saves.

See test_lerobot_live for the environment. Cameras have the policy's own size, because frames are scaled as
whole grey levels here and as floats there.
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

from vlafit import checkpoints
from vlafit.checkpoints.export import write
from vlafit.codec import Codec, CodecConfig, tokenizer
from vlafit.nn.batch import stack
from vlafit.nn.policy import mean_loss
from vlafit.policies import build_family, xvla
from vlafit.types import Embodiment, Feature, Observation, Sample

PYTHON = os.environ.get("VLAFIT_LEROBOT_PYTHON", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON, reason="VLAFIT_LEROBOT_PYTHON names no interpreter that has LeRobot"),
]

WORDS = Path(__file__).parents[1] / "fixtures" / "lerobot_xvla" / "char_tokenizer"
TASKS = ("pick up the red block", "open it")
BOUND = 1e-4  # the recording's; losses above 10: 1e-6 relative
SPACES = {  # action space -> its width, and the robot's state and action dimensions
    "ee6d": (20, 20, 20),
    "joint": (14, 14, 14),
    "auto": (9, 6, 4),
}


def made(space: str, domain: int) -> tuple[xvla.XVLA, Codec]:
    """A tiny policy with every weight drawn, and a codec that LeRobot can hold."""
    width, states, actions = SPACES[space]
    sizes = {
        "action_space": space, "action_dim": width, "state_dim": max(width, states), "domains": 30,
        "domain": domain, "views": 3, "max_tokens": 24, "chunk": 6, "pad_token": 1, "language.vocab": 300,
        "real_dim": actions if space == "auto" else 0,
        "language.positions": 64, "expert.positions": 96,
    }  # fmt: skip
    policy = build_family("xvla", "xvla-tiny", sizes, torch.Generator().manual_seed(domain))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name != xvla.TIMES:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    needs, rng = policy.needs(), np.random.default_rng(0)
    size = needs.image_size
    robot = Embodiment(
        "arm",
        (Feature("front", (size, size, 3)), Feature("wrist", (size, size, 3))),
        Feature("state", (states,)),
        Feature("action", (actions,)),
        0.0,
        "",
    )
    config = CodecConfig(
        ("front", "wrist", ""), size, needs.state_dim, needs.action_dim, needs.chunk,
        normalisation=needs.normalisation, prompt="text", max_tokens=needs.max_tokens, framing="xvla",
        special_tokens="tokenizer", mask_padding=False,
    )  # fmt: skip
    fitted = rng.normal(1, 2, (90, states)), rng.normal(0, 3, (90, actions))
    return policy.eval(), Codec.fit(config, robot, *fitted, tokenizer.load(WORDS))


def drawn(codec: Codec) -> list[Sample]:
    rng, robot, samples = np.random.default_rng(2), codec.embodiment, []
    for task in TASKS:
        frames = {c.name: rng.integers(1, 256, c.shape, dtype=np.uint8) for c in robot.cameras}
        seen = Observation(frames, rng.normal(size=robot.state.shape).astype(np.float32), task)
        actions = rng.uniform(0, 1, (codec.config.chunk, *robot.action.shape)).astype(np.float32)
        samples.append(Sample(seen, actions, np.ones(len(actions), bool), ("", task, 0)))
    return samples


def ask_lerobot(
    exported: Path, samples: list[Sample], noise: torch.Tensor, draw: torch.Tensor, folder: Path
) -> dict[str, torch.Tensor]:
    """Return what LeRobot computes from what we exported; what it saves is in folder/out/saved."""
    seen = [sample.observation for sample in samples]
    inputs = {
        f"observation.images.{name}": torch.stack(
            [torch.from_numpy(view.images[name]).permute(2, 0, 1) for view in seen]
        ).contiguous()
        for name in seen[0].images
    }
    inputs["observation.state"] = torch.from_numpy(np.stack([view.state for view in seen]))
    inputs["action"] = torch.from_numpy(np.stack([sample.actions for sample in samples]))
    save_file({**inputs, "noise": noise, "draw": draw}, folder / "inputs.safetensors")
    (folder / "tasks.json").write_text(json.dumps(TASKS))
    side = Path(__file__).with_name("xvla_side.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [PYTHON, str(side), str(exported), str(folder / "inputs.safetensors"), str(folder / "out")],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(folder / "out" / "found.safetensors")


@pytest.mark.parametrize(("space", "domain"), [("ee6d", 0), ("joint", 19), ("auto", 3)])
def test_lerobot_computes_from_our_export_what_we_do_and_we_load_what_it_saves(
    space: str, domain: int, tmp_path: Path
) -> None:
    policy, codec = made(space, domain)
    samples, actions = drawn(codec), SPACES[space][2]
    noise = torch.randn(2, 6, policy.config.action_dim, generator=torch.Generator().manual_seed(1))
    draw = torch.tensor([0.3])
    write(policy, codec, "lerobot", tmp_path / "exported", "drawn weights")
    theirs = ask_lerobot(tmp_path / "exported", samples, noise, draw, tmp_path)
    assert theirs["domain_id"].flatten().tolist() == [domain, domain]
    time = (draw + torch.arange(2) / 2) % xvla.TIME_BELOW

    def require_equal(policy: xvla.XVLA, codec: Codec) -> None:
        batch = stack([codec.encode(sample) for sample in samples])
        assert torch.equal(batch.tokens, theirs["observation.language.tokens"])
        width = theirs["observation.state"].shape[1]
        torch.testing.assert_close(batch.state[:, :width], theirs["observation.state"], atol=1e-6, rtol=1e-6)
        with torch.no_grad():
            sums = policy.errors(batch, noise[:, None], time[:, None])
            clean = xvla.interpolate(batch.actions[:, None], noise[:, None], time[:, None])
            predicted = policy.predict(policy.encode(batch), batch.state, clean, time[:, None])[:, 0]
            sampled = policy.sample(batch, noise, policy.steps)
        loss = mean_loss(policy.terms(), {n: float(s) for n, s in sums.items()}, policy.counts(batch, 1))
        assert loss == pytest.approx(theirs["loss"].item(), rel=1e-6, abs=BOUND)
        found = {
            "predicted": float((predicted - theirs["predicted"]).abs().max()),
            "actions": float((sampled[..., :actions] - theirs["actions"][..., :actions]).abs().max()),
        }
        print(
            f"{space}: loss {loss:.4f}, " + ", ".join(f"{name} {value:.1e}" for name, value in found.items())
        )
        assert max(found.values()) < BOUND
        for i, sample in enumerate(samples):
            padded = np.zeros((6, codec.config.action_dim), np.float32)
            padded[:, :actions] = theirs["actions"][i, :, :actions]
            robot = codec.decode(padded, sample.observation).actions
            np.testing.assert_allclose(robot, theirs["robot"][i, :, :actions], atol=BOUND)

    require_equal(policy, codec)
    saved = tmp_path / "out" / "saved"
    again = checkpoints.load(saved, tokenizer=tmp_path / "exported" / "tokenizer")
    assert isinstance(again.policy, xvla.XVLA)
    assert again.codec is not None
    assert replace(again.policy.config, domain=domain) == policy.config
    assert again.codec.embodiment_id == domain  # the processors', so it is the codec that names it
    assert all(torch.equal(p, again.policy.get_parameter(n)) for n, p in policy.named_parameters())
    require_equal(again.policy.eval(), again.codec)
