"""robosuite 1.5, whose pins contradict ours, in an interpreter of its own; live, in a few minutes:

python3.11 -m venv robosuite-env
robosuite-env/bin/pip install robosuite==1.5.2 mujoco==3.3.0 gymnasium h5py msgpack
VLAFIT_ROBOSUITE_PYTHON=$PWD/robosuite-env/bin/python pytest tests/rollout/test_robosuite.py
"""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from vlafit.envs import EnvSpec
from vlafit.rollout import Protocol, evaluate
from vlafit.types import ActionChunk, EpisodeKey, Observation

PYTHON = os.environ.get("VLAFIT_ROBOSUITE_PYTHON", "")
EXAMPLES = Path(__file__).parents[2] / "examples"


class Reaching:
    """Moves the hand by what its state and its seed say: a function of both."""

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        return [self._act(*pair) for pair in zip(observations, keys, strict=True)]

    def _act(self, seen: Observation, key: EpisodeKey) -> ActionChunk:
        assert seen.images["agentview"].std() > 1, "no picture"
        actions = np.random.default_rng([key.seed, key.replan]).uniform(-1, 1, (5, 7)).astype(np.float32)
        actions[:, :3] += 0.1 * (seen.state[:3] - seen.images["agentview"].mean() / 255)
        return ActionChunk(actions.clip(-1, 1))


LIVE = pytest.mark.skipif(
    not PYTHON, reason="VLAFIT_ROBOSUITE_PYTHON names no interpreter with robosuite 1.5"
)


@pytest.mark.peer
@LIVE
def test_its_renderers_do_not_disturb_each_other_when_garbage_is_collected() -> None:
    paths = os.pathsep.join(map(str, (EXAMPLES, EXAMPLES.parent)))
    command = [PYTHON, "-m", "vlafit.envs.sharing", "robosuite_lift", "--renderer", "egl"]
    environment = {**os.environ, "PYTHONPATH": paths, "MUJOCO_GL": "egl"}
    checked = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr[-1000:]


@pytest.mark.peer
@LIVE
def test_robosuite_is_played_alike_by_one_and_two_workers_and_its_versions_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))
    monkeypatch.setenv("MUJOCO_GL", "egl")
    spec = EnvSpec("robosuite_lift", 64, "egl", python=PYTHON)
    protocol = Protocol("lift", spec, ("lift",), 4, 100, 15, 5, versions={"robosuite": "1.5.2"})
    played = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        got = evaluate(Reaching(), protocol, out, workers=workers, videos=4)
        assert got.overall.errors == 0 and got.overall.episodes == 4
        films = {path.name: path.read_bytes() for path in sorted((out / "videos").glob("*.mp4"))}
        changes = [record.action_change for record in got.records]
        played.append((films, changes))
    assert played[0] == played[1]
    versions = json.loads((tmp_path / "1/result.json").read_text())["versions"]
    assert versions.keys() == {"python", "numpy", "mujoco", "gymnasium", "robosuite"}
