"""A policy that reads earlier steps sees in closed loop what it learned from: the same steps and padding."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.rollout.actors import Obedient
from tests.rollout.toy_env import ToyEnv, make, robot
from vlafit.codec import Codec, CodecConfig
from vlafit.datasets.store import EpisodeInfo, EpisodeStore
from vlafit.envs import EnvSpec
from vlafit.execution import Execution
from vlafit.rollout import Protocol, evaluate
from vlafit.serve.control import Controller
from vlafit.types import ActionChunk, Embodiment, EpisodeKey, Observation

HISTORY, REPLAN = 4, 2  # more steps than are executed between two calls, so they come from several commands


class Remembering(Obedient):
    """Keeps every observation that it is given, and the actions that it answered with."""

    history = HISTORY

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[Observation]] = {}
        self.answers: dict[int, list[NDArray[np.float32]]] = {}

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        chunks = super().act(observations, keys)
        for observation, key, chunk in zip(observations, keys, chunks, strict=True):
            self.seen.setdefault(key.seed, []).append(observation)
            self.answers.setdefault(key.seed, []).append(chunk.actions[:REPLAN])
        return chunks


class Recorded(EpisodeStore):
    """One episode of the toy environment, as a dataset would hold it."""

    def __init__(self, steps: list[Observation]) -> None:
        self.steps = steps
        self.episodes = (EpisodeInfo("0", "left", steps[0].instruction, len(steps)),)

    @property
    def embodiment(self) -> Embodiment:
        return robot()

    @property
    def card(self):  # type: ignore[override, no-untyped-def]
        class Card:
            name = "recorded"

        return Card

    def state(self, episode: int) -> NDArray[np.float32]:
        return np.stack([step.state for step in self.steps])

    def actions(self, episode: int) -> NDArray[np.float32]:
        return np.zeros((len(self.steps), 2), np.float32)

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        return self.steps[step].images[camera]


def replay(task: str, seed: int, actions: Sequence[NDArray[np.float32]]) -> Recorded:
    env: ToyEnv = make(EnvSpec("tests.rollout.toy_env", size=16))
    steps = [env.reset(task, seed)]
    for action in np.concatenate(actions):
        steps.append(env.step(action)[0])
    return Recorded(steps)


def codec() -> Codec:
    settings = CodecConfig(("front",), 16, 2, 2, REPLAN, prompt=None, history=HISTORY, max_tokens=0)
    spread = np.random.default_rng(0).normal(size=(64, 2))
    return Codec.fit(settings, robot(), spread, spread, None)


def assert_as_in_training(seen: Sequence[Observation], recorded: Recorded) -> None:
    made = codec()
    for call, observation in enumerate(seen):
        step = call * REPLAN
        assert len(observation.past) == min(HISTORY - 1, step)
        sample = recorded.sample(0, step, REPLAN, HISTORY)
        learned = made.encode(replace(sample.observation, instruction=observation.instruction))
        played = made.encode(observation)
        for name in ("images", "image_mask", "state", "history_mask"):
            np.testing.assert_array_equal(getattr(played, name), getattr(learned, name))


def test_the_history_of_a_rollout_is_that_of_the_dataset(
    protocol: Callable[..., Protocol], tmp_path: Path
) -> None:
    actor = Remembering()
    two = protocol("left", trials=3, replan=REPLAN)
    evaluate(actor, two, tmp_path, workers=1, videos=0)
    assert len(actor.seen[102]) == 10  # it stands still, until the horizon of 20 steps
    for seed, seen in actor.seen.items():
        assert_as_in_training(seen, replay("left", seed, actor.answers[seed]))


def test_the_control_loop_of_a_robot_fills_the_history_too() -> None:
    actor = Remembering()
    with Controller(actor, Execution(replan=REPLAN), embodiment=robot()) as control:
        for seed in (102, 105):  # the second takes nothing from the first
            env = make(EnvSpec("tests.rollout.toy_env", size=16))
            observation = env.reset("left", seed)
            control.start(observation.instruction, seed=seed)
            for _ in range(8):
                observation, _, _ = env.step(control.step(observation.images, observation.state))
            assert_as_in_training(actor.seen[seed], replay("left", seed, actor.answers[seed]))
