"""What every simulation of the package promises; a new file in vlafit/envs is found and held to it."""

import subprocess
import sys

import numpy as np
import pytest

from tests.chance import RandomActor
from vlafit import envs
from vlafit.envs import EnvSpec
from vlafit.envs.vector import GymVector
from vlafit.errors import SimulationError
from vlafit.types import Env, EpisodeKey

pytestmark = pytest.mark.sim

NEEDS = {"metaworld": "metaworld", "pusht": "gym_pusht", "pusht_keypoints": "gym_pusht", "libero": "libero"}


@pytest.fixture(scope="module", params=envs.names())
def env(request: pytest.FixtureRequest) -> Env:
    pytest.importorskip(NEEDS.get(request.param, "numpy"))
    return envs.make(EnvSpec(request.param, size=24, renderer="auto", horizon=5))


def actions(env: Env, count: int, seed: int = 0) -> np.ndarray:
    high = 1.0 if env.embodiment.control.startswith("delta") else 512.0
    actor = RandomActor(env.embodiment, low=-1.0 if high == 1.0 else 0.0, high=high, steps=count)
    return actor.act([env.reset(env.tasks[0], 0)], [EpisodeKey(seed, env.tasks[0], 0)])[0].actions


def test_observations_are_what_the_embodiment_declares(env: Env) -> None:
    robot = env.embodiment
    steps = actions(env, 1)
    observation = env.reset(env.tasks[0], 3)
    for seen in (observation, env.step(steps[0])[0]):
        assert seen.state.shape == robot.state.shape and seen.state.dtype == np.float32
        assert set(seen.images) == {camera.name for camera in robot.cameras}
        for camera in robot.cameras:
            assert (
                seen.images[camera.name].shape == camera.shape and seen.images[camera.name].dtype == np.uint8
            )
        assert seen.instruction == env.instruction(env.tasks[0]) and seen.instruction.strip()
    assert robot.hz > 0 and robot.control and robot.renderer and env.versions


def test_the_same_seed_and_actions_give_the_same_episode(env: Env) -> None:
    steps = actions(env, 5)
    runs = []
    for _ in range(2):
        first = env.reset(env.tasks[-1], 11)
        runs.append([first, *(env.step(action)[0] for action in steps)])
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one.state, other.state)
        for name in one.images:
            np.testing.assert_array_equal(one.images[name], other.images[name])
    np.testing.assert_array_equal(env.reset(env.tasks[-1], 12).state.shape, runs[0][0].state.shape)


def test_skipping_the_picture_changes_nothing_else(env: Env) -> None:
    steps = actions(env, 3)
    env.reset(env.tasks[0], 2)
    drawn = [env.step(action) for action in steps]
    env.reset(env.tasks[0], 2)
    blind = [env.step(action, render=False) for action in steps]
    for (one, *rest), (other, *same) in zip(drawn, blind, strict=True):
        assert not other.images and one.images
        np.testing.assert_array_equal(one.state, other.state)
        assert rest == same


def test_the_horizon_cuts_off_and_then_asks_for_a_reset(env: Env) -> None:
    steps = actions(env, 5)
    env.reset(env.tasks[0], 0)
    assert [env.step(action, render=False)[2] for action in steps] == [False] * 4 + [True]
    with pytest.raises(SimulationError, match="reset"):
        env.step(steps[0])


@pytest.mark.parametrize("bad", ["nan", "infinite", "short", "chunk", "text"])
def test_an_action_that_cannot_be_is_refused(env: Env, bad: str) -> None:
    good = actions(env, 1)[0]
    env.reset(env.tasks[0], 0)
    wrong = {
        "nan": good * np.nan,
        "infinite": np.full_like(good, np.inf),
        "short": good[:-1],
        "chunk": np.stack([good, good]),
        "text": np.array(["left"] * len(good)),
    }[bad]
    with pytest.raises(SimulationError, match="action"):
        env.step(wrong)


def test_wrong_names_and_seeds_are_told_what_is_right(env: Env) -> None:
    with pytest.raises(SimulationError, match=f"did you mean '{env.tasks[0]}'"):
        env.reset(env.tasks[0][:-1] + "x", 0)
    with pytest.raises(SimulationError, match="did you mean"):
        env.instruction(env.tasks[0] + "x")
    with pytest.raises(SimulationError, match="negative"):
        env.reset(env.tasks[0], -1)


