"""Recorded rotations, grippers and angles that are not what the card says stop a run before it begins."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from vlafit.datasets import load_card, open_dataset
from vlafit.datasets.checks import check_store
from vlafit.datasets.recorded_forms import require_forms
from vlafit.errors import DataError

STEPS = 5
HEAD = """
name = "arm"
layout = "libero"
path = "arm"

[instruction]
source = "attrs"

[robot]
name = "arm"
hz = 10.0
control = "pose"
renderer = "ray"
"""
CAMERA = """
[[robot.cameras]]
name = "front"
key = "obs/front"
height = 8
width = 8
"""
TURN = np.array([0.1, -0.2, 3.0])
QUATERNION = np.array([0.0, 0.6, 0.0, 0.8])
TABLES = {
    "euler": '[[robot.{c}.poses]]\nposition = 0\nrotation = 3\nform = "euler_xyz"\n',
    "axis": '[[robot.{c}.poses]]\nposition = 0\nrotation = 3\nform = "axis_angle"\n',
    "quaternion": '[[robot.{c}.poses]]\nposition = 0\nrotation = 3\nform = "quaternion_xyzw"\n',
    "rot6d": '[[robot.{c}.poses]]\nposition = 0\nrotation = 3\nform = "rot6d_columns"\n',
    "gripper": "[[robot.{c}.grippers]]\ndimension = 3\nzero = 0.0\none = 1.0\n",
    "angles": "[[robot.{c}.angles]]\nfirst = 3\ncount = 2\n",
}


def checked(folder: Path, table: str, values: np.ndarray, unit: str = "", step: int = 3) -> None:
    """Check a dataset of two episodes; the second one's `step` holds `values` after three positions."""
    column = "action" if table == "gripper" else "state"
    good = {
        "euler": TURN, "axis": TURN, "quaternion": QUATERNION, "rot6d": np.eye(3)[:2].ravel(),
        "gripper": np.array([1.0]), "angles": np.array([3.0, -7.0]),
    }[table]  # fmt: skip
    rows = np.tile(np.concatenate([np.ones(3), good]), (2, STEPS, 1))
    rows[1, step, 3:] = values
    (folder / "arm").mkdir(parents=True)
    with h5py.File(folder / "arm" / "reach_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "reach out"})
        for number in range(2):
            group = data.create_group(f"demo_{number}")
            plain = np.zeros((STEPS, 2), np.float32)
            own = rows[number].astype(np.float32)
            group.create_dataset("obs/state", data=own if column == "state" else plain)
            group.create_dataset("actions", data=own if column == "action" else plain)
            group.create_dataset("obs/front", data=np.full((STEPS, 8, 8, 3), 9, np.uint8))
    text = HEAD
    for name, key in (("state", "obs/state"), ("action", "actions")):
        mine = name == column
        text += f'\n[robot.{name}]\nkeys = ["{key}"]\ndimensions = {rows.shape[2] if mine else 2}\n'
        text += f'unit = "{unit}"\n' + TABLES[table].format(c=name) if mine else ""
    (folder / "arm.toml").write_text(text + CAMERA)
    store = open_dataset(load_card(folder / "arm.toml"))
    require_forms(store, [info.id for info in store.episodes])


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("euler", -TURN), ("axis", TURN[::-1]), ("quaternion", -QUATERNION),
        ("quaternion", 1.005 * QUATERNION), ("rot6d", np.eye(3)[1:].ravel()), ("gripper", np.array([-0.05])),
        ("gripper", np.array([0.4])), ("angles", np.array([-12.0, 12.0])),
    ],
)  # fmt: skip
def test_rotations_grippers_and_angles_as_recorded_pass(tmp_path: Path, table: str, values: np.ndarray):
    checked(tmp_path, table, values)


@pytest.mark.parametrize(
    ("table", "values", "unit", "facts"),
    [
        ("euler", np.rad2deg(TURN), "", ["more than a turn", "0.0174533"]),
        ("axis", np.rad2deg(TURN), "rad", ["more than a turn", "`scale`"]),
        ("euler", TURN, "deg", ["unit is 'deg'", "radians"]),
        ("angles", np.array([0.1, 90.0]), "", ["more than two turns"]),
        ("angles", np.array([0.1, 0.2]), "degrees", ["unit is 'degrees'"]),
        ("quaternion", 0 * QUATERNION, "", ["0, 0, 0, 0 is no quaternion", "`rotation` (3)"]),
        ("quaternion", 2 * QUATERNION, "", ["no quaternion"]),
        ("quaternion", np.array([0.6, 0.0, 0.8, 1.0]), "", ["no quaternion"]),
        ("rot6d", np.array([1.0, 0, 0, 0.7, 0.7, 0]), "", ["'rot6d_columns'", "orthogonal"]),
        ("gripper", np.array([100.0]), "", ["100 is outside", "from 0 (zero) to 1 (one)"]),
        ("gripper", np.array([-1.0]), "", ["-1 is outside"]),
    ],
)
def test_other_values_are_an_error_with_their_place(
    tmp_path: Path, table: str, values: np.ndarray, unit: str, facts: list[str]
):
    with pytest.raises(DataError) as raised:
        checked(tmp_path, table, values, unit)
    said = str(raised.value)
    assert all(fact in said for fact in facts), said
    assert "unit is" in said or ("demo_1', step 3: " in said and "(1 of 5 steps)" in said), said


def test_the_check_finds_them_too(tmp_path: Path):
    with pytest.raises(DataError):
        checked(tmp_path, "quaternion", 2 * QUATERNION)
    result = check_store(open_dataset(load_card(tmp_path / "arm.toml")))
    findings = [f for f in result.findings if f.kind == "form"]
    assert [(f.severity, f.episode.endswith("demo_1"), f.step) for f in findings] == [("error", True, 3)]
    assert findings[0].columns == (("state", 3),)
