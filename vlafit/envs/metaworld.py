"""The 50 tasks of Meta-World v3 (a Sawyer arm over a table), with initial states decided by the seed.

Meta-World's gymnasium entry ignores the seed of `reset`. Here each initial state is drawn from a generator
seeded for the episode, as in LeRobot's environment, so (task, seed) names one initial state in every process.
Meta-World has no instructions (vlafit adds `sentences`) and no close camera of the whole workspace (vlafit
adds `workspace`). Its goal markers are drawn only in tasks whose goal nothing else shows; in other tasks they
would distinguish two tasks of one scene, which only the instruction should do.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type information)

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from numpy.typing import NDArray

from vlafit.envs import EnvSpec, Perturbation, versioned
from vlafit.envs.checks import check_action
from vlafit.envs.experts import ScriptedExpert
from vlafit.envs.perturb import Disturbance
from vlafit.envs.raycast import Raycaster
from vlafit.envs.sentences import MARKED, SENTENCES
from vlafit.envs.view import View, from_quaternion, look_at
from vlafit.errors import SimulationError, did_you_mean
from vlafit.types import NOTHING, Embodiment, Feature, Observation

SHARES_PROCESS = True  # several environments in one process draw what each draws alone
PERTURBABLE = True  # cameras and lights, by EnvSpec.perturb
HZ = 80.0  # Meta-World: 5 physics steps of 2.5 ms each
MAX_STEPS = 500  # Meta-World's own limit
UPRIGHT = np.diag([-1.0, -1.0, 1.0])  # half a turn: Meta-World's corner2 is upside down
WORKSPACE_FROM, WORKSPACE_TO = (
    (0.78, 0.07, 0.90),
    (0.08, 0.70, 0.16),
)  # metres; frames all objects that the experts touch
FIXED = {
    # LeRobot's corner2: the model's camera moved nearer and turned upright
    "corner2": View(
        np.array([0.75, 0.075, 0.7]),
        from_quaternion((-0.39503823, 0.26266734, -0.43493704, 0.76536295)) @ UPRIGHT,
        60.0,
        fixed=True,
    ),
    "workspace": View(np.array(WORKSPACE_FROM), look_at(WORKSPACE_FROM, WORKSPACE_TO), 36.0, fixed=True),
}
WRIST = {"wrist": "gripperPOV"}  # vlafit's name for a camera of the model
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
            raise SimulationError(f"cameras: a name is listed twice: {', '.join(cameras)}")
        if spec.horizon > MAX_STEPS:
            raise SimulationError(
                f"Meta-World's episodes end after {MAX_STEPS} steps; horizon = {spec.horizon} is too long"
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
            renderer=versioned(renderer),
        )
        self._renderer = renderer
        self._horizon = spec.horizon or MAX_STEPS
        self._simulations: dict[str, Any] = {}  # Meta-World's environments, created on first use
        self._renderers: dict[str, Any] = {}
        self._lights: dict[str, list[NDArray]] = {}  # of each task's model, as they are without perturbation
        self._disturbance: Disturbance | None = None
        self._task = ""
        self._steps = 0
        self._succeeded = False

    def instruction(self, task: str) -> str:
        """Return vlafit's instruction for `task`."""
        self._require(task)
        return SENTENCES[task]

    def reset(self, task: str, seed: int) -> Observation:
        """Start an episode of `task`; the same seed gives the same start, bit for bit."""
        self._require(task)
        if seed < 0:
            raise SimulationError(f"task {task!r}: seed {seed} is negative; seeds are 0 or greater")
        if task not in self._simulations:
            self._simulations[task] = _make_simulation(task)
        simulation = self._simulations[task]
        simulation.seed(int(seed))
        full_state, _ = simulation.reset()
        _update_scene(simulation, full_state)
        self._task, self._steps, self._succeeded = task, 0, False
        if self.spec.perturb != Perturbation():
            self._disturb(simulation.model, int(seed))
        return self._observe(full_state, render=True)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        """Apply one action [4]; return the observation, success so far, whether the episode is truncated."""
        if not self._task:
            raise SimulationError("Meta-World: reset(task, seed) must come before step")
        if self._steps >= self._horizon:
            raise SimulationError(
                f"task {self._task!r}: the episode ended after {self._horizon} steps; reset it first"
            )
        full_state, _, _, _, info = self._simulations[self._task].step(
            check_action(action, 4, f"task {self._task!r}")
        )
        self._steps += 1
        self._succeeded = self._succeeded or bool(info["success"])
        return self._observe(full_state, render=render), self._succeeded, self._steps >= self._horizon

    def close(self) -> None:
        """Free the simulations and renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._simulations.clear()
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

    def _disturb(self, model: mujoco.MjModel, seed: int) -> None:
        """Perturb this episode's pictures; by a new renderer, because it keeps still parts of the scene."""
        if self._task in self._renderers:
            self._renderers.pop(self._task).close()
        lights = [model.vis.headlight.ambient, model.vis.headlight.diffuse, model.light_ambient]
        lights.append(model.light_diffuse)
        own = self._lights.setdefault(self._task, [light.copy() for light in lights])
        for light, before in zip(lights, own, strict=True):
            light[:] = before
        self._disturbance = Disturbance(self.spec.perturb, seed)
        self._disturbance.light(*lights)

    def _render(self) -> dict[str, NDArray[np.uint8]]:
        simulation = self._simulations[self._task]
        if self._task not in self._renderers:
            self._renderers[self._task] = self._make_renderer(self._task, simulation.model)
        renderer = self._renderers[self._task]
        names = [camera.name for camera in self.embodiment.cameras]
        views = {name: _view(simulation, name) for name in names}
        if self._disturbance is not None:
            views = {name: self._disturbance.view(view) for name, view in views.items()}
        return {name: renderer.render(simulation.data, name, view) for name, view in views.items()}

    def _make_renderer(self, task: str, model: mujoco.MjModel) -> Any:
        if self._renderer == "ray":
            return Raycaster(model, self.spec.size, sites=task in MARKED)
        from vlafit.envs.gl import GlRenderer

        return GlRenderer(model, self.spec.size, self._renderer, sites=task in MARKED)


