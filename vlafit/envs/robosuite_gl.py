"""Render a LIBERO scene by robosuite's own renderer through EGL: its shadows, reflections and multisampling.

Pictures are those that `use_camera_obs` of robosuite gives, of the state at the end of a step. On a CPU one
takes several times as long as `vlafit.envs.gl`'s.
"""

# pyright: reportAttributeAccessIssue=false, reportMissingImports=false
# (mujoco is a compiled module without type information, and the simulator is an extra)

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from vlafit.envs.gl import freed, gl_context
from vlafit.envs.view import View

INSTEAD = 'use renderer = "osmesa", whose pictures differ, '


class RobosuiteRenderer:
    """Renders the scene of one of robosuite's environments as images of `size` by `size` pixels."""

    def __init__(self, simulation: Any, size: int) -> None:
        self.model, self.size = simulation.model, size
        self._context = _context(simulation, size)
        self._context.vopt.geomgroup[0], self._context.vopt.geomgroup[1] = 0, 1  # looks, not collision shapes
        self._free = freed(self, lambda context=self._context: _free(context))

    def render(self, data: mujoco.MjData, name: str, view: View) -> NDArray[np.uint8]:
        """Return the image uint8 [size, size, 3] of the model's camera `name`, whose `view` it is."""
        self._context.gl_ctx.make_current()
        self._context.render(self.size, self.size, camera_id=self.model.camera_name2id(name))
        return np.ascontiguousarray(self._context.read_pixels(self.size, self.size)[::-1])

    def close(self) -> None:
        """Free the context."""
        self._free()


class _Scene:
    """The parts of a simulation that robosuite's context draws.

    The context would compute the simulation's forward dynamics when it is created, which changes the last
    bits of the steps that follow: an episode would depend on whether it is drawn.
    """

    def __init__(self, simulation: Any) -> None:
        self.model, self.data = simulation.model, simulation.data

    def forward(self) -> None:
        """Leave the simulation alone."""

    def add_render_context(self, context: Any) -> None:
        """Leave the context with the renderer."""


def _context(simulation: Any, size: int) -> Any:
    """Return robosuite's context; it was imported without OpenGL, and is given MuJoCo's through EGL."""
    import robosuite.utils.binding_utils as binding

    # Created first: robosuite's context, once begun, complains at its end that it was never finished.
    opengl = gl_context("egl", size, INSTEAD, "robosuite")
    own = binding.GLContext
    binding.GLContext = lambda max_width, max_height, device_id: opengl
    try:
        return binding.MjRenderContextOffscreen(_Scene(simulation), -1, max_width=size, max_height=size)
    finally:
        binding.GLContext = own


def _free(context: Any) -> None:
    context.gl_ctx.make_current()
    context.con.free()
    context.gl_ctx.free()
