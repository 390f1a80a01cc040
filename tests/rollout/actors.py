"""Actors for the toy environment."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tests.rollout.toy_env import robot
from vlafit.types import ActionChunk, Embodiment, EpisodeKey, Observation


class Obedient:
    """Goes where the sentence says, a little unsteadily; every third seed it does not move at all."""

    def __init__(self, chunk: int = 8) -> None:
        self.chunk = chunk
        self.heard: dict[str, set[str]] = {}  # sentences by task

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        return [self._act(*pair) for pair in zip(observations, keys, strict=True)]

    def _act(self, observation: Observation, key: EpisodeKey) -> ActionChunk:
        self.heard.setdefault(key.task, set()).add(observation.instruction)
        assert observation.images["front"].any(), "an actor that looks was given no picture"
        rng = np.random.default_rng([key.seed, key.replan])
        actions = rng.uniform(-0.5, 0.5, (self.chunk, 2)).astype(np.float32)
        if key.seed % 3:
            actions[:, 0] += 1.0 if "right" in observation.instruction else -1.0
        return ActionChunk(actions)


class Stammering(Obedient):
    """Answers with tokens, and every second answer of an episode whose seed is odd makes no chunk."""

    def _act(self, observation: Observation, key: EpisodeKey) -> ActionChunk:
        chunk = super()._act(observation, key)
        return ActionChunk(chunk.actions, valid=not (key.seed % 2 and key.replan % 2))


class Trained(Obedient):
    """The same, but it says what it was trained on."""

    width = 4

    def __init__(
        self,
        embodiment: Embodiment | None = None,
        identity: str = "weights 1",
        seeds: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        super().__init__()
        self.embodiment = embodiment or robot()
        self.identity = identity
        self.seeds = seeds or {}
        self.widest = 0

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        self.widest = max(self.widest, len(keys))
        return super().act(observations, keys)

    def fingerprint(self) -> str:
        return self.identity


class Interrupting(Obedient):
    """Raises KeyboardInterrupt, as Ctrl-C does, when asked for the n-th time."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().act(observations, keys)


class Saying:
    """Returns the same actions always."""

    def __init__(self, actions: object) -> None:
        self.actions = np.asarray(actions)

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        return [ActionChunk(self.actions) for _ in keys]
