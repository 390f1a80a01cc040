"""Read samples of one dataset as one program does, and time them: the process behind benchmarks.data.

    python -m benchmarks.data_reader READER DATASET CHUNK

A reader is `vlafit`, `lerobot`, or what decoding costs without a program around it: `pyav`, `pillow`, `h5py`,
`memmap`. A line of JSON on stdin asks for samples or epochs, one on stdout answers. Imports are inside the
functions, so that a reader holds only what it needs.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Read = Callable[[int, int], object]
"""Read the sample of an episode at a step."""
Open = Callable[[str], Read]
"""Open a dataset, whose samples come in the form that a mode names."""


@dataclass(frozen=True)
class Opened:
    """CPU seconds of imports, and of opening a dataset and reading a sample: at first, and again."""

    imports_s: float
    first_s: float
    again_s: float
    open: Open


def main(reader: str, path: Path, chunk: int) -> None:
    """Open the dataset twice, answer the lines of stdin, and end with them."""
    places = json.loads((path / "places.json").read_text())
    lengths: list[int] = places["lengths"]
    opened = READERS[reader](path, places, chunk)
    reads: dict[str, Read] = {}
    times = {name: vars(opened)[name] for name in ("imports_s", "first_s", "again_s")}
    print(json.dumps({**times, "start_mb": memory_mb("VmRSS")}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        mode = asked["mode"]
        if mode not in reads:
            reads[mode] = opened.open(mode)
            reads[mode](0, 0)  # some open their files at the first sample
        if "epochs" in asked:
            answer: dict[str, Any] = {"resident_mb": epochs(reads[mode], lengths, asked["epochs"])}
            answer["peak_mb"] = memory_mb("VmHWM")
        else:
            answer = samples(reads[mode], lengths, asked["seconds"], asked["seed"])
        print(json.dumps(answer), flush=True)


def samples(read: Read, lengths: list[int], seconds: float, seed: int) -> dict[str, float]:
    """Read samples at random for `seconds` of CPU time; return how many, and the time they took."""
    rng = np.random.default_rng(seed)
    count, began, wall = 0, time.process_time(), time.perf_counter()
    while time.process_time() - began < seconds:
        episode = int(rng.integers(len(lengths)))
        read(episode, int(rng.integers(lengths[episode])))
        count += 1
    return {
        "samples": count,
        "cpu_s": time.process_time() - began,
        "wall_s": time.perf_counter() - wall,
    }


def epochs(read: Read, lengths: list[int], count: int) -> list[float]:
    """Read every sample once an epoch, in another order each; return the resident MB after each."""
    every = [(episode, step) for episode, length in enumerate(lengths) for step in range(length)]
    resident = []
    for epoch in range(count):
        for number in np.random.default_rng(epoch).permutation(len(every)):
            read(*every[number])
        resident.append(memory_mb("VmRSS"))
    return resident


def memory_mb(field: str) -> float:
    """Return what this process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def timed(imports_s: float, open_dataset: Open, mode: str) -> Opened:
    """Open a dataset and read a sample, twice."""
    taken = []
    for _ in range(2):
        began = time.process_time()
        open_dataset(mode)(0, 0)
        taken.append(time.process_time() - began)
    return Opened(imports_s, taken[0], taken[1], open_dataset)


def imports_of(call: Callable[[], object]) -> float:
    """Return the CPU seconds from the start of the process to the end of `call`, which imports."""
    call()
    return time.process_time()


# --------------------------------------------------------------------------------------------- the programs


def vlafit(path: Path, places: dict[str, Any], chunk: int) -> Opened:
    """Samples of vlafit's store: `native` as training gets them, or as tensors in the form of LeRobot's."""

    def load() -> None:
        import vlafit.datasets  # noqa: F401

        if not places["hdf5"]:
            import torch

            torch.set_num_threads(1)

    imports_s = imports_of(load)
    from vlafit.datasets import open_dataset

    def build(mode: str) -> Read:
        store = open_dataset(path / "card.toml")
        if mode == "native":
            return lambda episode, step: store.sample(episode, step, chunk)
        return lambda episode, step: as_tensors(store.sample(episode, step, chunk), mode)

    return timed(imports_s, build, "native" if places["hdf5"] else "float32")


def as_tensors(sample: Any, mode: str) -> dict[str, Any]:
    """Return a sample of vlafit with the keys, types and shapes of one of LeRobot's."""
    import torch

    item: dict[str, Any] = {}
    for name, image in sample.observation.images.items():
        pixels = torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)
        item[f"observation.images.{name}"] = (
            pixels.contiguous() if mode == "uint8" else pixels.to(torch.float32, copy=True).div_(255)
        )
    item["observation.state"] = torch.from_numpy(np.array(sample.observation.state))
    item["action"] = torch.from_numpy(np.array(sample.actions))
    item["action_is_pad"] = torch.from_numpy(~sample.is_real)
    item["task"] = sample.observation.instruction
    return item


