"""openpi's client and vla-eval, unchanged, against our server: recorded, and live where they are installed.

They need numpy below 2, so an environment of their own. `make peers-serve` makes one and runs the live tests:

    python3 -m venv peers
    peers/bin/pip install openpi-client==0.1.2 vla-eval==0.8.0
    VLAFIT_PEERS_PYTHON=$PWD/peers/bin/python pytest tests/serve/test_peers.py
"""

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect as dial

from tests.serve.robots import ROBOT, Summing, Watching, seen
from tests.serve.robots import described as describe
from vlafit.execution import Execution
from vlafit.serve import wire
from vlafit.serve.options import Options
from vlafit.serve.server import Running, serving
from vlafit.types import ActionChunk, EpisodeKey, Feature, Observation

Serve = Callable[..., Running]
ROOT = Path(__file__).parents[2]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "openpi_client" / "frames.json"
SIDES = Path(__file__).parent / "peers"
PYTHON = os.environ.get("VLAFIT_PEERS_PYTHON", "")
live = pytest.mark.skipif(not PYTHON, reason="VLAFIT_PEERS_PYTHON names no interpreter with openpi-client")


class Droid(Summing):
    """Acts for an arm with eight joints."""

    def _act(self, seen: Observation, key: EpisodeKey) -> ActionChunk:
        assert seen.state.shape == (8,) and set(seen.images) == {"exterior", "wrist"}
        return ActionChunk(np.zeros((8, 8), np.float32))


def plain(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return {"values": value.ravel().tolist(), "dtype": value.dtype.str, "shape": value.shape}


def observations() -> list[dict[str, Any]]:
    """Three of the robot, named as openpi's examples name theirs, and one that lacks a camera."""
    every = []
    for number in range(3):
        one = seen(number)
        images = {f"observation/{name}": image for name, image in one.images.items()}
        every.append(images | {"observation/state": one.state, "prompt": one.instruction})
    every[1]["observation/state"] = every[1]["observation/state"].astype(np.float64)
    del every[2]["observation/wrist"]
    return every


def expected(number: int, replan: int) -> bytes:
    (chunk,) = Summing().act([seen(number)], [EpisodeKey(0, seen(number).instruction, replan)])
    return chunk.actions.tobytes()


def test_the_recorded_bytes_of_openpis_client_are_answered_as_then(serve: Serve) -> None:
    recorded = json.loads(FIXTURE.read_text())
    assert recorded["versions"]["openpi-client"] == "0.1.2" and recorded["versions"]["numpy"] < "2"
    exchange = iter(recorded["frames"])
    with dial(serve().address, compression=None, proxy=None) as client:
        client.recv(timeout=10)
        for number, (direction, frame) in enumerate(exchange):
            assert direction == "sent"
            client.send(bytes.fromhex(frame))
            answer, (_, then) = client.recv(timeout=10), next(exchange)
            if number == 2:
                assert answer == then and "camera 'wrist': missing" in answer
                continue
            assert isinstance(answer, bytes)
            now, before = wire.unpack(answer), wire.unpack(bytes.fromhex(then))
            assert now["actions"].tobytes() == before["actions"].tobytes() == expected(number, number)
            assert set(now) == set(before) and now["actions"].dtype.str == "<f4"


@live
def test_openpis_own_client_drives_a_server(serve: Serve, tmp_path: Path) -> None:
    running = serve(token="0123456789abcdef")
    port = str(running.server.port)  # type: ignore[union-attr]
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps([{k: plain(v) for k, v in one.items()} for one in observations()]))
    side = [PYTHON, str(SIDES / "openpi_side.py"), "127.0.0.1", port, "0123456789abcdef"]
    subprocess.run([*side, str(source), str(target)], check=True, timeout=120)
    got = json.loads(target.read_text())
    assert got["metadata"] == {"action_horizon": 6, "robot": "arm"}
    first, second, third, broker = got["answers"]
    assert first["actions"] == {"dtype": "<f4", "shape": [6, 3], "hex": expected(0, 0).hex()}
    assert first["warnings"] is None and broker["warnings"] == [None] * 4
    assert second["actions"]["hex"] == expected(1, 1).hex()
    assert "camera 'wrist': missing" in third["error"]
    steps = "".join(step["hex"] for step in broker["steps"])
    assert steps == expected(0, 0)[:24].hex() + expected(0, 1)[:24].hex()


@live
def test_the_example_of_openpis_client_drives_an_arm_by_its_documented_command(serve: Serve) -> None:
    cameras = (Feature("exterior", (8, 8, 3)), Feature("wrist", (8, 8, 3)))
    arm = replace(ROBOT, cameras=cameras, state=Feature("state", (8,)), action=Feature("action", (8,)))
    actor = Droid()
    text = (ROOT / "examples" / "droid_openpi.py").read_text()
    pairs = [pair.partition("=") for pair in re.findall(r"--map (\S+=\S+)", text)]
    described = replace(describe(actor), embodiment=arm, required=("exterior", "wrist"))
    options = Options(port=0, names={key: name for key, _, name in pairs})
    for served, fact in ((described, ""), (describe(Summing()), "cameras exterior and wrist, .*front")):
        with serving(actor, served, options if not fact else Options(port=0)) as running:
            command = [PYTHON, str(ROOT / "examples" / "droid_openpi.py"), "127.0.0.1", running.address[-5:]]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (result.returncode == 0) == (not fact) and "Traceback" not in result.stderr, result.stderr
        assert re.search(fact, result.stderr) and len(result.stdout.splitlines()) == 16 * (not fact)


