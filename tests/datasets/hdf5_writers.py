"""The small dataset in more HDF5 layouts: each with its traps, decoding to the same samples."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.datasets.layouts import (
    ROBOMIMIC,
    SIZE,
    TASKS,
    Demo,
    _group,
    card,
    of_task,
    robomimic_card,
    tasks_of,
)
from vlafit.datasets import Card
from vlafit.datasets.card import (
    CameraCard,
    ColumnCard,
    EpisodesCard,
    InstructionCard,
    RobotCard,
    RowsCard,
)
from vlafit.datasets.layouts import generic

SENTENCES = InstructionCard("card", files={task: task.replace("_", " ") for task in TASKS})


def encoded(frame: NDArray[np.uint8], mark: bytes = b"") -> bytes:
    """A lossless picture in a row, as JPEG rows are; a JPEG if it is to be marked."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(frame))
    if mark:
        image.save(buffer, format="JPEG", quality=95, comment=mark)
    else:
        image.save(buffer, format="PNG")
    return buffer.getvalue()


def padded(rows: list[bytes]) -> NDArray[np.uint8]:
    """Rows of one length, filled up with zeros."""
    widest = max(map(len, rows))
    return np.stack([np.frombuffer(row.ljust(widest, b"\0"), np.uint8) for row in rows])


def robot(
    path: Path, front: CameraCard, wrist: CameraCard, state: ColumnCard, action: ColumnCard
) -> RobotCard:
    return replace(card(path).robot, cameras=(front, wrist), state=state, action=action)


def aloha(folder: Path, everything: list[Demo], encoding: str = "") -> Card:
    """A folder a task, a file an episode; frames raw in chunks of one, or encoded in two ways."""
    for task in tasks_of(everything):
        (folder / task).mkdir(parents=True)
        for number, demo in enumerate(of_task(everything, task)):
            with h5py.File(folder / task / f"episode_{number}.hdf5", "w") as file:
                file.create_dataset("observations/qpos", data=demo.state.astype(np.float64))
                file.create_dataset("observations/qvel", data=demo.state * 0)
                file.create_dataset("action", data=demo.actions)
                for name, frames in (("front", demo.front[:, ::-1, ::-1]), ("wrist", demo.wrist)):
                    key = f"observations/images/{name}"
                    if encoding:  # the writer took RGB for BGR: a viewer exchanges red and blue
                        file.create_dataset(key, data=padded([encoded(f[..., ::-1]) for f in frames]))
                    else:
                        file.create_dataset(key, data=frames, chunks=(1, *SIZE, 3))
    channels = encoding or ""
    return card(
        folder / "*" / "*.hdf5",
        layout="aloha",
        instruction=SENTENCES,
        robot=robot(
            folder,
            CameraCard("front", "observations/images/front", *SIZE, 180, channels=channels),  # type: ignore[arg-type]
            CameraCard("wrist", "observations/images/wrist", *SIZE, channels=channels),  # type: ignore[arg-type]
            ColumnCard(("observations/qpos",), 5),
            ColumnCard(("action",), 4),
        ),
    )


def aloha_encoded(folder: Path, everything: list[Demo]) -> Card:
    return aloha(folder, everything, "bgr")


def robotwin(folder: Path, everything: list[Demo]) -> Card:
    """Rows of bytes, a gripper [T], the action in the next row, and several sentences beside."""
    for task in tasks_of(everything):
        (folder / task / "data").mkdir(parents=True)
        (folder / task / "instructions").mkdir(parents=True)
        for number, demo in enumerate(of_task(everything, task)):
            path = folder / task / "data" / f"episode{number}.hdf5"
            with h5py.File(path, "w") as file:
                late = np.concatenate([demo.actions[:1] * 0 - 9, demo.actions])
                last = np.concatenate([demo.state, demo.state[-1:]])
                file["joint_action/vector"] = last[:, :4]
                file["joint_action/right_gripper"] = last[:, 4]
                file["joint_action/left_arm"] = late[:, [3, 0, 1]]
                file["joint_action/left_gripper"] = late[:, 2]
                for name, frames in (("front", demo.front[:, ::-1, ::-1]), ("wrist", demo.wrist)):
                    rows = [encoded(frame) for frame in [*frames, frames[-1]]]
                    width = max(map(len, rows))
                    file[f"observation/{name}_camera/rgb"] = np.array(rows, f"S{width}")
            words = {"seen": [demo.instruction] * 3, "unseen": ["something else"]}
            (folder / task / "instructions" / f"episode{number}.json").write_text(json.dumps(words))
    return card(
        folder / "*" / "data" / "*.hdf5",
        layout="robotwin",
        instruction=InstructionCard("beside", key="seen", file="../instructions/{stem}.json"),
        rows=RowsCard(action_shift=1),
        robot=robot(
            folder,
            CameraCard("front", "observation/front_camera/rgb", *SIZE, 180, channels="rgb"),
            CameraCard("wrist", "observation/wrist_camera/rgb", *SIZE, channels="rgb"),
            ColumnCard(("joint_action/vector", "joint_action/right_gripper"), 5),
            ColumnCard(
                ("joint_action/left_arm[:, 1:]", "joint_action/left_gripper", "joint_action/left_arm[:, 0]"),
                4,
            ),
        ),
    )


