"""transformers, as LeRobot has it installed, loads an exported FAST action tokenizer: the same ids."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from vlafit.checkpoints.formats.lerobot import write_action_tokenizer
from vlafit.codec import fast

PYTHON = os.environ.get("VLAFIT_LEROBOT_PYTHON", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON, reason="VLAFIT_LEROBOT_PYTHON names no interpreter that has LeRobot"),
]
RECORDED = Path(__file__).parents[1] / "fixtures" / "lerobot_pi0_fast" / "fast_tokenizer"
SIDE = """
import json, sys
from safetensors.numpy import load_file
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
made = {}
for name, chunk in load_file(sys.argv[2]).items():
    if name.endswith(".chunk"):
        ids = processor(chunk[None])[0]
        again = processor.decode([ids], time_horizon=chunk.shape[0], action_dim=chunk.shape[1])[0]
        made[name] = {"ids": list(ids), "chunk": again.tolist()}
print(json.dumps(made))
"""


def test_transformers_gives_the_ids_and_chunks_that_the_codec_gives(tmp_path: Path) -> None:
    ours = fast.load(RECORDED)
    write_action_tokenizer.write(tmp_path / "action_tokenizer", ours)
    pairs = RECORDED / "pairs.safetensors"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [PYTHON, "-c", SIDE, str(tmp_path / "action_tokenizer"), str(pairs)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    chunks = {name: chunk for name, chunk in load_file(pairs).items() if name.endswith(".chunk")}
    assert theirs.keys() == chunks.keys() and len(chunks) > 5
    for name, chunk in chunks.items():
        ids = ours.encode(chunk)
        assert theirs[name]["ids"] == ids, name
        np.testing.assert_allclose(theirs[name]["chunk"], ours.decode(ids, *chunk.shape).chunk, atol=1e-6)
