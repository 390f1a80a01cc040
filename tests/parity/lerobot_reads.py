"""Run by a Python that has LeRobot: open a dataset by LeRobot's own reader and write what it returns.

python lerobot_reads.py DATASET OUT.npz
"""

import sys
from pathlib import Path

import numpy as np


def main(root: Path, out: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/converted", root=root)
    arrays: dict[str, list] = {}
    for number in range(len(dataset)):
        item = dataset[number]
        arrays.setdefault("task", []).append(item["task"])
        for key in ("episode_index", "frame_index", "observation.state", "action"):
            arrays.setdefault(key, []).append(np.asarray(item[key]))
        for key in item:
            if key.startswith("observation.images."):
                levels = np.asarray(item[key]).transpose(1, 2, 0) * 255
                arrays.setdefault(key, []).append(levels.round().astype(np.uint8))
    np.savez(out, fps=dataset.fps, **{key: np.array(values) for key, values in arrays.items()})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
