"""Samples per CPU second, start-up and memory of reading datasets: vlafit, LeRobot, and decoding by itself.

    make .venv-lerobot/ready      # an environment with LeRobot and vlafit (Python 3.12, some GB)
    .venv-lerobot/bin/python -m benchmarks.data --out benchmarks/results/data.jsonl
    python -m benchmarks.data --readers vlafit --sizes 128 --seconds 0.2       # without LeRobot
    python -m benchmarks.data --table benchmarks/results/data.jsonl            # the tables again

Run it in the repository's root. The datasets are recordings of a synthetic arm: two cameras, chunks of 50
actions, as LeRobot v3.0 (PNG, H.264, AV1; `vlafit data convert` writes them) and HDF5 (contiguous, a chunk a
frame, the same with gzip). Each reader is a process on one thread, and all readers of a dataset live side by
side: in each round every one reads samples at the same random places for --seconds of its own CPU time, in
turns, the order reversed each round. A ratio is that of one round; medians and ranges are over the rounds.

float32     what LeRobotDataset returns by default: float32 images [3, h, w] and tensors. vlafit's samples are
            turned into the same types and shapes.
uint8       the same with uint8 images (`return_uint8=True`, which LeRobot has for video only).
native      what vlafit's training gets: uint8 arrays [h, w, 3], which become floats on the GPU.
pyav        LeRobot's decoder where there is no torchcodec, its default, which needs FFmpeg's libraries.
one action  LeRobot without a chunk. With one, it decodes the images of all 50 rows of a table (PNG).
floor       decoding and conversion to RGB by PyAV (or Pillow) and nothing else; h5py; memory maps.
start-up    CPU seconds: imports; opening and the first sample, for the first time; again in the same process.
memory      resident MB of the process after start-up and after each epoch of three; the peak.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from benchmarks import rows
from benchmarks.rows import Row
from vlafit.datasets import Card, EpisodeInfo, EpisodeStore
from vlafit.datasets.card import CameraCard, ColumnCard, RobotCard
from vlafit.datasets.convert import convert

CHUNK, EPOCHS = 50, 3
CAMERAS = ("front", "wrist")
VIDEOS = ("H.264", "AV1")
FORMATS = ("PNG", *VIDEOS, "HDF5 contiguous", "HDF5 chunked", "HDF5 gzip")
FLOORS = {"PNG": ["pillow"], "H.264": ["pyav"], "AV1": ["pyav"], "HDF5 contiguous": ["h5py", "memmap"],
          "HDF5 chunked": ["h5py"], "HDF5 gzip": ["h5py"]}  # fmt: skip


class Arm(EpisodeStore):
    """Recordings in memory: a textured scene, an arm that moves across it, and a sensor's noise."""

    def __init__(self, size: int, episodes: int, steps: int) -> None:
        cameras = tuple(CameraCard(name, name, size, size) for name in CAMERAS)
        state, action = ColumnCard(("state",), 8), ColumnCard(("action",), 7)
        self.card = Card("benchmark", "libero", "", RobotCard("arm", 20, "position", cameras, state, action))
        self.size, self.steps = size, steps
        self.episodes = tuple(EpisodeInfo(f"e{n}", "push", "push the block", steps) for n in range(episodes))

    def state(self, episode: int) -> NDArray[np.float32]:
        """Return random states."""
        return np.random.default_rng([episode, 0]).normal(size=(self.steps, 8)).astype(np.float32)

    def actions(self, episode: int) -> NDArray[np.float32]:
        """Return random actions."""
        return np.random.default_rng([episode, 1]).normal(size=(self.steps, 7)).astype(np.float32)

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        """Return a frame."""
        number, size = CAMERAS.index(camera), self.size
        scene = np.random.default_rng([number]).uniform(30, 200, (size // 8, size // 8, 3))
        picture = scene.repeat(8, 0).repeat(8, 1)
        y, x = np.mgrid[0:size, 0:size] / size
        angle = 0.07 * step + episode
        near = np.hypot(x - 0.5 - 0.3 * np.cos(angle), y - 0.5 - 0.3 * np.sin(1.3 * angle)) < 0.15
        picture[near] = (230, 60 + 20 * number, 40)
        noise = np.random.default_rng([episode, step, number]).normal(0, 2, picture.shape)
        return np.clip(picture + noise, 0, 255).astype(np.uint8)


def write(folder: Path, kind: str, size: int, episodes: int, steps: int) -> None:
    """Write the recordings into the new `folder`, with what readers must know in places.json."""
    store, video = Arm(size, episodes, steps), {"H.264": "h264", "AV1": "av1"}.get(kind, "")
    convert(store, folder, "libero" if kind.startswith("HDF5") else "lerobot", video=video)
    hdf5 = [path.name for path in folder.glob("*.hdf5")]
    if kind in ("HDF5 chunked", "HDF5 gzip"):
        _in_chunks(folder / hdf5[0], 4 if kind == "HDF5 gzip" else None)
    places = {"lengths": [steps] * episodes, "cameras": CAMERAS, "fps": 20, "hdf5": "".join(hdf5)}
    (folder / "places.json").write_text(json.dumps(places))


def _in_chunks(path: Path, gzip: int | None) -> None:
    """Store the frames of a file as chunks of one frame."""
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            for camera in CAMERAS:
                name = f"obs/{camera}_rgb"
                frames = demo[name][:]
                del demo[name]
                chunk = (1, *frames.shape[1:])
                demo.create_dataset(name, data=frames, chunks=chunk, compression=gzip and "gzip",
                                    compression_opts=gzip)  # fmt: skip


class Reader:
    """A process that reads one dataset."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.start = self._answer()

    def ask(self, **values: object) -> Row:
        """Return the process' answer."""
        assert self._process.stdin is not None
        print(json.dumps(values), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self._process.args} ended with status {self._process.wait()}")


@contextmanager
def reader(name: str, folder: Path, cache: Path) -> Iterator[Reader]:
    """Yield a running reader, which is ended afterwards."""
    command = [sys.executable, "-m", "benchmarks.data_reader", name, str(folder), str(CHUNK)]
    alone = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", "HF_HUB_OFFLINE": "1",
             "HF_HOME": str(cache / "hf"), "VLAFIT_CACHE": str(cache / "vlafit")}  # fmt: skip
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | alone) as process:
        yield Reader(process)
        assert process.stdin is not None
        process.stdin.close()


