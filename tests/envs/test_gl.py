"""OpenGL draws what MuJoCo's own renderer draws from the same camera; its version is named."""

import subprocess
import sys

import mujoco
import numpy as np
import pytest

from vlafit.envs.view import View
from vlafit.errors import SimulationError

pytestmark = pytest.mark.sim

SIZE = 64
SCENE = """
<mujoco>
  <visual><headlight ambient=".1 .1 .1" diffuse=".8 .8 .8" specular="0 0 0"/></visual>
  <worldbody>
    <light directional="true" diffuse=".2 .2 .2" dir="0 0 -1"/>
    <camera name="side" pos="2 0 .6" xyaxes="0 1 0 -.2 0 1" fovy="40"/>
    <camera name="back" pos="0 2 .4" xyaxes="-1 0 0 0 -.1 1" fovy="50"/>
    <geom type="plane" size="4 4 .1" rgba=".2 .6 .2 1"/>
    <body pos="0 0 .4"><freejoint/><geom type="box" size=".3 .3 .3" rgba=".8 .2 .2 1"/></body>
  </worldbody>
</mujoco>"""


def reference(model, data, camera: str) -> np.ndarray:
    """The frame of mujoco.Renderer, with the same quality as ours."""
    model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
    renderer = mujoco.Renderer(model, SIZE, SIZE)
    flags = renderer.scene.flags
    flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    renderer.update_scene(data, camera)
    picture = renderer.render().copy()
    renderer.close()
    return picture


@pytest.mark.parametrize("camera", ["side", "back"])
def test_a_view_is_lit_as_mujocos_own_renderer_lights_it(
    camera: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlafit.envs.gl import GlRenderer

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
    rotation = data.cam_xmat[number].reshape(3, 3)
    view = View(data.cam_xpos[number], rotation, float(model.cam_fovy[number]), fixed=True)
    try:
        ours = GlRenderer(model, SIZE, "egl")
    except SimulationError as error:
        assert "apt-get install" in str(error)
        pytest.skip("no EGL here")
    picture = ours.render(data, camera, view).astype(int)
    ours.close()
    from mujoco.egl import GLContext

    monkeypatch.setattr(mujoco.gl_context, "GLContext", GLContext)  # else it looks for a display
    assert np.abs(picture - reference(model, data, camera)).max() <= 2  # rounding of a vertex, at most


def test_a_policy_that_learned_from_pictures_of_an_older_version_is_told_so() -> None:
    from dataclasses import replace

    from vlafit.envs import versioned
    from vlafit.types import Embodiment, Feature, renderer_notice

    robot = Embodiment("dot", (), Feature("state", (1,)), Feature("action", (1,)), 1.0, "", versioned("egl"))
    assert robot.renderer == "egl-2"
    old = replace(robot, renderer="egl")  # as checkpoints of before the fix declare
    notice = renderer_notice("the policy was trained on", old, "it is evaluated on", robot)
    assert "'egl'" in notice and "'egl-2'" in notice and "versions of one renderer" in notice
    assert versioned("ray") == "ray"  # whose pictures have not changed


LEFT_OPEN = f"""
import weakref
from pathlib import Path

weakref.finalize(Path, print)  # other packages have some, too, and the first one decides when all run at exit
import mujoco

from vlafit.envs.gl import GlRenderer
from vlafit.envs.view import View
from vlafit.errors import SimulationError

model = mujoco.MjModel.from_xml_string({SCENE!r})
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
try:
    renderer = GlRenderer(model, 16, "egl")
except SimulationError:
    raise SystemExit(5)
renderer.render(data, "side", View(data.cam_xpos[0], data.cam_xmat[0].reshape(3, 3), 40.0, fixed=True))
"""


def test_a_renderer_that_nobody_closed_is_freed_before_opengl_is() -> None:
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True)
    if ended.returncode == 5:
        pytest.skip("no EGL here")
    assert (ended.returncode, ended.stderr) == (0, "")
