"""The examples that need no hardware run as they are printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlafit.actor import load_actor
from vlafit.serve.describe import describe
from vlafit.serve.options import Options
from vlafit.serve.server import serving

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("execution", ["chunk", "real_time"])
def test_a_recorded_robot_is_driven_by_the_shipped_policy(execution: str) -> None:
    actor = load_actor("metaworld-base", steps=2, width=1)
    with serving(actor, describe(actor), Options(port=0)) as running:
        example = [sys.executable, str(ROOT / "examples" / "recorded_robot.py"), "metaworld-faucet"]
        options = ["--url", running.address, "--steps", "12", "--execution", execution, "--replan", "4"]
        result = subprocess.run(
            [*example, *options],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
    assert result.returncode == 0, result.stderr
    assert "12 actions; mean distance" in result.stdout and "gripper" in result.stdout
    assert "cm" in result.stdout
    answered = running.metrics.answered["vlafit"]
    assert answered == 3  # one request each four steps


def test_the_robots_side_imports_no_torch() -> None:
    names = "vlafit.connect, vlafit.Controller, vlafit.Limits"
    code = f"import sys, vlafit; {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=ROOT).returncode == 0
