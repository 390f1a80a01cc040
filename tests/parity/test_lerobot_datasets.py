"""LeRobot's own reader opens what `vlafit data convert --to lerobot` writes, and returns the same.

`make peers` makes an environment for LeRobot and runs this; see test_lerobot_live.py for another one.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vlafit.datasets import open_dataset
from vlafit.datasets.convert import convert

PYTHON = os.environ.get("VLAFIT_LEROBOT_PYTHON", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON, reason="VLAFIT_LEROBOT_PYTHON names no interpreter that has LeRobot"),
]
HALF_A_LEVEL_AND_ROUNDING = 2  # grey levels: video frames go through two conversions from YUV to RGB


@pytest.mark.parametrize("source", ["tests/fixtures/lerobot_datasets/image", "metaworld-faucet-open"])
@pytest.mark.parametrize("video", ["", "h264", "av1"])
def test_lerobot_reads_every_item_of_a_converted_dataset(source: str, video: str, tmp_path: Path):
    root, out = tmp_path / "converted", tmp_path / "read.npz"
    store = open_dataset(source)
    convert(store, root, "lerobot", video=video)
    reader = Path(__file__).parent / "lerobot_reads.py"
    command = [PYTHON, str(reader), str(root), str(out)]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    again = open_dataset(root / "card.toml")
    with np.load(out) as read:
        assert float(read["fps"]) == store.embodiment.hz
        first = 0
        for number, info in enumerate(store.episodes):
            rows = slice(first, first + info.length)
            assert (read["task"][rows] == info.instruction).all()
            np.testing.assert_array_equal(read["frame_index"][rows].ravel(), np.arange(info.length))
            np.testing.assert_array_equal(read["observation.state"][rows], store.state(number))
            np.testing.assert_array_equal(read["action"][rows], store.actions(number))
            for camera in store.embodiment.cameras:
                frames = read[f"observation.images.{camera.name}"][rows].astype(int)
                ours = again.images(number, range(info.length), camera.name).astype(int)
                bound = HALF_A_LEVEL_AND_ROUNDING if video else 0
                assert np.abs(frames - ours).max() <= bound
            first += info.length
        assert first == len(read["task"])
