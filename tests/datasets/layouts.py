"""One small dataset, written in every layout that the readers know, traps included."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from vlafit.datasets import Card
from vlafit.datasets.card import CameraCard, ColumnCard, InstructionCard, RobotCard
from vlafit.datasets.layouts import robomimic

TASKS = ("turn_on_the_stove", "open_the_drawer")
SIZE = (6, 5)  # height, width: not square, so that a mix-up shows


@dataclass(frozen=True)
class Demo:
    """One episode as it must come out again: float64 that float32 holds exactly, upright frames."""

    task: str
    position: NDArray[np.float64]  # [T, 3]
    gripper: NDArray[np.float64]  # [T, 2]
    actions: NDArray[np.float64]  # [T, 4]
    front: NDArray[np.uint8]  # [T, h, w, 3]
    wrist: NDArray[np.uint8]

    @property
    def instruction(self) -> str:
        return self.task.replace("_", " ")

    @property
    def state(self) -> NDArray[np.float32]:
        return np.concatenate([self.position, self.gripper], axis=1).astype(np.float32)


def demos(per_task: int = 12) -> list[Demo]:
    """Episodes of lengths 4, 5, ..., so that an episode in the wrong place has the wrong length."""
    rng = np.random.default_rng(0)
    made = []
    for task in TASKS:
        for i in range(per_task):
            length = 4 + i
            numbers = rng.normal(size=(length, 9)).astype(np.float32).astype(np.float64)
            frames = rng.integers(0, 256, (2, length, *SIZE, 3), dtype=np.uint8)
            made.append(Demo(task, numbers[:, :3], numbers[:, 3:5], numbers[:, 5:], frames[0], frames[1]))
    return made


def card(path: Path, **changes: object) -> Card:
    """The card of LIBERO's own layout."""
    base = Card(
        name="small",
        layout="libero",
        path=str(path),
        instruction=InstructionCard("attrs"),
        robot=RobotCard(
            name="arm",
            hz=20,
            control="delta_position",
            cameras=(
                CameraCard("front", "obs/agentview_rgb", *SIZE, rotate=180),
                CameraCard("wrist", "obs/eye_in_hand_rgb", *SIZE),
            ),
            state=ColumnCard(("obs/ee_pos", "obs/gripper_states"), 5),
            action=ColumnCard(("actions",), 4),
        ),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def robomimic_card(path: Path, mask: str = "", **changes: object) -> Card:
    robot = card(path).robot
    robot = replace(
        robot,
        cameras=(
            CameraCard("front", "obs/agentview_image", *SIZE, rotate=180),
            CameraCard("wrist", "obs/robot0_eye_in_hand_image", *SIZE),
        ),
        state=ColumnCard(("obs/robot0_eef_pos", "obs/robot0_gripper_qpos"), 5),
    )
    sentences = InstructionCard("card", files={task: task.replace("_", " ") for task in TASKS})
    section = robomimic.Section(mask=mask)
    return card(path, layout="robomimic", robot=robot, instruction=sentences, section=section, **changes)


def _group(
    parent: h5py.Group, name: str, demo: Demo, columns: dict[str, str], **storage: object
) -> h5py.Group:
    group = parent.create_group(name)
    group.create_dataset("actions", data=demo.actions)
    group.create_dataset(columns["position"], data=demo.position)
    group.create_dataset(columns["gripper"], data=demo.gripper.astype(np.float32))  # floats of both widths
    # The front camera hangs upside-down.
    group.create_dataset(columns["front"], data=demo.front[:, ::-1, ::-1], **storage)  # type: ignore[arg-type]
    group.create_dataset(columns["wrist"], data=demo.wrist, **storage)  # type: ignore[arg-type]
    group.create_dataset("rewards", data=np.zeros(len(demo.actions), np.uint8))
    group.create_dataset("dones", data=np.zeros(len(demo.actions), np.uint8))
    group.create_dataset("states", data=np.zeros((len(demo.actions), 92)))
    return group


LIBERO = {
    "position": "obs/ee_pos",
    "gripper": "obs/gripper_states",
    "front": "obs/agentview_rgb",
    "wrist": "obs/eye_in_hand_rgb",
}
ROBOMIMIC = {
    "position": "obs/robot0_eef_pos",
    "gripper": "obs/robot0_gripper_qpos",
    "front": "obs/agentview_image",
    "wrist": "obs/robot0_eye_in_hand_image",
}


def tasks_of(everything: list[Demo]) -> list[str]:
    return list(dict.fromkeys(demo.task for demo in everything))


def of_task(everything: list[Demo], task: str) -> list[Demo]:
    return [demo for demo in everything if demo.task == task]


def in_file_order(everything: list[Demo]) -> list[Demo]:
    """The episodes in the order in which a store has them: files sorted by name."""
    return [demo for task in sorted(TASKS) for demo in of_task(everything, task)]


def write_libero(
    folder: Path,
    everything: list[Demo],
    *,
    attrs: bool = True,
    step: int = 1,
    prefix: str = "",
    userblock: int = 0,
    **storage: object,
) -> Path:
    """One file a task. `step` 3 leaves gaps in the demo numbers; `attrs` False is a regenerated file."""
    folder.mkdir(parents=True)
    for task in tasks_of(everything):
        with h5py.File(folder / f"{prefix}{task}_demo.hdf5", "w", userblock_size=userblock) as file:
            data = file.create_group("data")
            chosen = of_task(everything, task)
            if attrs:
                said = {"language_instruction": task.replace("_", " ")}
                data.attrs["problem_info"] = json.dumps(said)
                data.attrs["num_demos"] = len(chosen)
            for i, demo in enumerate(chosen):
                _group(data, f"demo_{i * step}", demo, LIBERO, **storage)
    return folder


def write_robomimic(folder: Path, everything: list[Demo], **storage: object) -> Path:
    """A file a task, with next_obs, filter keys and no language."""
    folder.mkdir(parents=True)
    for task in tasks_of(everything):
        with h5py.File(folder / f"{task}.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_type": 1, "env_kwargs": {}})
            chosen = of_task(everything, task)
            for i, demo in enumerate(chosen):
                group = _group(data, f"demo_{i}", demo, ROBOMIMIC, **storage)
                group.create_dataset("next_obs/agentview_image", data=demo.front * 0)
            names = [f"demo_{i}".encode() for i in range(len(chosen))]
            file.create_dataset("mask/valid", data=np.array(names[::4]))
            file.create_dataset("mask/train", data=np.array([n for n in names if n not in names[::4]]))
    return folder


def write_one(path: Path, demo: Demo, name: str = "demo_0", **storage: object) -> Path:
    """A LIBERO file of one demonstration, to be spoilt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": demo.instruction})
        _group(data, name, demo, LIBERO, **storage)
    return path
