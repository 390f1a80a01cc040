"""PushT's expert pushes the block onto its outline and goes around it; its episodes can be recorded."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shapely.geometry import LineString

from vlafit import envs
from vlafit.datasets import load_card, open_dataset
from vlafit.envs import EnvSpec
from vlafit.record import record
from vlafit.record.replay import replay, spec_of
from vlafit.types import Env, EpisodeKey, Observation

pytestmark = pytest.mark.sim
pytest.importorskip("gym_pusht")

from vlafit.envs import experts_pusht as expert  # noqa: E402  # needs gym_pusht

TASK = "push-t"


def test_the_expert_covers_the_outline() -> None:
    seed = 1003
    env = envs.make(EnvSpec("pusht", size=8, cameras=("top",)))
    actor, observation = envs.expert("pusht"), env.reset(TASK, seed)
    success = over = False
    for step in range(300):
        (chunk,) = actor.act([observation], [EpisodeKey(seed, TASK, step)])
        observation, success, over = env.step(chunk.actions[0], render=False)
        if success or over:
            break
    env.close()
    assert success


def test_a_push_in_the_copy_is_what_the_simulation_does() -> None:
    env = envs.make(EnvSpec("pusht", size=8, cameras=("top",)))
    block = tuple(float(value) for value in env.reset(TASK, 1000).privileged["full_state"][2:])
    begin, move = np.array([block[0] - 100, block[1]]), np.array([8.0, 0.0])
    simulation = env._simulation  # type: ignore[attr-defined]
    simulation.agent.position = tuple(begin)
    simulation.space.reindex_shapes_for_body(simulation.agent)
    for step, pose in enumerate(expert.Copy().push(begin, block, move, 12), 1):
        observation, *_ = env.step((begin + step * move).astype(np.float32), render=False)
        x, y, angle = observation.privileged["full_state"][2:]
        assert expert.apart(pose, (x, y, angle)) < 1e-3  # a thousandth of a pixel: actions are float32
    env.close()
    assert expert.apart(pose, block) > 1  # it was pushed


def test_the_way_goes_around_the_block() -> None:
    block = (256.0, 256.0, 0.3)
    ends = np.array([100.0, 290.0]), np.array([420.0, 300.0])
    way = expert.way(*ends, block)
    line = LineString([ends[0], *way])
    assert np.array_equal(way[-1], ends[1]) and line.length < 600
    assert line.distance(expert.outline(block)) > expert.RADIUS
    assert not LineString(ends).distance(expert.outline(block))  # straight would be through it


def test_normals_point_into_the_block() -> None:
    block = (200.0, 300.0, 2.0)
    for point, normal in expert.edge_points(block):
        assert math.isclose(np.linalg.norm(normal), 1)
        assert expert.outline(block).contains(LineString([point, point + 5 * normal]).centroid)
        assert not expert.outline(block).contains(LineString([point, point - 5 * normal]).centroid)


def test_a_disturbed_recording_is_replayed_bit_for_bit_and_its_actions_are_targets_on_the_board(
    tmp_path: Path,
) -> None:
    card = load_card("pusht-planned")
    assert card.record is not None
    spec = replace(card.record, episodes_per_task=1, first_seed=1003, perturbed=1.0, noise=3.0)
    card = replace(card, path=str(tmp_path), record=spec)
    report = record(card, tmp_path)
    store = open_dataset(card)
    actions = store.actions(0)
    assert report.files[0].skipped == () and actions.shape[1] == 2
    assert actions.min() >= 0 and 50 < actions.max() <= 512
    env = envs.make(spec_of(store.card))
    (episode,) = replay(store, env, (0,))
    env.close()
    assert episode.success and episode.reproduced and episode.furthest == 0


def test_keypoints_follow_the_disc_s_position_and_are_the_block_s_corners(tmp_path: Path) -> None:
    env = envs.make(EnvSpec("pusht_keypoints", size=8, cameras=("top",)))
    plain = envs.make(EnvSpec("pusht", size=8, cameras=("top",)))
    for told, seen in zip(walk(env), walk(plain), strict=True):
        assert told.state.shape == (18,) and np.array_equal(told.state[:2], seen.state)
        assert np.array_equal(told.images["top"], seen.images["top"])
        x, y, angle = told.privileged["full_state"][2:]
        corners = expert.world(np.array([*expert.BAR, *expert.STEM]), (x, y, angle))
        for place in told.state[2:].reshape(8, 2):  # in gym-pusht's order, which is another
            assert np.linalg.norm(corners - place, axis=1).min() < 1e-3
    card = load_card("pusht-keypoints-planned")
    assert card.record is not None
    spec = replace(card.record, episodes_per_task=1, first_seed=1003)
    card = replace(card, path=str(tmp_path), record=spec)
    record(card, tmp_path)
    store = open_dataset(card)
    (episode,) = replay(store, env, (0,))
    env.close()
    assert store.state(0).shape[1] == 18 and episode.success and episode.reproduced


def walk(env: Env) -> list[Observation]:
    """Return the observations of a start and of some steps towards the block."""
    first = env.reset(TASK, 1003)
    there = first.privileged["full_state"][2:4].astype(np.float32)
    return [first, *(env.step(there)[0] for _ in range(15))]
