"""The newest LeRobot, in an environment of its own, against us: they load what we export, and we what they
save.

LeRobot needs Python 3.12 or newer, and other versions than we do. `make peers` makes an environment for it in
.venv-lerobot and runs these tests. With another environment:

    VLAFIT_LEROBOT_PYTHON=/path/to/python pytest tests/parity -s     # -s shows the figures

Cameras of the policy's own size show all of a policy: velocity, loss, samples of 1 and 10 steps agree within
1e-4. Scaled images cannot agree so nearly: our codec rounds them to whole grey levels, since images stay
uint8 until they reach the device, and LeRobot's stay floats; so they differ by up to half a level, 1/255 in
[-1, 1]. That is tested as such, then the policy on their images within 1e-4, then both together.
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
from vlafit.checkpoints.export import export, write
from vlafit.checkpoints.formats.lerobot import write as lerobot_export
from vlafit.codec import Codec, CodecConfig, train_word_tokenizer
from vlafit.nn.batch import Batch, stack, unit_images
from vlafit.nn.policy import Policy
from vlafit.policies import pi0, smolvla
from vlafit.tuning.merge import remove
from vlafit.types import Embodiment, Feature, Observation, Sample

PYTHON = os.environ.get("VLAFIT_LEROBOT_PYTHON", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON, reason="VLAFIT_LEROBOT_PYTHON names no interpreter that has LeRobot"),
]

TASKS = ("pick up the red_block", "open the drawer")
HALF_A_LEVEL = 1.01 / 255  # in [-1, 1]
SCALED = 1e-3  # outputs, where images differ by that much; measured: at most 3e-4
HEADS = {"heads": 8, "kv_heads": 1}  # LeRobot's pi0 has no others


def policy_of(kind: str):
    """A tiny random policy that LeRobot can be told the sizes of."""
    if kind == "smolvla":
        config = smolvla.SIZES["smolvla-tiny"]
        expert = dataclasses.replace(config.expert, mlp=256)  # as LeRobot has it for every width below 97
        return random_policy(dataclasses.replace(config, expert=expert, max_tokens=48))
    config = pi0.SIZES[f"{kind}-tiny"]
    sizes = {"vision": dataclasses.replace(config.vision, image_size=16),
             "language": dataclasses.replace(config.language, **HEADS)}  # fmt: skip
    return random_policy(dataclasses.replace(config, **sizes, max_tokens=64))


def codec_of(policy, kind: str, scaled: bool) -> Codec:
    """A codec fitted by us; its cameras are of the policy's size, the second one not if `scaled`."""
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
        ("top", "wrist", ""),  # the third is one that the robot lacks
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A policy, its codec, and what both programs are asked."""

    policy: Policy
    codec: Codec
    samples: list[Sample]
    noise: torch.Tensor
    time: torch.Tensor


def case_of(kind: str, scaled: bool) -> Case:
    policy, rng = policy_of(kind), np.random.default_rng(1)
    codec, samples = codec_of(policy, kind, scaled), []
    for task in TASKS:
        images = {c.name: rng.integers(0, 256, c.shape, dtype=np.uint8) for c in codec.embodiment.cameras}
        view = Observation(images, rng.normal(3.0, 2.0, 4).astype(np.float32), task)
        actions = rng.normal(0.0, 0.2, (codec.config.chunk, 3))
        if codec.config.relative:
            actions += np.where(codec.config.relative, view.state[:3], 0.0)
        samples.append(Sample(view, actions.astype(np.float32), np.ones(len(actions), bool), ("", task, 0)))
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, codec.config.chunk, codec.config.action_dim, generator=generator)
    return Case(policy, codec, samples, noise, torch.tensor([0.3, 0.8]))


def name_sizes(exported: Path, kind: str) -> None:
    """Give pi0's config the names of sizes that it must have; the other side makes them tiny."""
    for path in exported.rglob("config.json"):
        values = json.loads(path.read_text())
        if kind != "smolvla" and "paligemma_variant" in values:
            values |= {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
            path.write_text(json.dumps(values))


def ask_lerobot(exported: Path, case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """Return what LeRobot computes from what we exported; what it saves is in folder/out/saved."""
    seen = [sample.observation for sample in case.samples]
    inputs = {
        f"observation.images.{name}": torch.stack(
            [torch.from_numpy(view.images[name]).permute(2, 0, 1) / 255 for view in seen]
        )
        for name in ("top", "wrist")
    }
    inputs["observation.state"] = torch.from_numpy(np.stack([view.state for view in seen]))
    inputs["action"] = torch.from_numpy(np.stack([sample.actions for sample in case.samples]))
    save_file({**inputs, "noise": case.noise, "time": case.time}, folder / "inputs.safetensors")
    (folder / "sizes.json").write_text(json.dumps(dataclasses.asdict(case.policy.config)))
    (folder / "tasks.json").write_text(json.dumps(TASKS))
    side = Path(__file__).with_name("lerobot_side.py")
    command = [PYTHON, str(side), str(exported), str(folder / "inputs.safetensors"), str(folder / "out")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(folder / "out" / "found.safetensors")


def differences(
    policy: Policy, batch: Batch, case: Case, theirs: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Return the largest difference of each output, ours from `batch`."""
    policy.eval()
    with torch.no_grad():
        ours = {
            "velocity": policy.velocity(batch, case.noise, case.time),
            "loss": policy.flow_loss(batch, case.noise, case.time)["loss"],
            "once": policy.sample(batch, case.noise, steps=1)[..., :3],
            "actions": policy.sample(batch, case.noise)[..., :3],
        }
    return {name: float((value - theirs[name]).abs().max()) for name, value in ours.items()}


def show(what: str, found: dict[str, float]) -> None:
    print(f"{what}: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
def test_lerobot_computes_from_our_export_what_we_do_and_we_load_what_it_saves(
    kind: str, scaled: bool, tmp_path: Path
):
    case, exported = case_of(kind, scaled), tmp_path / "exported"
    policy, codec = case.policy, case.codec
    if kind == "smolvla":
        write(policy, codec, "lerobot", exported, "here")
    else:
        exported.mkdir()
        lerobot_export.write(exported, policy, codec)  # past the refusal: no tiny size has a name
        name_sizes(exported, kind)
    theirs = ask_lerobot(exported, case, tmp_path)

    batch = stack([codec.encode(sample) for sample in case.samples])
    width = theirs["observation.language.tokens"].shape[1]
    assert torch.equal(batch.tokens[:, :width], theirs["observation.language.tokens"])
    assert torch.equal(batch.token_mask[:, :width], theirs["observation.language.attention_mask"])
    torch.testing.assert_close(batch.state[:, :4], theirs["observation.state"], atol=1e-4, rtol=1e-5)
    assert batch.actions is not None
    torch.testing.assert_close(batch.actions[..., :3], theirs["action"], atol=1e-4, rtol=1e-5)
    assert batch.image_mask.tolist() == [[True, True, False]] * 2
    pixels = float((unit_images(batch.images) - theirs["images"])[:, :2].abs().max())
    alike = differences(policy, dataclasses.replace(batch, images=theirs["images"]), case, theirs)
    whole = differences(policy, batch, case, theirs)
    show(f"{kind}, their images", alike)
    show(f"{kind}, ours{' (scaled)' if scaled else ''}", {"images": pixels, **whole})
    assert max(alike.values()) < 1e-4
    assert pixels < (HALF_A_LEVEL if scaled else 1e-6)
    assert max(whole.values()) < (SCALED if scaled else 1e-4)
    for i, sample in enumerate(case.samples):
        padded = np.zeros((codec.config.chunk, codec.config.action_dim), np.float32)
        padded[:, :3] = theirs["actions"][i]
        robot = codec.decode(padded, sample.observation).actions
        np.testing.assert_allclose(robot, theirs["robot"][i], atol=1e-4)

    given = {"vision.heads": 2, "language.head_dim": 8}
    saved = tmp_path / "out" / "saved"
    if kind == "smolvla":
        shutil.copytree(exported / "vlm", saved / "vlm")
        given["expert.mlp"] = policy.config.expert.mlp  # another than LeRobot gives an expert of this width
    else:  # the names are those of large sizes, which these tensors contradict
        path = saved / "config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"paligemma_variant": "", "action_expert_variant": ""}))
    again = vlafit.load_checkpoint(saved, config=given)
    assert again.policy.config == policy.config
    assert all(torch.equal(p, again.policy.get_parameter(n)) for n, p in policy.named_parameters())
    if again.codec is None:  # older versions save no tokenizer
        again = vlafit.load_checkpoint(saved, config=given, tokenizer=exported / "tokenizer")
    assert again.codec is not None
    repeated = stack([again.codec.encode(sample) for sample in case.samples])
    assert torch.equal(repeated.tokens, batch.tokens) and torch.equal(repeated.images, batch.images)
    torch.testing.assert_close(repeated.state, batch.state, atol=1e-4, rtol=1e-5)
    assert max(differences(again.policy, repeated, case, theirs).values()) < (SCALED if scaled else 1e-4)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
def test_lerobot_computes_with_our_adapters_what_we_do(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lerobot_export, "refusals", lambda policy, codec: [])  # no tiny size has a name
    case = case_of(kind, scaled=False)
    kinds = ["attention", "mlp", "conv", "embedding", "linear"]
    wide = {"select": {"part": "expert", "kind": ["attention", "mlp"]}, "mode": method, "rank": 5, "alpha": 3}
    rest = {"select": {"part": ["vision", "projector", "language"], "kind": kinds}, "mode": method, "rank": 3}
    projections = {"select": {"part": "projections"}, "mode": "full"}
    plan = vlafit.apply_strategy(case.policy, [wide, rest, projections, {"mode": "frozen"}])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in case.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    vlafit.save_checkpoint(case.policy, tmp_path / "native", codec=case.codec, plan=plan)
    export(tmp_path / "native", "lerobot", tmp_path / "exported")
    name_sizes(tmp_path / "exported", kind)
    theirs = ask_lerobot(tmp_path / "exported", case, tmp_path)
    batch = stack([case.codec.encode(sample) for sample in case.samples])
    found = differences(case.policy, batch, case, theirs)
    bare = differences(remove(case.policy), batch, case, theirs)
    show(f"{kind}, {method}", found)
    assert max(found.values()) < 1e-4
    assert bare["velocity"] > 1e-2  # the adapters have a say