def make(spec: EnvSpec) -> MetaWorld:
    """Create Meta-World as `spec` describes."""
    return MetaWorld(spec)


def make_expert() -> ScriptedExpert:
    """Create the scripted expert of these tasks."""
    return ScriptedExpert()


def _make_simulation(task: str) -> Any:
    """Create Meta-World's environment of `task`, with the initial state seeded and the goal observed."""
    simulation: Any = ALL_V3_ENVIRONMENTS[task]()
    simulation.__dict__.pop("sawyer_observation_space", None)  # cached for a hidden goal
    simulation._partially_observable = False
    simulation._set_task_called = True
    simulation._freeze_rand_vec = False
    simulation.seeded_rand_vec = True
    return simulation


def _update_scene(simulation: Any, full_state: NDArray[np.float64]) -> None:
    """Update images and observation after a reset to the final object positions, without a physics step.

    Several tasks move an object last in `reset`, but show it at its old position until the first step, which
    also places the goal markers.
    """
    mujoco.mj_kinematics(simulation.model, simulation.data)
    mujoco.mj_comPos(simulation.model, simulation.data)
    mujoco.mj_camlight(simulation.model, simulation.data)
    for site, position in simulation._target_site_config:
        simulation._set_pos_site(site, position)
    current = simulation._get_curr_obs_combined_no_goal()
    full_state[:18] = full_state[18:36] = current
    simulation._prev_obs = current.copy()


def _view(simulation: Any, name: str) -> View:
    if name in FIXED:
        return FIXED[name]
    camera = mujoco.mj_name2id(simulation.model, mujoco.mjtObj.mjOBJ_CAMERA, WRIST.get(name, name))
    return View(
        simulation.data.cam_xpos[camera].copy(),
        simulation.data.cam_xmat[camera].reshape(3, 3).copy(),
        float(simulation.model.cam_fovy[camera]),
        fixed=bool(simulation.model.cam_bodyid[camera] == 0),
    )
