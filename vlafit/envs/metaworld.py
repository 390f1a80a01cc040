"""The 50 tasks of Meta-World v3 (a Sawyer arm over a table), with starts that the seed decides.

Meta-World's gymnasium entry ignores the seed of `reset`; here each start is drawn from a generator seeded for
that episode, the way LeRobot builds its environment, so (task, seed) names one start in every process. The
package has no instructions: ours are in `sentences`. It has no camera that shows closely all that the hand
does: `workspace` is ours. Meta-World's markers are drawn only in tasks whose goal is nothing else; elsewhere
they would tell two tasks of one scene apart, which is the instruction's part.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is compiled and names nothing to type checkers)

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.envs.checks import check_action
from vlafit.envs.experts import ScriptedExpert
from vlafit.envs.raycast import Raycaster
from vlafit.envs.sentences import MARKED, SENTENCES
from vlafit.envs.view import View, from_quaternion, look_at
from vlafit.errors import SimulationError, did_you_mean
from vlafit.types import NOTHING, Embodiment, Feature, Observation

HZ = 80.0  # Meta-World: 5 physics steps of 2.5 ms each
LONGEST = 500  # steps; Meta-World refuses to go on after these
UPRIGHT = np.diag([-1.0, -1.0, 1.0])  # half a turn: Meta-World's corner2 hangs upside down
WORKSPACE_FROM, WORKSPACE_TO = (
    (0.78, 0.07, 0.90),
    (0.08, 0.70, 0.16),
)  # metres; fills the picture with what the experts touch
FIXED = {
    # LeRobot's corner2: the model's direction, moved nearer, and turned to stand upright for a person
    "corner2": View(
        np.array([0.75, 0.075, 0.7]),
        from_quaternion((-0.39503823, 0.26266734, -0.43493704, 0.76536295)) @ UPRIGHT,
        60.0,
        fixed=True,
    ),
    "workspace": View(np.array(WORKSPACE_FROM), look_at(WORKSPACE_FROM, WORKSPACE_TO), 36.0, fixed=True),
}
WRIST = {"wrist": "gripperPOV"}  # our name for a camera of the model
MODEL_CAMERAS = ("topview", "corner", "corner3", "corner4", "behindGripper", "gripperPOV")
CAMERAS = (*FIXED, *WRIST, *MODEL_CAMERAS)


class MetaWorld:
    """All 50 tasks behind `vlafit.types.Env`.

    The state is the hand's x, y, z in metres and the gripper's opening in 0..1; an action is the hand's
    displacement and the gripper's effort, each in [-1, 1] (1 moves the target of the hand by 1 cm a step).
    `privileged["full_state"]` is Meta-World's own observation, float64 [39], for the scripted experts.
    """

    def __init__(self, spec: EnvSpec) -> None:
        cameras = spec.cameras or ("corner2",)
        for camera in cameras:
            if camera not in CAMERAS:
                raise SimulationError(f"Meta-World has no camera {camera!r}{did_you_mean(camera, CAMERAS)}")
        if len(set(cameras)) != len(cameras):
            raise SimulationError(f"a camera is named twice: {', '.join(cameras)}")
        if spec.horizon > LONGEST:
            raise SimulationError(
                f"Meta-World's episodes end after {LONGEST} steps; horizon = {spec.horizon} is too long"
            )
        renderer = "ray" if spec.renderer == "auto" else spec.renderer
        self.spec = spec
        self.tasks = tuple(SENTENCES)
        self.versions: Mapping[str, str] = {
            name: version(name) for name in ("metaworld", "mujoco", "numpy", "gymnasium")
        }
        self.embodiment = Embodiment(
            name="metaworld-sawyer",
            cameras=tuple(Feature(camera, (spec.size, spec.size, 3)) for camera in cameras),
            state=Feature("state", (4,), "m", ("x", "y", "z", "gripper")),
            action=Feature("action", (4,), "cm", ("x", "y", "z", "gripper")),
            hz=HZ,
            control="delta_position",
            renderer=renderer,
        )
        self._horizon = spec.horizon or LONGEST
        self._games: dict[str, Any] = {}  # Meta-World's environments, made when first played
        self._painters: dict[str, Any] = {}
        self._task = ""
        self._steps = 0
        self._succeeded = False

    def instruction(self, task: str) -> str:
        """Return our sentence for `task`."""
        self._require(task)
        return SENTENCES[task]

    def reset(self, task: str, seed: int) -> Observation:
        """Start an episode of `task`; the same seed gives the same start, bit for bit."""
        self._require(task)
        if seed < 0:
            raise SimulationError(f"task {task!r}: seed {seed} is negative; seeds are 0 or greater")
        if task not in self._games:
            self._games[task] = _make_game(task)
        game = self._games[task]
        game.seed(int(seed))
        full_state, _ = game.reset()
        _settle(game, full_state)
        self._task, self._steps, self._succeeded = task, 0, False
        return self._observe(full_state, render=True)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        """Apply one action [4]; return the observation, success so far, whether the episode is cut off."""
        if not self._task:
            raise SimulationError("Meta-World: reset(task, seed) must come before step")
        if self._steps >= self._horizon:
            raise SimulationError(
                f"task {self._task!r}: the episode ended after {self._horizon} steps; reset it first"
            )
        full_state, _, _, _, info = self._games[self._task].step(
            check_action(action, 4, f"task {self._task!r}")
        )
        self._steps += 1
        self._succeeded = self._succeeded or bool(info["success"])
        return self._observe(full_state, render=render), self._succeeded, self._steps >= self._horizon

    def close(self) -> None:
        """Free the simulations and renderers."""
        for painter in self._painters.values():
            painter.close()
        self._painters.clear()
        self._games.clear()
        self._task = ""

    def _require(self, task: str) -> None:
        if task not in SENTENCES:
            raise SimulationError(f"Meta-World has no task {task!r}{did_you_mean(task, SENTENCES)}")

    def _observe(self, full_state: NDArray[np.float64], *, render: bool) -> Observation:
        full_state = np.array(full_state, np.float64)
        return Observation(
            images=self._render() if render else NOTHING,
            state=full_state[:4].astype(np.float32),
            instruction=SENTENCES[self._task],
            privileged={"full_state": full_state},
        )

    def _render(self) -> dict[str, NDArray[np.uint8]]:
        game = self._games[self._task]
        if self._task not in self._painters:
            self._painters[self._task] = self._make_painter(self._task, game.model)
        painter = self._painters[self._task]
        names = [camera.name for camera in self.embodiment.cameras]
        return {name: painter.render(game.data, name, _view(game, name)) for name in names}

    def _make_painter(self, task: str, model: mujoco.MjModel) -> Any:
        if self.embodiment.renderer == "ray":
            return Raycaster(model, self.spec.size, sites=task in MARKED)
        from vlafit.envs.gl import GlRenderer

        return GlRenderer(model, self.spec.size, self.embodiment.renderer, sites=task in MARKED)


def make(spec: EnvSpec) -> MetaWorld:
    """Make Meta-World as `spec` says."""
    return MetaWorld(spec)


def make_expert() -> ScriptedExpert:
    """Make the actor that solves these tasks."""
    return ScriptedExpert()


def _make_game(task: str) -> Any:
    """Make Meta-World's environment of `task` so that `seed` decides the start and the goal is observed."""
    game: Any = ALL_V3_ENVIRONMENTS[task]()
    game.__dict__.pop("sawyer_observation_space", None)  # cached for a hidden goal
    game._partially_observable = False
    game._set_task_called = True
    game._freeze_rand_vec = False
    game.seeded_rand_vec = True
    return game


def _settle(game: Any, full_state: NDArray[np.float64]) -> None:
    """Make a reset's pictures and observation show where things were put; its physics stays as it is.

    Several of Meta-World's tasks move an object last and leave its old place to be seen until the first step,
    and goal markers are placed only by then.
    """
    mujoco.mj_kinematics(game.model, game.data)
    mujoco.mj_comPos(game.model, game.data)
    mujoco.mj_camlight(game.model, game.data)
    for site, position in game._target_site_config:
        game._set_pos_site(site, position)
    now = game._get_curr_obs_combined_no_goal()
    full_state[:18] = full_state[18:36] = now
    game._prev_obs = now.copy()


def _view(game: Any, name: str) -> View:
    if name in FIXED:
        return FIXED[name]
    camera = mujoco.mj_name2id(game.model, mujoco.mjtObj.mjOBJ_CAMERA, WRIST.get(name, name))
    return View(
        game.data.cam_xpos[camera].copy(),
        game.data.cam_xmat[camera].reshape(3, 3).copy(),
        float(game.model.cam_fovy[camera]),
        fixed=bool(game.model.cam_bodyid[camera] == 0),
    )