def test_a_step_before_the_first_reset_is_refused(env: Env) -> None:
    fresh = envs.make(EnvSpec(type(env).__module__, size=8, renderer="auto"))
    with pytest.raises(SimulationError, match="reset"):
        fresh.step(np.zeros(env.embodiment.action.shape, np.float32))
    fresh.close()
    fresh.close()  # twice does no harm


def test_a_vector_of_them_is_a_gymnasium_vector(env: Env) -> None:
    spec = EnvSpec(type(env).__module__, size=24, renderer="auto", horizon=5)
    vector = GymVector([envs.make(spec), envs.make(spec)], [env.tasks[0], env.tasks[-1]])
    first, info = vector.reset(seed=4)
    assert first in vector.observation_space and info["success"].tolist() == [False, False]
    np.testing.assert_array_equal(first["state"][1], env.reset(env.tasks[-1], 5).state)
    vector.action_space.seed(0)
    ends = []
    for _ in range(5):
        seen, rewards, terminated, truncated, info = vector.step(np.clip(vector.action_space.sample(), -1, 1))
        assert seen in vector.observation_space and rewards.shape == (2,)
        ends.append((terminated | truncated).tolist())
    assert ends == [[False, False]] * 4 + [[True, True]]
    still, rewards, _, truncated, _ = vector.step(np.zeros(vector.action_space.shape, np.float32))
    np.testing.assert_array_equal(still["state"], seen["state"])  # no autoreset
    assert not rewards.any() and not truncated.any()
    again, _ = vector.reset(seed=[4, None], options={"reset_mask": np.array([True, False])})
    np.testing.assert_array_equal(again["state"][0], first["state"][0])
    np.testing.assert_array_equal(again["state"][1], seen["state"][1])
    assert len(vector.render()) == 2
    vector.close()


def test_a_vector_refuses_what_does_not_fit(env: Env) -> None:
    one = envs.make(EnvSpec(type(env).__module__, size=8, renderer="auto"))
    other = envs.make(EnvSpec(type(env).__module__, size=16, renderer="auto"))
    for members, tasks, message in (
        ([one], [], "1 environments for 0 tasks"),
        ([one, other], [env.tasks[0]] * 2, "different robots"),
        ([one], ["nothing"], "no task"),
    ):
        with pytest.raises(SimulationError, match=message):
            GymVector(members, tasks)
    vector = GymVector([one], [env.tasks[0]])
    with pytest.raises(SimulationError, match="reset"):
        vector.step(np.zeros((1, *env.embodiment.action.shape)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EnvSpec("metawrld"), "no environment 'metawrld'; did you mean 'metaworld'"),
        (EnvSpec("metaworld", size=1), "size = 1 is too small"),
        (EnvSpec("metaworld", horizon=-1), "horizon = -1"),
        (EnvSpec("nowhere.to.be.found"), "'nowhere.to.be.found': there is no such module"),
        (EnvSpec("json.decoder"), "no function make"),
        (EnvSpec("raycast"), "no environment 'raycast'"),
    ],
)
def test_a_spec_that_names_no_simulation_is_refused(spec: EnvSpec, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        envs.make(spec)


def test_an_environment_without_an_expert_says_so() -> None:
    with pytest.raises(SimulationError, match="no scripted expert"):
        envs.expert("tests.rollout.toy_env")


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("metaworld", "metaworld", "metaworld"), ("pusht", "gym_pusht", "pusht")]
)
def test_a_missing_extra_is_told_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    for loaded in [
        m for m in sys.modules if m == module or m.startswith((module + ".", f"vlafit.envs.{name}"))
    ]:
        monkeypatch.delitem(sys.modules, loaded)

    class Missing:
        def find_spec(self, wanted: str, path: object = None, target: object = None) -> None:
            if wanted.split(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(SimulationError, match=rf"pip install 'vlafit\[{extra}\]'"):
        envs.make(EnvSpec(name))


def test_importing_the_environments_needs_no_simulator_no_torch_and_no_opengl() -> None:
    code = (
        "import sys, os; before = dict(os.environ); "
        "import vlafit.envs, vlafit.envs.experts, vlafit.envs.vector, vlafit.record; "
        "assert dict(os.environ) == before; print(sorted({m.split('.')[0] for m in sys.modules} "
        "& {'torch', 'mujoco', 'metaworld', 'OpenGL', 'gym_pusht'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
