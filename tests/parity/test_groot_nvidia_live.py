"""LeRobot's own reader of NVIDIA's GR00T folders reads what vlafit writes for NVIDIA's program.

Isaac-GR00T itself is in no package registry; LeRobot repeats its reading of the processors and opens the
weights. See test_lerobot_live for the environment.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.test_groot_processors import DROID, G1, LIBERO, TOKENIZER, assert_near, seen
from tests.checkpoints.test_groot_processors import folder as folder  # a fixture
from tests.checkpoints.test_groot_write import fitted
from vlafit import checkpoints
from vlafit.checkpoints.export import write
from vlafit.types import Observation, Sample

PYTHON = os.environ.get("VLAFIT_LEROBOT_PYTHON", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON, reason="VLAFIT_LEROBOT_PYTHON names no interpreter that has LeRobot"),
]


@pytest.mark.parametrize("tag", [DROID, G1, "of its own", "a new row"])
def test_lerobot_reads_and_decodes_as_we_do(tag: str, folder: Path, tmp_path: Path) -> None:
    own = tag == "of its own"
    config = {"embodiment_rows": [11]} if tag == "a new row" else None
    known = {"of its own": LIBERO, "a new row": G1}.get(tag, tag)
    loaded = checkpoints.load(folder, config, tokenizer=TOKENIZER, assets=known)
    policy = loaded.policy
    codec = fitted(policy) if own else loaded.codec
    assert codec is not None
    out = tmp_path / "out"
    write(policy, codec, "groot", out, "here")
    rng = np.random.default_rng(0)
    robot = codec.embodiment
    states = rng.normal(1, 2, (3, *robot.state.shape)).astype(np.float32)
    answers = rng.uniform(-1.2, 1.2, (3, 8, 12)).astype(np.float32)
    chunks = rng.normal(0, 1, (3, codec.config.answered, *robot.action.shape)).astype(np.float32)
    given = {"state": states, "answer": answers, **({} if tag == DROID else {"chunk": chunks})}
    save_file({name: torch.from_numpy(value) for name, value in given.items()}, tmp_path / "in.safetensors")
    written = {"of its own": "new_embodiment", "a new row": "new_embodiment"}.get(tag, tag)
    row = policy.config.embodiment_rows[0]
    side = Path(__file__).with_name("groot_nvidia_side.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [PYTHON, str(side), str(out), written, str(tmp_path / "in.safetensors"), str(tmp_path / "found")],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=out,  # where model_name ./backbone is looked for
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = load_file(tmp_path / "found")
    assert theirs["embodiment_id"].tolist() == [row] * 3
    table = load_file(out / "model.safetensors")["action_head.state_encoder.layer1.W"]
    assert torch.equal(theirs["first"], table)
    for number in range(3):
        view: Observation = seen(codec, states[number])
        assert_near(codec.encode(view).state, theirs["state"][number].numpy())
        assert_near(codec.decode(answers[number], view).actions, theirs["decoded"][number].numpy())
        if "chunk" in given:
            padded = np.zeros((8, chunks.shape[2]), np.float32)
            padded[: chunks.shape[1]] = chunks[number]
            made = codec.encode(Sample(view, padded, np.ones(8, bool), ("set", "e", 0)))
            assert made.actions is not None and made.action_mask is not None
            shown = np.where(made.action_mask, made.actions, 0.0)
            assert_near(shown, theirs["chunk"][number].numpy())