def modes_of(program: str, kind: str, pyav: bool) -> list[str]:
    """Return the forms in which a reader is asked for samples of a kind of dataset."""
    if program == "vlafit":
        return ["native"] if kind.startswith("HDF5") else ["float32", "uint8", "native"]
    if program == "lerobot":
        if kind not in VIDEOS:
            return ["float32, one action", "float32"]
        return ["float32", "uint8", "float32, pyav", "uint8, pyav"] if pyav else ["float32", "uint8"]
    return ["native"]


def measured(folder: Path, kind: str, size: int, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of a dataset: one for each reader and mode."""
    names = ["vlafit"] + [n for n in ("lerobot",) if not kind.startswith("HDF5")] + FLOORS[kind]
    names = [name for name in names if name in options.readers or name in FLOORS[kind]]
    with ExitStack() as stack:
        readers = {name: stack.enter_context(reader(name, folder, folder.parent)) for name in names}
        modes = {name: modes_of(name, kind, not options.no_pyav) for name in names}
        turns = [(name, mode) for name in names for mode in modes[name]]
        memory = {name: readers[name].ask(mode=modes[name][0], epochs=EPOCHS) for name in names}
        speeds: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
        for number in range(options.rounds):
            for name, mode in turns if number % 2 == 0 else reversed(turns):
                done = readers[name].ask(mode=mode, seconds=options.seconds, seed=number)
                speeds[name, mode].append(done["samples"] / done["cpu_s"])
        for (name, mode), values in speeds.items():
            row: Row = {"kind": kind, "size": size, "reader": name, "mode": mode, "per_cpu_s": values}
            if mode == modes[name][0]:
                row |= readers[name].start | memory[name]
            yield row


def ratios(row: Row, other: Row) -> list[float]:
    """Return, for each round, how many times as many samples `row` read as `other`."""
    return [mine / theirs for mine, theirs in zip(row["per_cpu_s"], other["per_cpu_s"], strict=True)]


def spread(values: Sequence[float]) -> str:
    """Return a median with its range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    digits = 0 if high >= 100 else 2
    return f"{middle:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def tables(measured: Sequence[Row]) -> str:
    """Return the tables of speed and of start-up and memory, in Markdown."""
    sets: dict[tuple[str, int], dict[tuple[str, str], Row]] = {}
    for row in measured:
        sets.setdefault((row["kind"], row["size"]), {})[row["reader"], row["mode"]] = row
    speed, start = [], []
    for (kind, size), by_reader in sets.items():
        for (name, mode), row in by_reader.items():
            floors = [by_reader[f, "native"] for f in FLOORS[kind] if (f, "native") in by_reader]
            others = {m: r for (n, m), r in by_reader.items() if n == "lerobot" and m.split(", ")[0] == mode}
            line = {"dataset": f"{kind} {size}", "reader": name, "samples": mode,
                    "per CPU s": spread(row["per_cpu_s"])}  # fmt: skip
            if name == "vlafit":
                line["times LeRobot"] = "; ".join(
                    f"{spread(ratios(row, other))}{m.removeprefix(mode)}" for m, other in others.items()
                )
                if mode == "native":
                    line["of the floor"] = "; ".join(
                        f"{f['reader']} {spread(ratios(row, f))}" for f in floors
                    )
            speed.append(line)
            if "start_mb" in row:
                start.append(_start_line(line["dataset"], row))
    columns = ("dataset", "reader", "samples", "per CPU s", "times LeRobot", "of the floor")
    return f"{rows.table(speed, columns)}\n\n{rows.table(start, list(start[0]) if start else ())}"


def _start_line(dataset: str, row: Mapping[str, Any]) -> Row:
    return {
        "dataset": dataset,
        "reader": row["reader"],
        "imports, s": round(row["imports_s"], 2),
        "first opening, s": round(row["first_s"], 3),
        "again, s": round(row["again_s"], 3),
        "MB at start": round(row["start_mb"]),
        "after epochs 1 to 3": ", ".join(f"{mb:.0f}" for mb in row["resident_mb"]),
        "peak MB": round(row["peak_mb"]) if "peak_mb" in row else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="+", default=["vlafit", "lerobot"], choices=("vlafit", "lerobot"))
    parser.add_argument("--kinds", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256], help="height and width of frames")
    parser.add_argument("--episodes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="of an episode [60]")
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU time of a turn [0.5]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-pyav", action="store_true", help="LeRobot with its default decoder only")
    parser.add_argument("--commit", default="", help="of the code, where its folder is no repository")
    parser.add_argument("--out", type=Path, help="file of JSON lines, to which each row is added at once")
    parser.add_argument("--table", type=Path, help="print the tables of an earlier run's file, and end")
    options = parser.parse_args()
    if options.table:
        print(tables([json.loads(line) for line in options.table.read_text().splitlines()]))
        return 0
    facts = rows.machine(rows.torch.device("cpu"), options.commit) | versions()
    taken = []
    began = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        for kind in options.kinds:
            for size in options.sizes:
                folder = Path(name) / f"{kind.replace(' ', '_')}_{size}"
                write(folder, kind, size, options.episodes, options.steps)
                for row in measured(folder, kind, size, options):
                    rows.write(row | facts, options.out)
                    taken.append(row)
    print(tables(taken))
    print(f"CPU seconds of writing the datasets: {time.process_time() - began:.0f}")
    return 0


def versions() -> Row:
    """Return the versions of what decodes."""
    from importlib.metadata import PackageNotFoundError, version

    names = {}
    for package in ("lerobot", "torchcodec", "av", "pillow", "h5py", "datasets"):
        try:
            names[package] = version(package)
        except PackageNotFoundError:
            continue
    return names | {"python": sys.version.split()[0]}


if __name__ == "__main__":
    sys.exit(main())