def maniskill(folder: Path, everything: list[Demo], success: bool = False) -> Card:
    """One row more of observations than of actions, and the JSON beside; with failures to leave out."""
    folder.mkdir(parents=True)
    for task in tasks_of(everything):
        about = []
        with h5py.File(folder / f"{task}.h5", "w") as file:
            for number, demo in enumerate(of_task(everything, task)):
                group = file.create_group(f"traj_{number}")
                more = np.concatenate([demo.state, demo.state[-1:] * 0 + 7])
                group["obs/agent/qpos"], group["obs/extra/tcp"] = more[:, :3], more[:, 3:]
                group["actions"] = demo.actions.astype(np.float32)
                group["success"] = np.arange(len(demo.actions)) == (len(demo.actions) - 1)
                group["env_states/cube"] = np.zeros((len(more), 13))
                for name, frames in (("front", demo.front[:, ::-1, ::-1]), ("wrist", demo.wrist)):
                    rows = np.concatenate([frames, frames[-1:] * 0])
                    group.create_dataset(f"obs/sensor_data/{name}/rgb", data=rows, compression="gzip")
                about.append(
                    {
                        "episode_id": number,
                        "episode_seed": 100 + number,
                        "elapsed_steps": len(demo.actions),
                        "control_mode": "pd_ee_delta_pose",
                    }
                )
        (folder / f"{task}.json").write_text(
            json.dumps({"env_info": {"env_id": f"{task}-v1"}, "episodes": about})
        )
    return card(
        folder,
        layout="maniskill",
        instruction=SENTENCES,
        episodes=EpisodesCard(success="success"),
        robot=robot(
            folder,
            CameraCard("front", "obs/sensor_data/front/rgb", *SIZE, 180),
            CameraCard("wrist", "obs/sensor_data/wrist/rgb", *SIZE),
            ColumnCard(("obs/agent/qpos", "obs/extra/tcp"), 5),
            ColumnCard(("actions",), 4),
        ),
    )


def robocasa(folder: Path, everything: list[Demo]) -> Card:
    """robomimic's groups, each with its sentence."""
    folder.mkdir(parents=True)
    for task in tasks_of(everything):
        with h5py.File(folder / f"{task}.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["env_args"] = json.dumps({"env_name": "Kitchen", "env_kwargs": {"control_freq": 20}})
            for number, demo in enumerate(of_task(everything, task)):
                group = _group(data, f"demo_{number}", demo, ROBOMIMIC)
                group.attrs["ep_meta"] = json.dumps({"lang": demo.instruction, "layout_id": 3})
    made = robomimic_card(folder)
    return replace(made, layout="robocasa", section=None, instruction=InstructionCard("ep_meta"))


def any_hdf5(folder: Path, everything: list[Demo]) -> Card:
    """A recorder of one's own: scales and signs, mirrored and BGR cameras, words as a dataset."""
    folder.mkdir(parents=True)
    with h5py.File(folder / "log.h5", "w") as file:
        for number, demo in enumerate(everything):
            group = file.create_group(f"runs/take-{number}")
            group["robot/ee_pose"] = np.concatenate([demo.position, demo.position * 5], axis=1)
            group["robot/fingers"] = demo.gripper
            group["action/xyz"] = -2 * demo.actions[:, :3]
            group["action/hand"] = demo.actions[:, 3]
            group["cam/front"] = demo.front[:, ::-1]
            group["cam/wrist"] = demo.wrist[:, :, ::-1, ::-1]
            group["words"] = demo.instruction
        file["calibration/offsets"] = np.zeros(6)
    return card(
        folder,
        layout="generic",
        section=generic.Section("runs/take-*"),
        instruction=InstructionCard("demo", key="words"),
        robot=robot(
            folder,
            CameraCard("front", "cam/front", *SIZE, flip="vertical"),
            CameraCard("wrist", "cam/wrist", *SIZE, flip="horizontal", channels="bgr"),
            ColumnCard(("robot/ee_pose[:, :3]", "robot/fingers"), 5),
            ColumnCard(("action/xyz", "action/hand"), 4, scale=(-0.5, -0.5, -0.5, 1.0)),
        ),
    )


WRITERS: dict[str, Callable[[Path, list[Demo]], Card]] = {
    "aloha": aloha,
    "generic": any_hdf5,
    "maniskill": maniskill,
    "robocasa": robocasa,
    "robotwin": robotwin,
}
