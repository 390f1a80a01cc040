"""Time to take the statistics of a dataset at the start of a run, and to read those that were kept.

python benchmarks/dataset_statistics.py --episodes 200 --steps 300 --chunk 50
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from vlafit.datasets import Card, open_dataset
from vlafit.datasets.card import CameraCard, ColumnCard, InstructionCard, RobotCard
from vlafit.datasets.hdf5_index import SWITCH
from vlafit.datasets.statistics_cache import statistics_of

JOINTS, SIZE = 14, 8


def write(folder: Path, episodes: int, steps: int) -> None:
    """Write episodes in ALOHA's layout, joints moving at random."""
    rng = np.random.default_rng(0)
    for number in range(episodes):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            joints = rng.normal(size=(steps, JOINTS)).cumsum(axis=0).astype(np.float32)
            file["observations/qpos"], file["action"] = joints, joints
            file["observations/images/top"] = np.ones((steps, SIZE, SIZE, 3), np.uint8)


def main() -> None:
    """Print CPU seconds with absolute and with relative actions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--chunk", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        folder.mkdir()
        write(folder, options.episodes, options.steps)
        os.environ[SWITCH] = str(Path(name) / "cache")
        camera = CameraCard("top", "observations/images/top", SIZE, SIZE)
        columns = (ColumnCard(("observations/qpos",), JOINTS), ColumnCard(("action",), JOINTS))
        robot = RobotCard("aloha", 50, "joint_position", (camera,), *columns)
        store = open_dataset(Card("many", "aloha", str(folder), robot, InstructionCard("card", "do it")))
        ids = [info.id for info in store.episodes]
        for what, relative in (("absolute", ()), ("relative", (True,) * JOINTS)):
            for when in ("taken", "kept"):
                cpu = time.process_time()
                statistics_of([store], [ids], options.chunk, relative)
                print(f"{what} actions, {when}: {time.process_time() - cpu:.2f} s CPU")


if __name__ == "__main__":
    main()
