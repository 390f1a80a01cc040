"""Time to open many small HDF5 episodes: reading the files, and from the index of an earlier opening.

python benchmarks/hdf5_index.py --files 20 --episodes 100
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from vlafit.datasets import Card, open_dataset
from vlafit.datasets.card import CameraCard, ColumnCard, RobotCard
from vlafit.datasets.hdf5_index import SWITCH

STEPS, SIZE = 20, 8


def write(folder: Path, files: int, episodes: int) -> None:
    """Write `files` files in LIBERO's layout."""
    frames = np.ones((STEPS, SIZE, SIZE, 3), np.uint8)
    for number in range(files):
        with h5py.File(folder / f"task_{number}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": "do it"})
            for episode in range(episodes):
                group = data.create_group(f"demo_{episode}")
                group["actions"], group["obs/ee_pos"] = np.ones((STEPS, 7)), np.ones((STEPS, 3))
                group["obs/gripper"], group["obs/a_rgb"], group["obs/b_rgb"] = (
                    np.ones((STEPS, 2)),
                    frames,
                    frames,
                )


def main() -> None:
    """Print seconds and CPU seconds of three openings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        folder.mkdir()
        write(folder, options.files, options.episodes)
        os.environ[SWITCH] = str(Path(name) / "cache")
        cameras = tuple(CameraCard(n, f"obs/{n}_rgb", SIZE, SIZE) for n in ("a", "b"))
        state, action = ColumnCard(("obs/ee_pos", "obs/gripper"), 5), ColumnCard(("actions",), 7)
        card = Card("many", "libero", str(folder), RobotCard("arm", 20, "delta", cameras, state, action))
        for what in ("reading the files", "from the index", "from the index"):
            start, cpu = time.perf_counter(), time.process_time()
            count = len(open_dataset(card).episodes)
            wall, used = time.perf_counter() - start, time.process_time() - cpu
            print(f"{what}: {count} episodes in {wall:.2f} s, {used:.2f} s CPU")


if __name__ == "__main__":
    main()
