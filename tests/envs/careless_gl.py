"""An environment that draws by EGL as robosuite 1.5 does, and as carelessly: for tests, with mujoco alone.

Every reset makes another scene with another renderer. The old renderer waits in a reference cycle for a
garbage collection, then frees itself in whichever context is current; no context is made current to draw.
`step` collects garbage, as simulators do that free a scene.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type information)

import gc
from collections.abc import Mapping

import mujoco
import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.envs.checks import check_action
from vlafit.envs.gl import gl_context
from vlafit.types import Embodiment, Feature, Observation

TASKS = {"red": "1 0 0 1", "blue": "0 0 1 1"}
SCENE = """
<mujoco>
  <asset>
    <texture name="grid" type="2d" builtin="checker" rgb1=".9 .9 .9" rgb2=".2 .5 .2" width="64" height="64"/>
    <material name="grid" texture="grid" texrepeat="4 4"/>
  </asset>
  <worldbody>
    <light directional="true" dir="0 0 -1"/>
    <camera name="side" pos="2 0 1" xyaxes="0 1 0 -.4 0 1"/>
    <geom type="plane" size="2 2 .1" material="grid"/>
    <body pos="0 0 .3">
      <joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/>
      <geom type="box" size=".3 .3 .3" rgba="{colour}"/>
    </body>
  </worldbody>
</mujoco>"""


class Scene:
    def __init__(self, task: str, seed: int, size: int) -> None:
        self.model = mujoco.MjModel.from_xml_string(SCENE.format(colour=TASKS[task]))
        self.data = mujoco.MjData(self.model)
        self.data.qpos[:] = np.random.default_rng(seed).uniform(-0.5, 0.5, 2)
        self.renderer = Renderer(self, size)


class Renderer:
    """The parts of robosuite's MjRenderContext, in its order."""

    def __init__(self, scene: Scene, size: int) -> None:
        self.scene, self.size = scene, size  # and the scene holds the renderer
        self.gl = gl_context("egl", size)
        self.gl.make_current()
        self.geoms = mujoco.MjvScene(scene.model, 100)
        self.camera = mujoco.MjvCamera()
        self.camera.fixedcamid, self.camera.type = 0, mujoco.mjtCamera.mjCAMERA_FIXED
        self.context = mujoco.MjrContext(scene.model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)

    def draw(self) -> NDArray[np.uint8]:
        model, data = self.scene.model, self.scene.data
        mujoco.mj_forward(model, data)
        everything, option = mujoco.mjtCatBit.mjCAT_ALL, mujoco.MjvOption()
        mujoco.mjv_updateScene(model, data, option, None, self.camera, everything, self.geoms)
        frame = mujoco.MjrRect(0, 0, self.size, self.size)
        mujoco.mjr_render(frame, self.geoms, self.context)
        picture = np.full((self.size, self.size, 3), 77, np.uint8)
        mujoco.mjr_readPixels(picture, None, frame, self.context)
        return picture[::-1].copy()

    def __del__(self) -> None:
        self.context.free()
        self.gl.free()


class Careless:
    tasks = tuple(TASKS)

    def __init__(self, spec: EnvSpec) -> None:
        self.embodiment = Embodiment(
            "box",
            (Feature("side", (spec.size, spec.size, 3)),),
            Feature("state", (2,)),
            Feature("action", (2,)),
            10.0,
            "delta_position",
            "egl",
        )
        self.versions: Mapping[str, str] = {"careless": "1"}
        self._scene: Scene | None = None

    def instruction(self, task: str) -> str:
        return f"move the {task} box"

    def reset(self, task: str, seed: int) -> Observation:
        self._task = task
        self._scene = Scene(task, seed, self.embodiment.cameras[0].shape[0])
        return self._seen(True)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        assert self._scene is not None
        gc.collect()
        self._scene.data.qpos += 0.1 * check_action(action, 2, "box")
        return self._seen(render), False, False

    def close(self) -> None:
        self._scene = None

    def _seen(self, render: bool) -> Observation:
        assert self._scene is not None
        images = {"side": self._scene.renderer.draw()} if render else {}
        return Observation(images, self._scene.data.qpos.astype(np.float32), self.instruction(self._task))


def make(spec: EnvSpec) -> Careless:
    return Careless(spec)
