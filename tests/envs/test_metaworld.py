"""Meta-World: seeds decide starts, pictures show the scene, the expert succeeds and chance does not."""

import numpy as np
import pytest

from tests.chance import RandomActor
from tests.variants import variants
from vlafit.envs import EnvSpec, make
from vlafit.envs.experts import ScriptedExpert
from vlafit.envs.sentences import MARKED, SENTENCES
from vlafit.errors import SimulationError
from vlafit.types import Actor, Env, EpisodeKey, Observation

pytest.importorskip("metaworld")
pytestmark = pytest.mark.sim

SPEC = EnvSpec("metaworld", size=32, cameras=("workspace",))


@pytest.fixture(scope="module")
def env() -> Env:
    return make(SPEC)


def same(one: Observation, other: Observation) -> bool:
    return (
        np.array_equal(one.state, other.state)
        and np.array_equal(one.privileged["full_state"], other.privileged["full_state"])
        and one.images.keys() == other.images.keys()
        and all(np.array_equal(one.images[name], other.images[name]) for name in one.images)
    )


def play(env: Env, actor: Actor, task: str, seed: int, steps: int) -> tuple[Observation, bool]:
    observation, succeeded = env.reset(task, seed), False
    for step in range(steps):
        action = actor.act([observation], [EpisodeKey(seed, task, step)])[0].actions[0]
        observation, succeeded, _ = env.step(action, render=step + 1 == steps)
        if succeeded:
            break
    return observation, succeeded


@pytest.mark.parametrize(
    "task",
    variants(["faucet-open-v3", "window-close-v3", "door-close-v3", "reach-v3"], always=["faucet-open-v3"]),
)
def test_a_task_and_a_seed_name_one_start_in_any_environment(env: Env, task: str) -> None:
    fresh = make(SPEC)
    first = fresh.reset(task, 7)
    assert same(first, fresh.reset(task, 7))  # at once again

    play(env, ScriptedExpert(), "drawer-open-v3", 3, 30)  # after another task
    play(env, RandomActor(env.embodiment), task, 8, 60)  # and another episode of this one
    assert same(first, env.reset(task, 7))

    fresh.reset(task, 7)
    one, _ = play(fresh, ScriptedExpert(), task, 7, 20)
    other, _ = play(env, ScriptedExpert(), task, 7, 20)
    assert same(one, other)


def test_the_seed_decides_the_start_whatever_came_before(env: Env) -> None:
    """Meta-World's own gymnasium entry fails both halves of this."""
    task = "button-press-v3"
    forwards = {seed: env.reset(task, seed).privileged["full_state"] for seed in (1000, 1001, 1002)}
    backwards = {seed: env.reset(task, seed).privileged["full_state"] for seed in (1002, 1001, 1000)}
    assert all(np.array_equal(forwards[seed], backwards[seed]) for seed in forwards)
    assert not np.array_equal(forwards[1000], forwards[1001])


def test_held_out_seeds_start_elsewhere_than_recorded_ones(env: Env) -> None:
    task = "faucet-close-v3"
    recorded = {env.reset(task, seed).privileged["full_state"].tobytes() for seed in range(1000, 1020)}
    held_out = {env.reset(task, seed).privileged["full_state"].tobytes() for seed in range(50000, 50020)}
    assert len(recorded) == len(held_out) == 20 and not recorded & held_out


def test_starts_are_those_of_lerobots_construction(env: Env) -> None:
    import metaworld

    task = "door-open-v3"
    theirs = metaworld.MT1(task, seed=42)
    game = theirs.train_classes[task]()
    game.set_task(theirs.train_tasks[0])
    game.reset()
    game._freeze_rand_vec, game.seeded_rand_vec = False, True
    for seed in (0, 5000):
        game.seed(seed)
        expected, _ = game.reset(seed=seed)
        np.testing.assert_array_equal(env.reset(task, seed).privileged["full_state"], expected)


