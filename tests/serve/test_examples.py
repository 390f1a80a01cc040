"""The examples that need no hardware run as they are printed."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.serve.robots import ROBOT, Continuing, Summing, described, seen
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


def refused(name: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run an example in this process, which has imported what it needs; return the sentence it ends in."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert isinstance(ended.value.code, str)  # Python prints it, and exits with status 1
    return ended.value.code


class Live:
    """A robot and its rate, as the loop of the page names them: twelve steps, then done."""

    def __init__(self) -> None:
        self.sent: list[np.ndarray] = []
        self.slept = 0

    def done(self) -> bool:
        return len(self.sent) == 12

    def front(self) -> np.ndarray:
        return seen(len(self.sent)).images["front"]

    def wrist(self) -> np.ndarray:
        return seen(len(self.sent)).images["wrist"]

    def joints(self) -> np.ndarray:
        return seen(len(self.sent)).state

    def send(self, action: np.ndarray) -> None:
        self.sent.append(action)

    def sleep(self) -> None:
        self.slept += 1


def test_the_loop_of_the_page_has_twenty_lines_and_drives_a_robot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"^```py\n(import vlafit.*?rate\.sleep.*?)^```", page, flags=re.DOTALL | re.MULTILINE
    )
    assert len(code.splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    Path("token").write_text("s" * 20 + "\n")
    actor, live = Continuing(), Live()
    with serving(actor, described(actor), Options(port=0, token="s" * 20)) as running:
        address = "ws://gpu-machine:8000"
        assert address in code
        exec(code.replace(address, running.address), {"robot": live, "rate": live})
    sent = np.array(live.sent, np.float64)
    assert sent.shape == (12, 3) and live.slept == 12 and running.metrics.answered["vlafit"] >= 2
    assert (sent >= ROBOT.action.low).all() and (sent <= ROBOT.action.high).all()
    assert np.abs(np.diff(sent, axis=0)).max() <= 0.05


NOBODY = ("--url", "ws://127.0.0.1:9")


@pytest.mark.parametrize(
    ("name", "words", "fact"),
    [
        ("recorded_robot.py", ("no-such-card", *NOBODY), "no-such-card"),
        (
            "recorded_robot.py",
            ("metaworld-faucet", *NOBODY, "--episode", "999"),
            "--episode 999: .* episodes 0 to 119",
        ),
        (
            "recorded_robot.py",
            ("metaworld-faucet", *NOBODY, "--episode", "-1"),
            "--episode -1: .* episodes 0 to 119",
        ),
        (
            "recorded_robot.py",
            ("metaworld-faucet", *NOBODY, "--replan", "0"),
            "replan must be a whole",
        ),
        ("recorded_robot.py", ("metaworld-faucet", *NOBODY, "--steps", "-3"), "--steps must be at least 0"),
        ("recorded_robot.py", ("metaworld-faucet", "--url", "here", "--wait", "0"), "address of a server"),
        (
            "recorded_robot.py",
            ("metaworld-faucet", *NOBODY, "--wait", "0"),
            "ws://127.0.0.1:9: cannot be reached",
        ),
        (
            "so101.py",
            (*NOBODY, "--port", "x", "--instruction", "y", "--token-file", "none"),
            "No such file.*none",
        ),
        ("so101.py", (*NOBODY, "--port", "x", "--instruction", "y"), "lerobot|cannot be reached"),
        ("droid_openpi.py", (), "openpi-client|usage: droid_openpi.py"),
        ("droid_openpi.py", ("127.0.0.1", "port"), "openpi-client|port.*not a number"),
        ("droid_openpi.py", ("127.0.0.1", "9"), "openpi-client|127.0.0.1:9"),
    ],
)
def test_an_example_that_cannot_run_ends_in_one_sentence(
    name: str, words: tuple[str, ...], fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = refused(name, words, monkeypatch)
    assert re.search(fact, sentence), sentence
    assert len(sentence.splitlines()) <= 4


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_has_not_the_name_of_a_package_that_it_imports(path: Path) -> None:
    assert not re.search(rf"^\s*(?:from|import) {path.stem}\b", path.read_text(), re.MULTILINE)


def test_a_recorded_robot_of_another_kind_is_told_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    robot = Summing()
    with serving(robot, described(robot), Options(port=0)) as running:
        sentence = refused("recorded_robot.py", ("metaworld-faucet", "--url", running.address), monkeypatch)
    assert "the served policy" in sentence and "camera" in sentence


@pytest.mark.parametrize(
    ("cameras", "fact"),
    [
        ([], "add --camera front=DEVICE --camera wrist=DEVICE"),
        (["front=0"], "add --camera wrist=DEVICE$"),
        (["front=0", "side=1"], "--camera side=1: must be NAME=DEVICE.*: front, wrist"),
        (["front=0", "front=1"], "--camera front=1: .* once"),
        (["front"], "--camera front: must be NAME=DEVICE"),
        (["front=", "wrist=1"], "--camera front=: must be"),
        (["front=0", "wrist=0"], "two names for one device"),
        (["wrist=/dev/video2", "front=0"], "lerobot|none of the arm's"),
    ],
)
def test_the_so101_takes_no_camera_by_its_place_in_a_list(
    cameras: list[str], fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Summing()
    words = ["--port", "x", "--instruction", "y", *(word for name in cameras for word in ("--camera", name))]
    with serving(policy, described(policy), Options(port=0)) as running:
        sentence = refused("so101.py", ("--url", running.address, *words), monkeypatch)
    assert re.search(fact, sentence), sentence


def test_the_robots_side_imports_no_torch() -> None:
    names = "vlafit.connect, vlafit.Controller, vlafit.Limits"
    code = f"import sys, vlafit; {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=ROOT).returncode == 0