@live
def test_warnings_reach_openpis_client_once_and_leave_its_actions_as_they_are(
    serve: Serve, tmp_path: Path
) -> None:
    port = str(serve(Watching()).server.port)  # type: ignore[union-attr]
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    usual, unusual = observations()[0], observations()[0]
    unusual["observation/state"] = np.float32([0.5, 57.3, -1.0])
    far = {**usual, "observation/state": np.float32([100.0, 57.3, -1.0])}
    source.write_text(
        json.dumps([{k: plain(v) for k, v in one.items()} for one in (far, unusual, unusual, usual)])
    )
    side = [PYTHON, str(SIDES / "openpi_side.py"), "127.0.0.1", port, ""]
    subprocess.run([*side, str(source), str(target)], check=True, timeout=120)
    first, *others, broker = json.loads(target.read_text())["answers"]
    assert len(first["warnings"]) == 2 and "state.base = 100" in first["warnings"][0]
    assert "state.elbow = 57.3" in first["warnings"][1]
    assert [one["warnings"] for one in others] == [None] * 3
    assert others[-1]["actions"]["hex"] == expected(0, 3).hex()
    assert broker["warnings"] == [first["warnings"]] * 2 + [None] * 2  # once, with each step of that chunk


@live
def test_openpis_own_client_is_recorded(serve: Serve, tmp_path: Path) -> None:
    """Write the fixture again with VLAFIT_RECORD=1; else only see that it would hold the same frames."""
    running = serve()
    source, target, frames = tmp_path / "in.json", tmp_path / "out.json", tmp_path / "frames.json"
    source.write_text(json.dumps([{k: plain(v) for k, v in one.items()} for one in observations()]))
    side = [PYTHON, str(SIDES / "openpi_side.py"), "127.0.0.1", str(running.server.port), ""]  # type: ignore[union-attr]
    subprocess.run([*side, str(source), str(target), str(frames)], check=True, timeout=120)
    if os.environ.get("VLAFIT_RECORD"):
        FIXTURE.write_text(frames.read_text())
    sent = [frame for direction, frame in json.loads(frames.read_text())["frames"] if direction == "sent"]
    assert sent == [f for direction, f in json.loads(FIXTURE.read_text())["frames"] if direction == "sent"]


@live
def test_vla_evals_own_runner_drives_a_server(serve: Serve, tmp_path: Path) -> None:
    running = serve(execution=Execution(replan=2))
    target = tmp_path / "out.json"
    side = [PYTHON, str(SIDES / "vla_eval_side.py"), running.address, str(target)]
    subprocess.run(side, check=True, timeout=120)
    got = json.loads(target.read_text())
    wanted = []
    for episode in (5, 6):
        for replan in (0, 1):
            (chunk,) = Summing().act([seen()], [EpisodeKey(episode, "pick", replan)])
            wanted += [action.tobytes().hex() for action in chunk.actions[:2]]
    assert got["actions"] == wanted
    assert got["hello"]["model_server"] == "vlafit" and "camera 'front': missing" in got["error"]


@live
@pytest.mark.parametrize("mode", ["sync", "live"])
def test_vla_evals_own_command_evaluates_a_served_policy(mode: str, serve: Serve, tmp_path: Path) -> None:
    """In its live mode the robot's clock runs on while the policy computes, and an old action is repeated."""
    running = serve(execution=Execution(replan=2))
    config, actions, results = tmp_path / "arm.yaml", tmp_path / "actions.txt", tmp_path / "results"
    fields = f"benchmark: vla_eval_arm:Arm\n    mode: {mode}\n    hz: 20\n    episodes_per_task: 2\n"
    config.write_text(f"benchmarks:\n  - {fields}    max_steps: 10\n")
    command = [Path(PYTHON).parent / "vla-eval", "run", "--no-docker", "--config", config]
    command += ["--server-url", running.address, "--output-dir", results]
    environment = os.environ | {"PYTHONPATH": str(SIDES), "ARM_ACTIONS": str(actions)}
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert made.returncode == 0, made.stdout + made.stderr
    wanted = []
    for episode in (0, 1):
        for replan in (0, 1):
            (chunk,) = Summing().act([seen()], [EpisodeKey(episode, "pick", replan)])
            wanted += [action.tobytes().hex() for action in chunk.actions[:2]]
    sent = actions.read_text().split()
    if mode == "sync":
        assert sent == wanted
    else:
        assert len(sent) == len(wanted) and set(sent) <= {*wanted, np.zeros(3, np.float32).tobytes().hex()}
        assert len(set(sent)) > 2
    (result,) = [json.loads(path.read_text()) for path in results.rglob("*.json")]
    assert result["mean_success"] == 1.0 and result["num_errors"] == 0
    assert result["server_info"]["model_server"] == "vlafit" and not running.metrics.refused
