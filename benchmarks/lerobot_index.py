"""Time and memory to open many LeRobot episodes, and to inspect and check their columns.

    python -m benchmarks.lerobot_index --version v3.0 --episodes 10000
    python -m benchmarks.lerobot_index --version v2.1 --episodes 10000

v3.0 has 500 episodes a file; v2.1 a file an episode. Videos of one camera are hard links to a few files, so
that the folder is small. Opening is measured in a process of its own, twice: the files are in the page cache.
"""

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STEPS, FPS, PER_FILE, HEIGHT, WIDTH = 30, 30, 500, 48, 64
CAMERA = "observation.images.front"


def write(folder: Path, version: str, episodes: int) -> None:
    """Write a folder of `version` whose episodes have 7 states and actions."""
    from tests.datasets.lerobot_files import write_video

    new = version == "v3.0"
    column = {"dtype": "float32", "shape": [7], "names": None}
    video = {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
    inside = (
        "chunk-{chunk_index:03d}/file-{file_index:03d}"
        if new
        else "chunk-{episode_chunk:03d}/episode_{episode_index:06d}"
    )
    info = {
        "codebase_version": version, "fps": FPS, "robot_type": "arm", "chunks_size": 1000,
        "total_episodes": episodes, "total_frames": episodes * STEPS,
        "data_path": f"data/{inside}.parquet",
        "video_path": "videos/{video_key}/" + inside + ".mp4",
        "features": {"observation.state": column, "action": column, CAMERA: video},
    }  # fmt: skip
    meta = folder / "meta"
    meta.mkdir(parents=True)
    (meta / "info.json").write_text(json.dumps(info))
    per_file = PER_FILE if new else 1
    rng = np.random.default_rng(0)
    film = folder / "film.mp4"
    frames = np.broadcast_to(
        (np.arange(per_file * STEPS) % 200)[:, None, None, None], (per_file * STEPS, HEIGHT, WIDTH, 3)
    )
    write_video(film, frames.astype(np.uint8), "libx264", fps=FPS)
    entries = []
    for first in range(0, episodes, per_file):
        number, some = first // per_file, range(first, min(first + per_file, episodes))
        chunk = 0 if new else first // 1000
        name = f"file-{number:03d}" if new else f"episode_{first:06d}"
        rows, motion = len(some) * STEPS, rng.normal(0, 0.05, (len(some), STEPS, 7)).cumsum(1).reshape(-1, 7)
        values = pa.FixedSizeListArray.from_arrays(pa.array(motion.astype(np.float32).ravel()), 7)
        ahead = np.roll(motion, -1, 0)
        table = pa.table({
            "observation.state": values,
            "action": pa.FixedSizeListArray.from_arrays(pa.array(ahead.astype(np.float32).ravel()), 7),
            "timestamp": pa.array((np.arange(rows) % STEPS / FPS).astype(np.float32)),
            "frame_index": pa.array(np.arange(rows) % STEPS),
            "episode_index": pa.array(np.repeat(list(some), STEPS)),
            "index": pa.array(first * STEPS + np.arange(rows)),
            "task_index": pa.array(np.zeros(rows, np.int64)),
        })  # fmt: skip
        path = folder / "data" / f"chunk-{chunk:03d}" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        target = folder / "videos" / CAMERA / f"chunk-{chunk:03d}" / f"{name}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(film, target)
        for place, episode in enumerate(some):
            entry = {"episode_index": episode, "tasks": ["do it"], "length": STEPS}
            if new:
                entry |= {"data/chunk_index": 0, "data/file_index": number}
                entry |= {f"videos/{CAMERA}/chunk_index": 0, f"videos/{CAMERA}/file_index": number}
                entry |= {f"videos/{CAMERA}/from_timestamp": place * STEPS / FPS}
            entries.append(entry)
    film.unlink()
    if new:
        pq.write_table(pa.table({"task_index": [0], "task": ["do it"]}), meta / "tasks.parquet")
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(entries), meta / "episodes" / "chunk-000" / "file-000.parquet")
    else:
        (meta / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "do it"}) + "\n")
        (meta / "episodes.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def resident_mb() -> float:
    """Return the resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(folder: Path, what: str) -> None:
    """Print what opening, or reading all columns, takes in this process."""
    from vlafit.datasets import open_dataset
    from vlafit.datasets.checks import check_store

    empty, start, cpu = resident_mb(), time.perf_counter(), time.process_time()
    store = open_dataset(folder)
    opened, opened_cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"open: {len(store.episodes):,} episodes in {opened:.2f} s, {opened_cpu:.2f} s CPU, "
        f"+{resident_mb() - empty:.0f} MB, {len(pickle.dumps(store)) / 1e6:.1f} MB to a worker"
    )
    if what == "open":
        return
    start, cpu = time.perf_counter(), time.process_time()
    for number in range(len(store.episodes)):
        store.state(number)
        store.actions(number)
    print(
        f"columns: {time.perf_counter() - start:.2f} s, {time.process_time() - cpu:.2f} s CPU, "
        f"{resident_mb():.0f} MB"
    )
    start, cpu = time.perf_counter(), time.process_time()
    findings = check_store(store, pixels=False).findings
    print(
        f"check without pixels: {time.perf_counter() - start:.2f} s, {time.process_time() - cpu:.2f} s CPU, "
        f"{resident_mb():.0f} MB, {len(findings)} findings"
    )


def main() -> None:
    """Write a folder, and open it in two processes; in a third read and check its columns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=("v2.1", "v3.0"), default="v3.0")
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="keep the folder here, and use it if it exists")
    parser.add_argument("--measure", choices=("open", "check"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.folder, options.measure)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name) / "many"
        if not folder.exists():
            write(folder, options.version, options.episodes)
        for what in ("open", "open", "check"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.lerobot_index",
                "--folder",
                str(folder),
                "--measure",
                what,
            ]
            subprocess.run(command, check=True, env={**os.environ, "VLAFIT_CACHE": f"{name}/cache"})


if __name__ == "__main__":
    main()
