"""A writer of DROID's raw layout: nested folders, serial numbers that differ, idle rows, lossless videos."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from tests.datasets.layouts import SIZE, Demo, card
from tests.datasets.lerobot_files import write_video
from vlafit.datasets import Card
from vlafit.datasets.card import CameraCard, ColumnCard, InstructionCard

FPS = 15


def write(folder: Path, everything: list[Demo], cut: int = -1, failed: int = -1) -> Card:
    """Write episodes. The wrist video of episode `cut` lacks a frame; episode `failed` was no success."""
    for number, demo in enumerate(everything):
        lab = ("AUTOLab", "TRI")[number % 2]
        outcome = "failure" if number == failed else "success"
        episode = folder / lab / outcome / "2023-07-07" / f"Fri_Jul__7_09:42:{number:02d}_2023"
        serials = {"wrist": f"1{lab == 'TRI':d}{number}", "ext1": f"2{number}", "ext2": f"3{number}"}
        (episode / "recordings" / "MP4").mkdir(parents=True)
        idle = 1 + number % 2  # rows before the first step, and one in the middle
        kept = np.r_[idle : idle + 2, idle + 3 : idle + 1 + len(demo.actions)]
        rows = idle + 1 + len(demo.actions)
        moving = np.zeros(rows, bool)
        moving[kept] = True
        with h5py.File(episode / "trajectory.h5", "w") as file:
            state, actions = (
                spread(demo.state.astype(np.float64), kept, rows),
                spread(demo.actions, kept, rows),
            )
            columns = {
                "observation/robot_state/joint_positions": state[:, :4],
                "observation/robot_state/gripper_position": state[:, 4],
                "observation/robot_state/cartesian_position": state[:, :4] * 7,
                "observation/controller_info/movement_enabled": moving,
                "observation/timestamp/robot_state/read_start": np.arange(rows) * 66,
                f"observation/camera_type/{serials['wrist']}": np.zeros(rows, np.int64),
                "action/joint_velocity": actions[:, :3],
                "action/gripper_position": actions[:, 3],
                "action/cartesian_velocity": actions[:, :3] * -1,
            }
            for key, values in columns.items():  # resizable, as DROID's writer makes them
                file.create_dataset(key, data=values, maxshape=(None, *values.shape[1:]), chunks=True)
            file.attrs["success"], file.attrs["timesteps"] = number != failed, rows
        metadata = {f"{name}_cam_serial": serial for name, serial in serials.items()}
        metadata |= {"uuid": f"{lab}+{number}", "lab": lab, "current_task": demo.instruction}
        (episode / f"metadata_{lab}+{number}.json").write_text(json.dumps(metadata))
        films = {"wrist": demo.wrist, "ext1": demo.front[:, ::-1, ::-1], "ext2": demo.front * 0}
        for name, frames in films.items():
            shown = spread(frames, kept, rows)
            if name == "ext1":  # the camera stopped later than the robot
                shown = np.concatenate([shown, shown[-1:]])
            if name == "wrist" and number == cut:
                shown = shown[:-1]
            path = episode / "recordings" / "MP4" / f"{serials[name]}.mp4"
            write_lossless(path, shown)
            write_lossless(path.with_name(f"{serials[name]}-stereo.mp4"), np.concatenate([shown, shown], 2))
    base = card(folder)
    robot = replace(
        base.robot,
        cameras=(CameraCard("front", "ext1", *SIZE, rotate=180), CameraCard("wrist", "wrist", *SIZE)),
        state=ColumnCard(
            ("observation/robot_state/joint_positions", "observation/robot_state/gripper_position"), 5
        ),
        action=ColumnCard(("action/joint_velocity", "action/gripper_position"), 4),
    )
    return replace(base, layout="droid", robot=robot, instruction=InstructionCard("current_task"))


def spread(values: NDArray, kept: NDArray[np.int64], rows: int) -> NDArray:
    """Return `values` at the rows `kept` of more rows, whose others hold what must never be read."""
    made = np.full((rows, *values.shape[1:]), 77, values.dtype)
    made[kept] = values
    return made


def write_lossless(path: Path, frames: NDArray[np.uint8]) -> None:
    """Encode frames as H.264 in RGB without loss."""
    write_video(path, frames, "libx264rgb", FPS, "rgb24", {"qp": "0", "preset": "ultrafast"})
