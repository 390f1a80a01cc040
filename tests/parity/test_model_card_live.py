"""The Python in the card of a LeRobot export, run by LeRobot as it is printed; see test_lerobot_live."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import vlafit
from tests.checkpoints.test_export import codec_for, unpublished
from vlafit import checkpoints
from vlafit.checkpoints.export import export

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


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_lerobot_acts_by_the_python_in_the_card_of_an_export(strategy: str, tmp_path: Path) -> None:
    policy = unpublished()
    plan = vlafit.apply_strategy(policy, strategy)
    checkpoints.save(policy, tmp_path / "saved", codec_for(policy), plan=plan, recipe='name = "mine"\n')
    folder = tmp_path / "path" / "to" / "this" / "folder"
    export(tmp_path / "saved", "lerobot", folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code.count("path/to/this/folder") == 1
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [PYTHON, "-c", code + ACT],
        cwd=tmp_path,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shape, finite, kind, adapted = json.loads(done.stdout.splitlines()[-1])
    assert shape == [1, 3] and finite and kind == "SmolVLAPolicy" and adapted == (strategy == "lora")
