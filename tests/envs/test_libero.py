"""LIBERO's own scenes, initial states and pictures, set again at every reset."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("libero", reason="needs the extra libero (pip install 'vlafit[libero]')")

from tests.rollout.libero_like import LiberoLike
from vlafit.envs import EnvSpec, LiberoSpec, Perturbation, make
from vlafit.envs.experts_libero import LiberoExpert
from vlafit.envs.libero import PERTURBED_SUITES, SUITES, Libero, _require_another_start
from vlafit.errors import SimulationError
from vlafit.types import EpisodeKey

pytestmark = pytest.mark.sim

STILL = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)  # opens the gripper


@pytest.fixture(scope="module")
def env() -> Iterator[Libero]:
    made = make(EnvSpec("libero", size=64, renderer="egl"))
    assert isinstance(made, Libero)
    try:
        made.reset(made.tasks[0], 0)
    except SimulationError as error:
        assert "apt-get install" in str(error)
        pytest.skip("no EGL here")
    yield made
    made.close()


STARTS = {
    (0, 50): False, (45, 55): True, (60, 70): True, (990, 1010): True, (1000, 1100): False,
    (2**32 - 1, 2**32): False, (2**32 - 1, 2**32 + 1): True,
}  # fmt: skip
"""First seed, end -> whether one of the seeds is no start."""


def test_the_stand_in_of_other_tests_has_this_robot_and_actions_its_range(env: Libero) -> None:
    like = LiberoLike(EnvSpec("tests.rollout.libero_like", size=64)).embodiment
    assert like == env.embodiment
    low, high = env._scene.env.action_spec
    np.testing.assert_array_equal([low, high], [env.embodiment.action.low, env.embodiment.action.high])


def test_the_official_tasks_have_sentences_and_fifty_initial_states(env: Libero) -> None:
    assert len([task for task in env.tasks if "-" not in task]) == 130 and len(SUITES) == 5
    assert env.instruction(env.tasks[0]) == (
        "pick up the black bowl between the plate and the ramekin and place it on the plate"
    )
    assert all(len(env._simulator.initial_states(task)) == 50 for task in env.tasks)
    with pytest.raises(SimulationError, match="initial state 50.*LIBERO.* 0 to 49.*first_seed"):
        env.reset(env.tasks[0], 50)
    said = {seeds: env.missing_start(env.tasks[0], range(*seeds)) for seeds in STARTS}
    assert {seeds: bool(missing) for seeds, missing in said.items()} == STARTS
    assert "no initial state 50" in said[45, 55] and "no initial state 60" in said[60, 70]


def test_the_suites_of_libero_pro_keep_the_tasks_and_change_sentences_or_goals(env: Libero) -> None:
    assert len(PERTURBED_SUITES) == 16
    for suite in PERTURBED_SUITES:
        variants = [task for task in env.tasks if task.startswith(f"{suite}-")]
        assert len(variants) == 10
        plain = [task.removeprefix(f"{suite}-") for task in variants]
        same = [env.instruction(a) == env.instruction(b) for a, b in zip(variants, plain, strict=True)]
        assert not any(same) or not suite.endswith(("_lan", "_task"))
    changed = "libero_object_task-pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    seen = env.reset(changed, 49)
    assert seen.instruction == "pick the cream cheese and place it in the basket"
    assert env._scene.env.parsed_problem["goal_state"] == [
        ["in", "cream_cheese_1", "basket_1_contain_region"]
    ]
    start = env._simulator.initial_states(changed)[49]
    np.testing.assert_array_equal(seen.privileged["full_state"][1:], start[1:])
    with pytest.raises(SimulationError, match=f"no task '{changed[:-1]}'; did you mean '{changed}'"):
        env.instruction(changed[:-1])


def test_an_episode_starts_alike_whatever_came_before_also_its_fixtures(env: Libero) -> None:
    task = next(task for task in env.tasks if "stove" in task)

    def start(seed: int) -> tuple[np.ndarray, np.ndarray, bytes]:
        seen = env.reset(task, seed)
        bodies = env._model.body_pos.copy()  # where the fixtures are; no initial state holds them
        return seen.privileged["full_state"], bodies, seen.images["agentview"].tobytes()

    first = start(3)
    other = start(4)
    for _ in range(3):
        env.step(STILL, render=False)
    again = start(3)
    assert all(np.array_equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))
    assert first[2] == again[2]
    assert not np.array_equal(first[0], other[0])
    moved = make(EnvSpec("libero", size=8, renderer="egl", libero=LiberoSpec(env_seed=8)))
    assert isinstance(moved, Libero)
    moved.reset(task, 3)
    assert not np.array_equal(moved._model.body_pos, first[1])  # so the seed belongs to the protocol
    moved.close()


def test_a_microwave_stands_where_task_and_seed_say_however_often_it_was_reset(env: Libero) -> None:
    task = "KITCHEN_SCENE6_put_the_yellow_and_white_mug_in_the_microwave_and_close_it"
    places = []
    for _ in range(3):
        env.reset(task, 1, render=False)
        places.append(env._model.body("microwave_1_main").pos.tolist())
    assert places[0] == places[1] == places[2]


def test_seeds_from_1000_on_are_starts_of_the_tasks_regions_and_never_official_ones(env: Libero) -> None:
    task = env.tasks[10]
    states = env._simulator.initial_states(task)
    first, other = (env.reset(task, seed).privileged["full_state"] for seed in (1000, 1001))
    assert not np.array_equal(first[1:], other[1:])
    assert min(np.abs(states[:, 1:] - start[1:]).max(axis=1).min() for start in (first, other)) > 1e-4
    np.testing.assert_array_equal(env.reset(task, 1000).privileged["full_state"], first)
    with pytest.raises(
        SimulationError, match=f"task '{task}': the start sampled with seed 7 is the official"
    ):
        _require_another_start(states[3], states, task, 7)


def test_a_goal_on_a_region_of_the_table_can_be_reset_too(env: Libero) -> None:
    seen = env.reset("push_the_plate_to_the_front_of_the_stove", 0)
    np.testing.assert_allclose(seen.privileged["rim"], seen.privileged["place"][2:])
    assert not env.step(STILL, render=False)[1]


@pytest.mark.slow
@pytest.mark.parametrize("suite", (*SUITES, *PERTURBED_SUITES))
def test_a_task_of_every_suite_is_reset_stepped_and_opened_again(env: Libero, suite: str) -> None:
    tasks = [name for name, task in env._simulator.tasks.items() if task.problem_folder == suite]
    task = tasks[len(suite) % len(tasks)]  # another position in most suites
    first = env.reset(task, 7)
    moved = env.step(STILL)[0]
    again = env.reset(task, 7)
    assert first.instruction == env.instruction(task) and first.images["agentview"].std() > 5
    assert not np.array_equal(moved.privileged["full_state"], first.privileged["full_state"])
    np.testing.assert_array_equal(again.privileged["full_state"], first.privileged["full_state"])


def test_robosuites_own_errors_end_a_reset_which_liberos_wrapper_repeats_for_ever(
    env: Libero, monkeypatch: pytest.MonkeyPatch
) -> None:
    env.reset(env.tasks[0], 0)

    def broken() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(env._scene.env, "reset", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        env.reset(env.tasks[0], 1)


def test_pictures_are_robosuites_own_turned_by_half(env: Libero, monkeypatch: pytest.MonkeyPatch) -> None:
    import robosuite.utils.binding_utils as binding
    from robosuite.renderers.context.egl_context import EGLGLContext

    env.reset(env.tasks[0], 0)
    for _ in range(3):
        seen, _, _ = env.step(STILL)
    env._close_renderer()
    monkeypatch.setattr(binding, "GLContext", EGLGLContext, raising=False)
    simulation = env._scene.sim
    context = binding.MjRenderContextOffscreen(simulation, device_id=-1)
    context.vopt.geomgroup[0], context.vopt.geomgroup[1] = 0, 1
    for ours, theirs in (("agentview", "agentview"), ("wrist", "robot0_eye_in_hand")):
        frame = simulation.render(64, 64, camera_name=theirs)[::-1, ::-1]
        assert np.abs(frame.astype(int) - seen.images[ours]).mean() < 4


def test_robosuites_renderer_draws_what_ours_does_and_leaves_the_episode_alone(env: Libero) -> None:
    task, drawn, states = env.tasks[0], {}, {}
    for renderer in ("egl", "robosuite"):
        one = make(EnvSpec("libero", size=128, renderer=renderer))  # at 64, multisampled edges weigh more
        for render in (True, False):  # drawn from the start, or at the last step only
            one.reset(task, 0, render=render)
            for last in (False, False, True):
                seen, _, _ = one.step(STILL, render=render or last)
            drawn[renderer, render] = {name: one.astype(int) for name, one in seen.images.items()}
            states[renderer, render] = seen.privileged["full_state"]
        assert one.embodiment.renderer.partition("-")[0] == renderer
        one.close()
        env.reset(task, 1)  # another renderer of the process still draws
    for camera in ("agentview", "wrist"):
        ours, theirs = drawn["egl", True][camera], drawn["robosuite", True][camera]
        assert ours.shape == theirs.shape and 0 < np.abs(theirs - ours).mean() < 4
        np.testing.assert_array_equal(drawn["robosuite", False][camera], theirs)
    for state in states.values():
        np.testing.assert_array_equal(state, states["egl", True])


@pytest.mark.parametrize(
    ("renderer", "other"), [("egl", "osmesa"), ("osmesa", "egl"), ("robosuite", "osmesa")]
)
def test_without_a_library_another_renderer_of_libero_is_advised_never_rays(
    env: Libero, monkeypatch: pytest.MonkeyPatch, renderer: str, other: str
) -> None:
    import vlafit.envs.gl as gl

    def broken(name: str) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    env.reset(env.tasks[0], 0, render=False)
    monkeypatch.setattr(env, "_renderer_name", renderer)
    with monkeypatch.context() as patch:
        patch.setattr(gl.importlib, "import_module", broken)
        with pytest.raises(SimulationError, match=f"renderer '{renderer}' does not work") as caught:
            env._make_renderer()
    message = str(caught.value)
    assert f'renderer = "{other}"' in message and "apt-get install" in message and "ray" not in message


def test_a_camera_of_robosuites_renderer_is_not_perturbed() -> None:
    spec = EnvSpec("libero", renderer="robosuite", perturb=Perturbation(camera_m=0.1))
    with pytest.raises(SimulationError, match="env.perturb.*robosuite.*camera_m.*egl"):
        make(spec)


def test_the_state_is_that_of_the_published_data_and_minus_one_opens_the_gripper(env: Libero) -> None:
    seen = env.reset(env.tasks[0], 0)
    low = env._scene.env._get_observations()
    np.testing.assert_allclose(seen.state[:3], low["robot0_eef_pos"], atol=1e-6)
    np.testing.assert_allclose(seen.state[6:], low["robot0_gripper_qpos"], atol=1e-6)
    shut = STILL.copy()
    shut[6] = 1
    widths = []
    for action in (shut, STILL):
        for _ in range(8):
            seen, success, _ = env.step(action, render=False)
        widths.append(seen.state[6] - seen.state[7])
        assert not seen.images and success is False
    assert widths[0] < widths[1]


def test_a_binary_gripper_only_looks_at_the_sign(env: Libero) -> None:
    binary = make(EnvSpec("libero", size=8, renderer="egl", libero=LiberoSpec(gripper="binary")))
    half = STILL.copy()
    half[6] = 0.3
    states = []
    for one, action in ((binary, half), (env, STILL * [0, 0, 0, 0, 0, 0, -1])):
        one.reset(env.tasks[0], 0)
        states.append(one.step(action.astype(np.float32), render=False)[0].state)
    np.testing.assert_array_equal(*states)
    binary.close()


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        (EnvSpec("libero"), 'needs OpenGL.*"egl".*apt-get install'),
        (EnvSpec("libero", renderer="egl", cameras=("wirst",)), "no camera 'wirst'; did you mean 'wrist'"),
    ],
)
def test_what_libero_cannot_do_is_refused(spec: EnvSpec, facts: str) -> None:
    with pytest.raises(SimulationError, match=facts):
        make(spec)


def test_a_dark_scene_is_darker(env: Libero) -> None:
    dark = make(EnvSpec("libero", size=64, renderer="egl", perturb=Perturbation(light=0.9)))
    usual = env.reset(env.tasks[0], 1).images["agentview"].mean()
    assert abs(dark.reset(env.tasks[0], 1).images["agentview"].mean() - usual) > 3
    dark.close()


def test_importing_it_leaves_the_environment_variables_alone(env: Libero) -> None:
    assert os.environ.get("MUJOCO_GL") != "glx"


def test_the_expert_turns_the_stove_on_by_its_own_actions(env: Libero) -> None:
    expert, task = LiberoExpert(), "turn_on_the_stove"
    seen, success, step = env.reset(task, 1000, render=False), False, 0
    near, far = seen.privileged["joint_goal"]
    assert seen.privileged["joint"] < near < far
    while not success and step < 300:
        action = expert.act([seen], [EpisodeKey(1000, task, step)])[0].actions[0]
        seen, success, _ = env.step(action, render=False)
        step += 1
    assert success and near <= seen.privileged["joint"] <= far


def test_parts_are_told_of_tasks_with_one_drawer_to_open_and_not_of_others(env: Libero) -> None:
    seen = env.reset("open_the_middle_drawer_of_the_cabinet", 1000, render=False).privileged
    np.testing.assert_allclose(np.abs(seen["joint_axis"]), [0, 1, 0], atol=1e-2)
    np.testing.assert_allclose(seen["joint_goal"], [-0.14, -0.16])
    assert seen["part"][:, 1].max() > seen["joint_anchor"][1] + 0.1  # the handle stands out to +y
    for task in ("open_the_top_drawer_and_put_the_bowl_inside", "KITCHEN_SCENE7_open_the_microwave"):
        facts = env.reset(task, 1000, render=False).privileged
        assert "part" not in facts and "grasped" not in facts
