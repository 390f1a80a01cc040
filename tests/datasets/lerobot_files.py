"""A writer of LeRobot datasets, independent of the reader: v2.0, v2.1 and v3.0, PNG images or video."""

import io
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from tests.datasets.layouts import Demo, card
from vlafit.datasets import Card
from vlafit.datasets.card import CameraCard, ColumnCard, InstructionCard

FPS = 20
PER_FILE = 4  # episodes in a file of v3.0


def lerobot_card(folder: Path) -> Card:
    """The card of what `write` makes; the front camera is stored upside-down."""
    base = card(folder)
    height, width = base.robot.cameras[0].height, base.robot.cameras[0].width
    robot = replace(
        base.robot,
        cameras=(
            CameraCard("front", "observation.images.front", height, width, rotate=180),
            CameraCard("wrist", "observation.images.wrist", height, width),
        ),
        state=ColumnCard(("observation.state",), 5, ("x", "y", "z", "finger_left", "finger_right")),
        action=ColumnCard(("action",), 4),
    )
    return replace(base, layout="lerobot", robot=robot, instruction=InstructionCard("task"))


def write(
    folder: Path,
    demos: list[Demo],
    version: str = "v3.0",
    *,
    codec: str = "",
    numbers: list[int] | None = None,
    stamps: Any = None,
) -> Card:
    """Write demonstrations. `codec` makes videos of the frames; `numbers` are the episodes' (with gaps)."""
    numbers = numbers or list(range(len(demos)))
    tasks = list(dict.fromkeys(demo.instruction for demo in demos))
    meta = folder / "meta"
    meta.mkdir(parents=True)
    _write_info(meta, demos, tasks, version, codec)
    groups = [range(n, n + 1) for n in range(len(demos))]
    if version == "v3.0":
        groups = [range(n, min(n + PER_FILE, len(demos))) for n in range(0, len(demos), PER_FILE)]
        table = pa.table({"task_index": list(range(len(tasks))), "task": tasks})
        pq.write_table(table, meta / "tasks.parquet")
    else:
        lines = [json.dumps({"task_index": i, "task": text}) for i, text in enumerate(tasks)]
        (meta / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    entries, total = [], 0
    for file, group in enumerate(groups):
        rows: dict[str, list] = {}
        start = 0
        for n in group:
            demo, number = demos[n], numbers[n]
            length = len(demo.actions)
            times = np.arange(length) / FPS if stamps is None else stamps(length)
            _append(rows, demo, number, tasks.index(demo.instruction), total, times, images=not codec)
            entry = {"episode_index": number, "tasks": [demo.instruction], "length": length}
            if version == "v3.0":
                entry |= {"data/chunk_index": 0, "data/file_index": file}
                entry |= {"dataset_from_index": total, "dataset_to_index": total + length}
                for key in ("front", "wrist") if codec else ():
                    at = f"videos/observation.images.{key}"
                    entry |= {f"{at}/chunk_index": 0, f"{at}/file_index": file}
                    entry |= {
                        f"{at}/from_timestamp": start / FPS,
                        f"{at}/to_timestamp": (start + length) / FPS,
                    }
            entries.append(entry)
            start, total = start + length, total + length
        name = f"file-{file:03d}" if version == "v3.0" else f"episode_{numbers[file]:06d}"
        path = folder / "data" / "chunk-000" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(rows), path, row_group_size=7)  # groups and episodes end at different rows
        if codec:
            for key in ("front", "wrist"):
                frames = np.concatenate([stored(demos[n], key) for n in group])
                inside = f"{key_of(key)}/chunk-000" if version == "v3.0" else f"chunk-000/{key_of(key)}"
                write_video(folder / "videos" / inside / f"{name}.mp4", frames, codec)
    if version == "v3.0":
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        half = len(entries) // 2  # two shards of the metadata
        for shard, some in enumerate((entries[:half], entries[half:])):
            path = meta / "episodes" / "chunk-000" / f"file-{shard:03d}.parquet"
            pq.write_table(pa.Table.from_pylist(some), path)
    else:
        (meta / "episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return lerobot_card(folder)


def key_of(camera: str) -> str:
    return f"observation.images.{camera}"


def stored(demo: Demo, camera: str) -> NDArray[np.uint8]:
    return demo.front[:, ::-1, ::-1] if camera == "front" else demo.wrist


KEY_FRAMES = {"g": "2", "crf": "1"}  # every second frame; B frames where the codec has them


def write_video(
    path: Path,
    frames: NDArray[np.uint8],
    codec: str,
    fps: int = FPS,
    pixels: str = "yuv420p",
    options: dict[str, str] = KEY_FRAMES,
) -> None:
    """Encode frames [n, h, w, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.time_base = Fraction(1, fps)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def png(frame: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(buffer, format="PNG")
    return buffer.getvalue()


def _append(
    rows: dict[str, list], demo: Demo, number: int, task: int, index: int, times: NDArray, *, images: bool
) -> None:
    length = len(demo.actions)
    columns: dict[str, Any] = {
        "observation.state": demo.state.tolist(),
        "action": demo.actions.astype(np.float32).tolist(),
        "timestamp": times.astype(np.float32).tolist(),
        "frame_index": list(range(length)),
        "episode_index": [number] * length,
        "index": list(range(index, index + length)),
        "task_index": [task] * length,
    }
    for key in ("front", "wrist") if images else ():
        frames = stored(demo, key)
        columns[key_of(key)] = [{"bytes": png(f), "path": f"{key}.png"} for f in frames]
    for name, values in columns.items():
        rows.setdefault(name, []).extend(values)


def _table(rows: dict[str, list]) -> pa.Table:
    kinds = {"timestamp": pa.float32(), "observation.state": pa.list_(pa.float32(), 5)}
    kinds |= {"action": pa.list_(pa.float32())}  # a list of any length, as v2.0 has it
    return pa.table({name: pa.array(values, kinds.get(name)) for name, values in rows.items()})


def _write_info(meta: Path, demos: list[Demo], tasks: list[str], version: str, codec: str) -> None:
    height, width = demos[0].front.shape[1:3]
    camera = {
        "dtype": "video" if codec else "image",
        "shape": [height, width, 3],
        "names": ["height", "width", "channel"],
    }
    labels = ["x", "y", "z", "finger_left", "finger_right"]
    features: dict[str, Any] = {
        "observation.images.front": camera,
        "observation.images.wrist": camera,
        "observation.state": {"dtype": "float32", "shape": [5], "names": labels},
        "action": {"dtype": "float32", "shape": [4], "names": None},
    }
    features |= {
        name: {"dtype": "int64", "shape": [1], "names": None}
        for name in ("frame_index", "episode_index", "index", "task_index")
    }
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    new = version == "v3.0"
    data = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    old = "chunk-{episode_chunk:03d}/episode_{episode_index:06d}"
    film = "videos/{video_key}/" + data if new else "videos/" + old.replace("/", "/{video_key}/")
    info = {
        "codebase_version": version,
        "robot_type": "arm",
        "total_episodes": len(demos),
        "total_frames": sum(len(demo.actions) for demo in demos),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "fps": FPS,
        "features": features,
        "data_path": f"data/{data if new else old}.parquet",
        "video_path": f"{film}.mp4" if codec else None,
    }
    (meta / "info.json").write_text(json.dumps(info, indent=2))
