"""PushT (gym-pusht): a disc pushes a T-shaped block onto its outline. One task; its expert plans."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from gym_pusht.envs.pusht import PushTEnv
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.envs.checks import check_action
from vlafit.envs.experts_pusht import PushTExpert
from vlafit.errors import SimulationError, did_you_mean
from vlafit.types import NOTHING, Embodiment, Feature, Observation

SHARES_PROCESS = True  # several environments in one process draw what each draws alone
TASK = "push-t"
SENTENCE = "push the T-shaped block onto the green T"
CAMERA = "top"
HZ = 10.0  # gym-pusht's control rate
HORIZON = 300  # gym-pusht's registered limit
BOARD = 512  # width and height of the board in its own pixels, independent of the image size


class PushT:
    """gym-pusht as a `vlafit.types.Env`.

    The state is the disc's position and an action its target position, both [2] in pixels of the board
    (0..512). Success is gym-pusht's: 95 % of the outline covered.
    """

    STATE = Feature("state", (2,), "px", ("x", "y"))

    def __init__(self, spec: EnvSpec) -> None:
        for camera in spec.cameras:
            if camera != CAMERA:
                raise SimulationError(f"PushT has no camera {camera!r}{did_you_mean(camera, [CAMERA])}")
        if spec.renderer not in ("auto", "ray"):
            raise SimulationError(
                f'PushT has its own renderer; leave renderer = "ray" instead of {spec.renderer!r}'
            )
        self.tasks = (TASK,)
        self.versions: Mapping[str, str] = {
            name: version(name) for name in ("gym-pusht", "pymunk", "pygame", "numpy", "gymnasium")
        }
        self.embodiment = Embodiment(
            name="pusht",
            cameras=(Feature(CAMERA, (spec.size, spec.size, 3)),),
            state=self.STATE,
            action=Feature("action", (2,), "px", ("x", "y")),
            hz=HZ,
            control="absolute_position",
            renderer="pygame",
        )
        self._horizon = spec.horizon or HORIZON
        self._simulation: Any = PushTEnv(
            obs_type="state", observation_width=spec.size, observation_height=spec.size
        )
        self._steps = -1  # before the first reset
        self._succeeded = False

    def instruction(self, task: str) -> str:
        """Return the instruction."""
        _require(task)
        return SENTENCE

    def reset(self, task: str, seed: int) -> Observation:
        """Start an episode; the same seed gives the same start, bit for bit."""
        _require(task)
        if seed < 0:
            raise SimulationError(f"task {task!r}: seed {seed} is negative; seeds are 0 or greater")
        full_state, _ = self._simulation.reset(seed=int(seed))
        self._steps, self._succeeded = 0, False
        return self._observe(full_state, render=True)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        """Apply one action [2]; return the observation, success so far, whether the episode is truncated."""
        if self._steps < 0:
            raise SimulationError("PushT: reset(task, seed) must come before step")
        if self._steps >= self._horizon:
            raise SimulationError(f"PushT: the episode ended after {self._horizon} steps; reset it first")
        target = np.clip(check_action(action, 2, "PushT"), 0, BOARD).astype(np.float64)
        full_state, _, _, _, info = self._simulation.step(target)
        self._steps += 1
        self._succeeded = self._succeeded or bool(info["is_success"])
        return self._observe(full_state, render=render), self._succeeded, self._steps >= self._horizon

    def close(self) -> None:
        """Free the simulation."""
        self._simulation.close()
        self._steps = -1

    def _observe(self, full_state: NDArray[np.float64], *, render: bool) -> Observation:
        images = {CAMERA: np.ascontiguousarray(self._simulation._render())} if render else NOTHING
        return Observation(
            images=images,
            state=self._state(full_state),
            instruction=SENTENCE,
            privileged={"full_state": np.array(full_state, np.float64)},
        )

    def _state(self, full_state: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the state of the observation, as `STATE` describes it."""
        return full_state[:2].astype(np.float32)


def make(spec: EnvSpec) -> PushT:
    """Create PushT as `spec` describes."""
    return PushT(spec)


def make_expert() -> PushTExpert:
    """Create the expert that plans pushes."""
    return PushTExpert()


def _require(task: str) -> None:
    if task != TASK:
        raise SimulationError(f"PushT has no task {task!r}{did_you_mean(task, [TASK])}")
