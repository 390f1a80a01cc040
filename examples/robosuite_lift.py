"""A simulation in an interpreter of its own: robosuite 1.5's Lift, through robosuite's gymnasium wrapper.

    python3.11 -m venv robosuite-env
    robosuite-env/bin/pip install robosuite==1.5.2 mujoco==3.3.0 gymnasium h5py msgpack
    PYTHONPATH=examples MUJOCO_GL=egl vlafit eval CHECKPOINT --protocol lift.toml \\
        --env-python robosuite-env/bin/python

where lift.toml has [env] name = "robosuite_lift". docs/other_interpreters.md explains it.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import robosuite  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from robosuite.wrappers import GymWrapper  # pyright: ignore[reportMissingImports]

from vlafit.envs import EnvSpec
from vlafit.envs.checks import check_action
from vlafit.types import Embodiment, Feature, Observation

CAMERA = "agentview"
STATE = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


class Lift:
    tasks = ("lift",)

    def __init__(self, spec: EnvSpec) -> None:
        self._size, self._horizon = spec.size, spec.horizon or 200
        self._camera = f"{CAMERA}_image"
        env = robosuite.make(
            "Lift",
            robots="Panda",
            has_renderer=False,
            has_offscreen_renderer=True,
            use_camera_obs=True,
            camera_names=[CAMERA],
            camera_heights=spec.size,
            camera_widths=spec.size,
            horizon=self._horizon + 1,
            ignore_done=True,
            hard_reset=True,  # the same start has the same picture
        )
        _free_renderer(env)  # because the wrapper resets
        self._env = GymWrapper(env, keys=[*STATE, self._camera], flatten_obs=False)
        actions = self._env.action_space.shape[0]
        width = sum(self._env.observation_space[key].shape[0] for key in STATE)
        self.embodiment = Embodiment(
            "panda",
            (Feature(CAMERA, (spec.size, spec.size, 3)),),
            Feature("state", (width,)),
            Feature("action", (actions,)),
            20.0,
            "delta_pose",
            "egl",
        )
        self.versions: Mapping[str, str] = {"robosuite": version("robosuite")}
        self._steps = 0

    def instruction(self, task: str) -> str:
        return "lift the cube"

    def reset(self, task: str, seed: int) -> Observation:
        self._steps = 0
        # In place: the sampler of the cube's position keeps the generator that it was made with.
        self._env.unwrapped.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        _free_renderer(self._env.unwrapped)
        seen, _ = self._env.reset()
        return self._seen(seen, True)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        self._steps += 1
        self._env.unwrapped.sim._render_context_offscreen.gl_ctx.make_current()
        seen, _, _, _, _ = self._env.step(check_action(action, self.embodiment.action.shape[0], "lift"))
        success = bool(self._env.unwrapped._check_success())
        return self._seen(seen, render), success, self._steps >= self._horizon

    def close(self) -> None:
        _free_renderer(self._env.unwrapped)
        self._env.close()

    def _seen(self, seen: Mapping[str, NDArray], render: bool) -> Observation:
        state = np.concatenate([seen[key] for key in STATE]).astype(np.float32)
        images = {CAMERA: np.ascontiguousarray(seen[self._camera][::-1])} if render else {}
        return Observation(images, state, "lift the cube")


def _free_renderer(env: Any) -> None:
    """Free the renderer of robosuite's environment, which a hard reset would leave to garbage collection.

    That frees it in whichever OpenGL context is current then, and takes another renderer's buffers for its
    own. robosuite also draws in whichever is current, so `step` makes its own current.
    """
    context = env.sim and env.sim._render_context_offscreen
    if context:
        context.gl_ctx.make_current()
        context.con.free()
        context.gl_ctx.free()


def make(spec: EnvSpec) -> Lift:
    return Lift(spec)
