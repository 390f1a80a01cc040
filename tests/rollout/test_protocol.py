from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from vlafit import config, shipped
from vlafit.envs import Renderer
from vlafit.errors import ConfigError
from vlafit.rollout import Protocol, load_protocol

Make = Callable[..., Protocol]

GOOD = """
name = "mine"
tasks = ["left", "right"]
trials = 3
first_seed = 7
horizon = 20
replan = 4
[env]
name = "tests.rollout.toy_env"
[swapped]
left = "right"
[[references]]
what = "somebody's policy"
success = 0.5
source = "a paper, table 1"
"""


def read(folder: Path, text: str) -> Protocol:
    path = folder / "mine.toml"
    path.write_text(text)
    return load_protocol(path)


def test_a_protocol_reads_as_it_is_written(tmp_path: Path) -> None:
    got = read(tmp_path, GOOD)
    assert got.tasks == ("left", "right") and got.swapped == {"left": "right"}
    assert list(got.seeds()) == [7, 8, 9] and list(got.seeds(1)) == [7]
    assert got.references[0].success == 0.5
    assert config.build(Protocol, got.to_json(), "again") == got


@pytest.mark.parametrize("name", shipped.names("protocol"))
def test_every_shipped_protocol_reads_and_is_called_like_its_file(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name and protocol.purpose and protocol.versions
    if protocol.env.name == "libero":  # its seeds are indices of the official initial states
        assert protocol.first_seed == 0 and protocol.trials <= 50
    else:
        assert protocol.first_seed >= 50_000  # recorded demonstrations begin at seed 1000


@pytest.mark.sim
@pytest.mark.parametrize("name", shipped.names("protocol"))
def test_every_shipped_protocol_fits_its_simulation(name: str) -> None:
    from vlafit.envs import make
    from vlafit.rollout.protocol import require_tasks, require_versions

    protocol = load_protocol(name)
    if protocol.env.name == "libero":
        pytest.importorskip("libero", reason="needs the extra libero")
    env = make(protocol.env)
    try:
        require_versions(protocol, env.versions)
        require_tasks(protocol, env.tasks)
        for task, partner in protocol.swapped.items():
            assert env.instruction(task) != env.instruction(partner)
    finally:
        env.close()


def test_what_decides_a_result_decides_the_hash(protocol: Make) -> None:
    same = {protocol().sha256(), protocol(purpose="other words").sha256()}
    assert len(same) == 1
    other = [{"trials": 5}, {"replan": 3}, {"horizon": 21}, {"first_seed": 1}, {"versions": {"toy": "1.0"}}]
    assert len(same | {protocol(**change).sha256() for change in other}) == 6
    env = protocol().env
    drawn = {protocol(env=replace(env, renderer=name)).sha256() for name in get_args(Renderer)}
    assert len(drawn) == len(get_args(Renderer))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("trials = 3", "trial = 3", "unknown key 'trial'; did you mean 'trials'"),
        ("trials = 3", "", "missing key 'trials'"),
        ("trials = 3", "trials = 0", "trials: must be at least 1, not 0"),
        ("trials = 3", 'trials = "3"', "trials: expected a whole number"),
        ("horizon = 20", "horizon = -1", "horizon: must be at least 1"),
        ("replan = 4", "replan = 0", "replan: must be at least 1"),
        ("first_seed = 7", "first_seed = -7", "first_seed: must not be negative, is -7"),
        ('name = "mine"', 'name = ""', "name: ''"),
        ('name = "mine"', 'name = "a/b"', "name: 'a/b'"),
        ('tasks = ["left", "right"]', "tasks = []", "tasks: the list is empty"),
        ('tasks = ["left", "right"]', 'tasks = ["left", "left"]', "tasks: listed twice: left"),
        ('left = "right"', 'left = "left"', "'left' is its own partner"),
        (
            'left = "right"',
            'lift = "right"',
            "swapped: 'lift' is not one of the protocol's tasks; did you mean 'left'",
        ),
        ("horizon = 20", "horizon = 20\nsettle_action = [0.0]", "settle_steps is 0"),
        ("horizon = 20", "horizon = 20\nsettle_steps = -1", "settle_steps: must not be negative, is -1"),
        (
            "horizon = 20",
            'horizon = 20\nsuccess = "last_step"',
            "success: 'last_step' is not one of 'any_step'",
        ),
        ("success = 0.5", "success = 50", "must be from 0 to 1, is 50"),
        ("[env]", "[env]\nhorizon = 9", "env.horizon: remove it"),
        ("[env]", '[env]\nrenderer = "vulkan"', "env.renderer: 'vulkan' is not one of"),
        ("[env]", "[env", "not valid TOML"),
    ],
)
def test_a_wrong_protocol_is_refused_with_file_key_and_reason(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert GOOD.count(old) == 1 or old == "[env]"
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert message in str(caught.value) and "mine.toml" in str(caught.value)


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'metaworld-faucet'"):
        load_protocol("metaworld-faucets")