@pytest.mark.parametrize("task", ["window-close-v3", "faucet-open-v3", "dial-turn-v3", "lever-pull-v3"])
def test_the_first_picture_shows_things_where_they_are(env: Env, task: str) -> None:
    """Meta-World shows these tasks' objects at an old place until the first step."""
    first = env.reset(task, 1000)
    after, _, _ = env.step(np.zeros(4, np.float32))
    objects = slice(4, 18)
    np.testing.assert_allclose(
        first.privileged["full_state"][objects], after.privileged["full_state"][objects], atol=1e-3
    )
    changed = np.abs(first.images["workspace"].astype(int) - after.images["workspace"]).max(axis=-1) > 60
    assert changed.mean() < 0.02  # a centimetre of the arm, not an object


def test_every_task_has_a_sentence_of_its_own(env: Env) -> None:
    assert len(env.tasks) == 50 and set(env.tasks) == set(SENTENCES) and set(SENTENCES) >= MARKED
    assert len(set(SENTENCES.values())) == 50
    assert env.instruction("drawer-close-v3") == "close the drawer"
    assert env.reset("drawer-close-v3", 0).instruction == "close the drawer"


@pytest.mark.parametrize(
    "task",
    variants(["button-press-topdown-v3", "coffee-button-v3", "drawer-open-v3"], always=["drawer-open-v3"]),
)
def test_the_expert_succeeds_and_chance_does_not(env: Env, task: str) -> None:
    chance = RandomActor(env.embodiment)
    assert all(play(env, ScriptedExpert(), task, seed, 110)[1] for seed in (5, 6, 7))
    assert not any(play(env, chance, task, seed, 110)[1] for seed in (5, 6, 7))


def test_the_state_is_the_hand_in_metres_and_the_grippers_opening(env: Env) -> None:
    observation = env.reset("reach-v3", 1)
    assert observation.state.shape == (4,) and observation.state.dtype == np.float32
    np.testing.assert_array_equal(
        observation.state, observation.privileged["full_state"][:4].astype(np.float32)
    )
    moved = observation
    for _ in range(20):
        moved, _, _ = env.step(np.array([0, 0, 1, 0], np.float32), render=False)
    assert 0.1 < moved.state[2] - observation.state[2] < 0.2  # a centimetre a step, the hand lagging behind


def test_success_is_kept_and_the_horizon_cuts_the_episode_off() -> None:
    short = make(EnvSpec("metaworld", size=8, horizon=60))
    key, expert = "handle-press-v3", ScriptedExpert()
    observation = short.reset(key, 1000)
    seen = []
    for step in range(60):
        label = expert.act([observation], [EpisodeKey(0, key, step)])[0].actions[0]
        action = np.array([0, 0, 1, 0], np.float32) if seen and seen[-1][0] else label  # leave when done
        observation, succeeded, cut = short.step(action, render=False)
        seen.append((succeeded, cut))
    successes = [succeeded for succeeded, _ in seen]
    assert successes == sorted(successes) and successes[-1]
    assert [cut for _, cut in seen] == [False] * 59 + [True]
    with pytest.raises(SimulationError, match="ended after 60 steps; reset"):
        short.step(np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EnvSpec("metaworld", cameras=("workspce",)), "no camera 'workspce'; did you mean 'workspace'"),
        (EnvSpec("metaworld", cameras=("wrist", "wrist")), "cameras: .*twice: wrist, wrist"),
        (EnvSpec("metaworld", horizon=501), "end after 500 steps"),
    ],
)
def test_what_meta_world_cannot_do_is_said(spec: EnvSpec, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        make(spec)


def test_two_cameras_give_two_pictures_named_as_asked(env: Env) -> None:
    two = make(EnvSpec("metaworld", size=16, cameras=("corner2", "wrist")))
    images = two.reset("reach-v3", 0).images
    assert list(images) == ["corner2", "wrist"]
    assert not np.array_equal(images["corner2"], images["wrist"])
    after, _, _ = two.step(np.array([1, 0, 0, 0], np.float32))
    assert after.images["wrist"].shape == (16, 16, 3)
