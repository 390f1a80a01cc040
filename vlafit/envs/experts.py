"""Meta-World's scripted experts as actors."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlafit.errors import SimulationError, did_you_mean
from vlafit.types import ActionChunk, EpisodeKey, Observation


class ScriptedExpert:
    """Meta-World's scripted policies. They read `privileged["full_state"]`; a chunk is one action [1, 4]."""

    def __init__(self) -> None:
        self._policies: dict[str, Any] = {}

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        """Return one action for each observation, clipped to [-1, 1]."""
        return [self._act(observation, key) for observation, key in zip(observations, keys, strict=True)]

    def _act(self, observation: Observation, key: EpisodeKey) -> ActionChunk:
        if "full_state" not in observation.privileged:
            raise SimulationError(f"task {key.task!r}: the scripted expert needs the simulator's full state")
        if key.task not in self._policies:
            from metaworld.policies import ENV_POLICY_MAP

            if key.task not in ENV_POLICY_MAP:
                raise SimulationError(
                    f"no scripted expert for task {key.task!r}{did_you_mean(key.task, ENV_POLICY_MAP)}"
                )
            self._policies[key.task] = ENV_POLICY_MAP[key.task]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large gains, which the clipping below makes harmless
            action = self._policies[key.task].get_action(observation.privileged["full_state"])
        return ActionChunk(np.clip(np.asarray(action), -1, 1).astype(np.float32)[None])
