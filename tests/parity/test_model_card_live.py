"""The Python in the card of a LeRobot export, run by LeRobot as it is printed; see test_lerobot_live."""

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import vlafit
from tests.checkpoints.pi0_fast_folder import TOLD, write_folder
from tests.checkpoints.test_export import codec_for, unpublished
from tests.parity.test_groot_live import of_row
from tests.parity.test_lerobot_live import codec_of, policy_of
from vlafit import checkpoints
from vlafit.checkpoints.export import export
from vlafit.checkpoints.formats.lerobot import write as lerobot_export
from vlafit.codec import Codec
from vlafit.nn.policy import Policy
from vlafit.policies import build_family

PYTHON = os.environ.get("VLAFIT_LEROBOT_PYTHON", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON, reason="VLAFIT_LEROBOT_PYTHON names no interpreter that has LeRobot"),
]

ACT = """
import json, torch
observation = {name: torch.rand(feature.shape) for name, feature in config.input_features.items()}
action = act({**observation, "task": "pick up the red block"})
kinds = [type(policy).__name__, any("lora" in name for name, _ in policy.named_parameters())]
print(json.dumps([list(action.shape), bool(torch.isfinite(action).all()), *kinds]))
"""
# LeRobot knows pi0's sizes by name alone, so those of a tiny one are told to it first; see lerobot_side.
SIZES = {
    "pi0": "from lerobot_side import tell_sizes\ntell_sizes('pi0', {sizes})\n",
    "pi0_fast": "from pi0_fast_side import tell_sizes\ntell_sizes({sizes})\n",
}
SIZES["pi05"] = SIZES["pi0"]


def tiny_pi0(kind: str) -> tuple[Policy, Codec]:
    policy = policy_of(kind)
    return policy, codec_of(policy, kind, scaled=False)


def small(policy: Policy) -> tuple[Policy, Codec]:
    return policy, codec_for(policy)


def recorded_pi0_fast() -> tuple[Policy, Codec]:
    """The recorded policy, whose answers are chunks of actions."""
    with TemporaryDirectory() as folder:
        loaded = vlafit.load_checkpoint(write_folder(Path(folder) / "recorded", "overfit"), config=TOLD)
    assert isinstance(loaded.codec, Codec)
    return loaded.policy, loaded.codec


CASES: dict[str, tuple[str, Callable[[], tuple[Policy, Codec]]]] = {
    "smolvla": ("SmolVLAPolicy", lambda: small(unpublished())),
    "xvla": ("XVLAPolicy", lambda: small(build_family("xvla", "xvla-tiny"))),
    "pi0": ("PI0Policy", lambda: tiny_pi0("pi0")),
    "pi05": ("PI05Policy", lambda: tiny_pi0("pi05")),
    "groot": ("GrootPolicy", lambda: of_row(0)),
    "pi0_fast": ("PI0FastPolicy", recorded_pi0_fast),
}


@pytest.mark.parametrize(("kind", "strategy"), [("smolvla", "lora"), *((kind, "full") for kind in CASES)])
def test_lerobot_acts_by_the_python_in_the_card_of_an_export(
    kind: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, build = CASES[kind]
    policy, codec = build()
    wanted = [1, codec.embodiment.action.shape[0]]
    plan = vlafit.apply_strategy(policy, strategy)
    checkpoints.save(policy, tmp_path / "saved", codec, plan=plan, recipe='name = "mine"\n')
    folder = tmp_path / "path" / "to" / "this" / "folder"
    if kind in SIZES:
        monkeypatch.setattr(lerobot_export, "refusals", lambda policy, codec: [])  # no tiny size has a name
    export(tmp_path / "saved", "lerobot", folder)
    code, ours = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code.count("path/to/this/folder") == 1 and "vlafit.load_actor(" in ours
    before = ""
    if kind in SIZES:
        sizes = json.dumps(dataclasses.asdict(policy.config)).replace("null", "None")
        before = SIZES[kind].format(sizes=sizes.replace("true", "True").replace("false", "False"))
        for path in folder.rglob("config.json"):
            values = json.loads(path.read_text())
            if "paligemma_variant" in values:
                values["paligemma_variant"] = "gemma_2b"
                if "action_expert_variant" in values:
                    values["action_expert_variant"] = "gemma_300m"
                path.write_text(json.dumps(values))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    done = subprocess.run(
        [PYTHON, "-c", before + code + ACT],
        cwd=tmp_path,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shape, finite, made, adapted = json.loads(done.stdout.splitlines()[-1])
    assert shape == wanted and finite and made == name and adapted == (strategy == "lora")