def lerobot(path: Path, places: dict[str, Any], chunk: int) -> Opened:
    """Items of LeRobotDataset. A mode is `float32`, its default, or `uint8`; `, pyav` names the decoder.

    With `, one action` no chunk is asked for: for a chunk, LeRobot 0.6.1 decodes the images of all its rows
    where images are in the tables.
    """

    def load() -> None:
        import torch
        from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: F401

        torch.set_num_threads(1)

    imports_s = imports_of(load)
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    firsts = np.cumsum([0, *places["lengths"]]).tolist()
    ahead = {"action": [step / places["fps"] for step in range(chunk)]}

    def build(mode: str) -> Read:
        options = mode.split(", ")
        dataset = LeRobotDataset(
            "local/benchmark",
            root=path,
            delta_timestamps=None if "one action" in options else ahead,
            video_backend="pyav" if "pyav" in options else None,
            return_uint8="uint8" in options,
        )
        return lambda episode, step: dataset[firsts[episode] + step]

    return timed(imports_s, build, "float32, one action")


# -------------------------------------------------------------------------- decoding, and nothing around it


def pyav(path: Path, places: dict[str, Any], chunk: int) -> Opened:
    """The two frames of a sample by PyAV: one open container and one converter a camera."""

    def load() -> None:
        import av  # noqa: F401

    imports_s = imports_of(load)
    import av
    from av.video.reformatter import VideoReformatter

    def build(mode: str) -> Read:
        films = []
        for camera in places["cameras"]:
            (file,) = (path / "videos" / f"observation.images.{camera}").glob("*/*.mp4")
            container = av.open(str(file))
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            films.append((container, stream, VideoReformatter()))
        firsts = np.cumsum([0, *places["lengths"]]).tolist()

        def frames(episode: int, step: int) -> list[np.ndarray]:
            pictures = []
            for container, stream, reformatter in films:
                wanted = round((firsts[episode] + step) / places["fps"] / stream.time_base)
                container.seek(wanted, stream=stream)
                for frame in container.decode(stream):
                    if frame.pts >= wanted:
                        pictures.append(reformatter.reformat(frame, format="rgb24").to_ndarray())
                        break
            return pictures

        return frames

    return timed(imports_s, build, "native")


def pillow(path: Path, places: dict[str, Any], chunk: int) -> Opened:
    """The two frames of a sample by Pillow, the encoded pictures being in memory."""

    def load() -> None:
        import PIL.Image  # noqa: F401
        import pyarrow.parquet  # noqa: F401

    imports_s = imports_of(load)
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    def build(mode: str) -> Read:
        files = sorted((path / "data").glob("*/*.parquet"))
        keys = [f"observation.images.{camera}" for camera in places["cameras"]]
        rows = {key: [v["bytes"] for f in files for v in pq.read_table(f, columns=[key])[key].to_pylist()]
                for key in keys}  # fmt: skip
        firsts = np.cumsum([0, *places["lengths"]]).tolist()

        def frames(episode: int, step: int) -> list[np.ndarray]:
            return [np.asarray(Image.open(io.BytesIO(rows[key][firsts[episode] + step]))) for key in keys]

        return frames

    return timed(imports_s, build, "native")


def h5py(path: Path, places: dict[str, Any], chunk: int) -> Opened:
    """Frames, state and chunk of actions by h5py: handles kept, no cache of chunks."""

    def load() -> None:
        import h5py  # noqa: F401

    imports_s = imports_of(load)
    import h5py

    def build(mode: str) -> Read:
        file = h5py.File(path / places["hdf5"], rdcc_nbytes=0)
        demos = [file[f"data/demo_{n}"] for n in range(len(places["lengths"]))]
        frames = [[demo[f"obs/{camera}_rgb"] for camera in places["cameras"]] for demo in demos]
        columns = [(demo["obs/state"], demo["actions"]) for demo in demos]

        def read(episode: int, step: int) -> list[np.ndarray]:
            state, actions = columns[episode]
            return [*(f[step] for f in frames[episode]), state[step], actions[step : step + chunk]]

        return read

    return timed(imports_s, build, "native")


def memmap(path: Path, places: dict[str, Any], chunk: int) -> Opened:
    """Copies of frames in a memory map of a contiguous file, the columns being in memory."""

    def load() -> None:
        import h5py  # noqa: F401

    imports_s = imports_of(load)
    import h5py

    def build(mode: str) -> Read:
        whole = np.memmap(path / places["hdf5"], mode="r", dtype=np.uint8)
        frames, columns = [], []
        with h5py.File(path / places["hdf5"]) as file:
            for number in range(len(places["lengths"])):
                demo = file[f"data/demo_{number}"]
                data = [demo[f"obs/{camera}_rgb"] for camera in places["cameras"]]
                frames.append([whole[d.id.get_offset() :][: d.size].reshape(d.shape) for d in data])
                columns.append((demo["obs/state"][:], demo["actions"][:]))

        def read(episode: int, step: int) -> list[np.ndarray]:
            state, actions = columns[episode]
            return [*(np.array(f[step]) for f in frames[episode]), state[step], actions[step : step + chunk]]

        return read

    return timed(imports_s, build, "native")


READERS = {
    "vlafit": vlafit,
    "lerobot": lerobot,
    "pyav": pyav,
    "pillow": pillow,
    "h5py": h5py,
    "memmap": memmap,
}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
