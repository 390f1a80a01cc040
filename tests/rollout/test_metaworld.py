"""The scripted expert and a random actor through the same evaluation as a policy, in a real simulation."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("metaworld")

from tests.chance import RandomActor
from vlafit.envs import make
from vlafit.envs.experts import ScriptedExpert
from vlafit.errors import SimulationError
from vlafit.rollout import Protocol, evaluate, load_protocol

pytestmark = pytest.mark.sim


@pytest.fixture
def protocol() -> Protocol:
    return dataclasses.replace(load_protocol("metaworld-faucet"), trials=2)


def test_the_expert_scores_high_and_the_random_actor_low(protocol: Protocol, tmp_path: Path) -> None:
    expert = evaluate(ScriptedExpert(), protocol, tmp_path / "expert", workers=1, videos=0, images=False)
    assert expert.rate == 1 and not expert.notices
    assert len({(r.task, r.steps) for r in expert.records}) > 2  # the starts differ
    robot = make(protocol.env).embodiment
    short = dataclasses.replace(protocol, horizon=40, trials=1)
    chance = evaluate(RandomActor(robot, steps=8), short, tmp_path / "random", workers=1, videos=0)
    assert chance.rate == 0


def test_a_simulation_gives_the_same_episodes_in_any_process_and_order(
    protocol: Protocol, tmp_path: Path
) -> None:
    found = []
    for workers, trials in ((1, 1), (2, 2)):
        out = tmp_path / f"{workers}_{trials}"
        options = {"workers": workers, "trials": trials, "videos": 0}
        evaluate(ScriptedExpert(), protocol, out, images=False, **options)
        lines = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
        found.append({(line["task"], line["seed"]): line["steps"] for line in lines})
    assert len(found[0]) == 2 and found[0].items() <= found[1].items()


def test_a_horizon_that_start_steps_make_too_long_names_them(tmp_path: Path) -> None:
    protocol = dataclasses.replace(load_protocol("metaworld-faucet"), start_steps=450)
    with pytest.raises(SimulationError, match=r"600 is too long; .*= 150, start_steps = 450 of"):
        evaluate(ScriptedExpert(), protocol, tmp_path / "out", workers=1, trials=1, images=False)
    assert not (tmp_path / "out").exists()
