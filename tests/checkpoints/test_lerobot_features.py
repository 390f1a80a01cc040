"""What LeRobot's config.json lists of cameras, states and actions, and no policy here can follow, is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.forms import SMOLVLA
from vlafit import checkpoints
from vlafit.cli import main
from vlafit.errors import WeightsError


def write(folder: Path, table: str, key: str, kind: str, shape: list[int], *, processors: bool) -> Path:
    """Copy SmolVLA's checkpoint, one feature added or replaced in config.json and the processors."""
    feature = {key: {"type": kind, "shape": shape}}
    shutil.copytree(SMOLVLA, folder)
    config = json.loads((folder / "config.json").read_text())
    config[table] |= feature
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("policy_*processor.json"):
        if not processors:
            path.unlink()
            continue
        pipeline: dict[str, Any] = json.loads(path.read_text())
        for step in pipeline["steps"]:
            inner = step["registry_name"] == "normalizer_processor"
            if "features" in step["config"] and (inner or table == "output_features"):
                step["config"]["features"] |= feature
        path.write_text(json.dumps(pipeline))
    return folder


@pytest.mark.case(
    section="checkpoints",
    report="the policy was trained on a depth or grey camera",
    user_has="a LeRobot config.json with a camera of one channel, or of four",
    now="refused by name, with its shape; it was shown as a colour camera",
)
@pytest.mark.parametrize("processors", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "fact"),
    [
        ("VISUAL", [1, 40, 72], "[1, 40, 72], not 3 channels"),
        ("VISUAL", [4, 40, 72], "[4, 40, 72], not 3 channels"),
        ("ENV", [3], "of type 'ENV'"),
    ],
)
def test_an_input_that_no_policy_takes_is_refused_by_name(
    tmp_path: Path, kind: str, shape: list[int], fact: str, processors: bool
):
    key = "observation.images.cam_high" if kind == "VISUAL" else "observation.environment_state"
    folder = write(tmp_path / "ck", "input_features", key, kind, shape, processors=processors)
    with pytest.raises(WeightsError) as caught:
        checkpoints.declaration(folder)  # as `vlafit train` reads it
    assert f"{key} " in str(caught.value) and fact in str(caught.value)
    if processors:
        with pytest.raises(WeightsError, match=key):
            checkpoints.load(folder)


@pytest.mark.case(
    section="checkpoints",
    report="touch, effort or a second action makes no difference",
    user_has="a LeRobot config.json that lists a state beside observation.state, or an action beside action",
    now="a line says that LeRobot's policies neither read nor write it, in `inspect` and in the agreement",
)
@pytest.mark.parametrize(
    ("table", "kind", "key"),
    [
        ("input_features", "STATE", "observation.tactile"),
        ("output_features", "ACTION", "action.gripper"),
    ],
)
def test_a_second_state_or_action_that_lerobots_policies_leave_out_is_named(
    tmp_path: Path, table: str, kind: str, key: str, capsys: pytest.CaptureFixture
):
    folder = write(tmp_path / "ck", table, key, kind, [5], processors=True)
    (overruled,) = [one for one in checkpoints.declaration(folder).overruled if key in one.name]
    assert overruled.stated == f"config.json: {table}: {kind} [5]" and "read" in overruled.used
    assert key in checkpoints.inspect(folder).report.text()
    assert main(["inspect", str(folder)]) == 0
    assert f"feature {key}" in capsys.readouterr().out
    assert not any("feature" in one.name for one in checkpoints.declaration(SMOLVLA).overruled)
