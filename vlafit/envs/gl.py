"""Render a MuJoCo scene by OpenGL without a display, through EGL or OSMesa if the system has them.

Textures are those of the model; shadows, reflections and multisampling are off, because on a CPU they cost
ten times the rest. The backend is chosen by name: the variable MUJOCO_GL is neither read nor set.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type information)

import atexit
import importlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from vlafit.envs.view import View
from vlafit.errors import SimulationError

PACKAGES = {
    "egl": "apt-get install -y --no-install-recommends libegl1 libgl1 libgl1-mesa-dri",
    "osmesa": "apt-get install -y --no-install-recommends libosmesa6",
}
RAYS = 'use "ray", which needs no OpenGL, '  # where a renderer does not work
MAX_GEOMS = 1000  # in a scene


class GlRenderer:
    """Renders one model with `backend` "egl" or "osmesa" as images of `size` by `size` pixels.

    `groups`: for each of MuJoCo's six groups of geoms, 1 if it is drawn; MuJoCo's default if empty.
    `instead`: what to do where the backend does not work.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        size: int,
        backend: str,
        *,
        sites: bool = True,
        groups: Sequence[int] = (),
        instead: str = RAYS,
    ) -> None:
        self.model = model
        self.size = size
        self._context = gl_context(backend, size, instead)
        self._context.make_current()
        quality, offscreen = model.vis.quality, model.vis.global_
        quality.shadowsize = quality.offsamples = 0
        offscreen.offwidth, offscreen.offheight = (
            max(offscreen.offwidth, size),
            max(offscreen.offheight, size),
        )
        self._scene = mujoco.MjvScene(model, MAX_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._option = mujoco.MjvOption()
        if not sites:
            self._option.sitegroup[:] = 0
        if groups:
            self._option.geomgroup[:] = groups
        self._gl = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._gl)
        self._free = freed(self, lambda context=self._context, gl=self._gl: _free(context, gl))

    def render(self, data: mujoco.MjData, name: str, view: View) -> NDArray[np.uint8]:
        """Return the image uint8 [size, size, 3] of `data` from `view`; `name` is not used here."""
        self._context.make_current()
        mujoco.mjv_updateScene(
            self.model, data, self._option, None, mujoco.MjvCamera(), mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        for camera in self._scene.camera:  # both eyes
            camera.pos[:] = view.position
            camera.forward[:] = -view.rotation[:, 2]
            camera.up[:] = view.rotation[:, 1]
            half = camera.frustum_near * np.tan(np.deg2rad(view.fovy) / 2)
            camera.frustum_top, camera.frustum_bottom = half, -half
            camera.frustum_center = camera.frustum_width = 0  # as wide as the image
        # Again, because the headlight is at the camera, and mjv_updateScene put it at a default one.
        mujoco.mjv_makeLights(self.model, data, self._scene)
        frame = mujoco.MjrRect(0, 0, self.size, self.size)
        mujoco.mjr_render(frame, self._scene, self._gl)
        picture = np.empty((self.size, self.size, 3), np.uint8)
        mujoco.mjr_readPixels(picture, None, frame, self._gl)
        return np.ascontiguousarray(picture[::-1])

    def close(self) -> None:
        """Free the context."""
        self._free()


def freed(renderer: Any, free: Callable[[], None]) -> Callable[[], None]:
    """Return what calls `free` once: by hand, when `renderer` is collected, or at exit.

    At exit the function that was registered last runs first, so OpenGL, which was imported before, is still
    there; `weakref.finalize` would run when its first user's turn comes.
    """
    final = weakref.finalize(renderer, free)
    final.atexit = False
    atexit.register(final)

    def now() -> None:
        final()
        atexit.unregister(final)

    return now


def _free(context: Any, gl: mujoco.MjrContext) -> None:
    context.make_current()
    gl.free()
    context.free()


def gl_context(backend: str, size: int, instead: str = RAYS, renderer: str = "") -> Any:
    """Create a context of OpenGL. Raises SimulationError, with the packages that lack, if it cannot.

    `instead` is what else the simulation can do, `renderer` the name by which the user knows the backend.
    """
    if backend not in PACKAGES:
        raise SimulationError(f"there is no renderer {backend!r}; it can be one of: egl, osmesa, ray")
    try:
        return importlib.import_module(f"mujoco.{backend}").GLContext(size, size)
    except Exception as error:  # PyOpenGL raises many types for a missing or broken library
        raise SimulationError(
            f"renderer {renderer or backend!r} does not work here ({type(error).__name__}: {error}); "
            f"{instead}or install the libraries: {PACKAGES[backend]}"
        ) from error
