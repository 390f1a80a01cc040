"""Offer simulations as a gymnasium.vector.VectorEnv for gymnasium tools. Evaluation does not use it.

There is no autoreset: after its episode has ended, an environment keeps its state with reward 0 until reset.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from vlafit.errors import SimulationError
from vlafit.types import Embodiment, Env, Observation

MAX_INSTRUCTION = 512  # characters


class GymVector(VectorEnv):
    """Several `vlafit.types.Env` of one robot, each with its own task, stepped one after another.

    An observation is {"images": {camera: uint8 [n, h, w, 3]}, "state": float32 [n, s], "instruction": n
    strings}. The reward is 1 in the step that first succeeds, which also terminates. `info["success"]` is
    bool [n]. `envs` are closed with it; that they can share a process is what `vlafit.envs.sharing` checks.
    Raises SimulationError for robots that differ or missing tasks.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "autoreset_mode": AutoresetMode.DISABLED,
        "render_modes": ["rgb_array"],
    }

    def __init__(self, envs: Sequence[Env], tasks: Sequence[str]) -> None:
        if not envs or len(envs) != len(tasks):
            raise SimulationError(f"{len(envs)} environments for {len(tasks)} tasks; give one task for each")
        robot = envs[0].embodiment
        if any(env.embodiment != robot for env in envs):
            raise SimulationError("the environments have different robots; use one GymVector for each robot")
        for env, task in zip(envs, tasks, strict=True):
            env.instruction(task)  # raises for an unknown task
        self._envs, self._tasks = tuple(envs), tuple(tasks)
        self.num_envs = len(envs)
        self.single_observation_space, self.single_action_space = spaces(robot)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.render_mode = "rgb_array"
        self._last: list[Observation] = []
        self._over = np.ones(self.num_envs, bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reset all environments, or those in options["reset_mask"] (bool [n]). Seed k means k, k+1, ..."""
        mask = np.ones(self.num_envs, bool)
        if options and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"], bool)
            if mask.shape != (self.num_envs,):
                raise SimulationError(f"reset_mask must be bool [{self.num_envs}], got shape {mask.shape}")
            if not self._last and not mask.all():
                raise SimulationError("the first reset must reset every environment; leave reset_mask out")
        if isinstance(seed, (int, np.integer)):
            self._np_random, self._np_random_seed = seeding.np_random(int(seed))
            seeds: list[int | None] = [int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = [None] * self.num_envs if seed is None else list(seed)
        if len(seeds) != self.num_envs:
            raise SimulationError(f"{len(seeds)} seeds for {self.num_envs} environments")
        last: list[Observation | None] = [*self._last] or [None] * self.num_envs
        for i in np.flatnonzero(mask):
            number = seeds[i]
            if number is None:
                number = int(self.np_random.integers(2**31))
            last[i] = self._envs[i].reset(self._tasks[i], number)
        self._last = [observation for observation in last if observation is not None]
        self._over[mask] = False
        return self._stack(), {"success": np.zeros(self.num_envs, bool)}

    def step(
        self, actions: NDArray[np.float32]
    ) -> tuple[dict[str, Any], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Apply actions [n, a] to the environments whose episode has not ended."""
        if not self._last:
            raise SimulationError("reset() must come before step()")
        if len(actions) != self.num_envs:
            raise SimulationError(f"{len(actions)} actions for {self.num_envs} environments")
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for i in np.flatnonzero(~self._over):
            self._last[i], succeeded, cut = self._envs[i].step(actions[i])
            rewards[i], terminated[i], truncated[i] = float(succeeded), succeeded, cut and not succeeded
        self._over |= terminated | truncated
        return self._stack(), rewards, terminated, truncated, {"success": terminated.copy()}

    def render(self) -> tuple[NDArray[np.uint8], ...]:
        """Return the last image of each environment's first camera."""
        return tuple(next(iter(observation.images.values())) for observation in self._last)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    def _stack(self) -> dict[str, Any]:
        cameras = self._last[0].images
        return {
            "images": {name: np.stack([o.images[name] for o in self._last]) for name in cameras},
            "state": np.stack([o.state for o in self._last]),
            "instruction": tuple(o.instruction for o in self._last),
        }


def spaces(robot: Embodiment) -> tuple[gymnasium.spaces.Dict, gymnasium.spaces.Box]:
    """Return the observation and action space of one environment with this robot.

    Delta actions are bounded by [-1, 1]; others have no bounds.
    """
    box, bound = gymnasium.spaces.Box, 1.0 if robot.control.startswith("delta") else np.inf
    letters = frozenset(map(chr, range(32, 127)))
    observation = gymnasium.spaces.Dict(
        {
            "images": gymnasium.spaces.Dict({c.name: box(0, 255, c.shape, np.uint8) for c in robot.cameras}),
            "state": box(-np.inf, np.inf, robot.state.shape, np.float32),
            "instruction": gymnasium.spaces.Text(MAX_INSTRUCTION, charset=letters),
        }
    )
    return observation, box(-bound, bound, robot.action.shape, np.float32)
