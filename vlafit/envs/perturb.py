"""Perturb cameras and lights of a MuJoCo scene, by amounts that are drawn from the episode's seed."""

import numpy as np
from numpy.typing import NDArray

from vlafit.envs import Perturbation
from vlafit.envs.view import View

STREAM = 0x51ED270B  # separates these random numbers from others that are drawn from the same seed


class Disturbance:
    """The perturbation of one episode: where each fixed camera is, and how bright the lights are."""

    def __init__(self, perturbation: Perturbation, seed: int) -> None:
        rng = np.random.default_rng([seed, STREAM])
        self.shift = rng.uniform(-1, 1, 3) * perturbation.camera_m
        self.turn = np.deg2rad(rng.uniform(-1, 1, 3) * perturbation.camera_deg)
        self.brightness = 1 + float(rng.uniform(-1, 1)) * perturbation.light

    def view(self, view: View) -> View:
        """Return the view of a displaced and turned camera; one on the robot stays where it is."""
        if not view.fixed:
            return view
        return View(view.position + self.shift, view.rotation @ _rotation(self.turn), view.fovy, fixed=True)

    def light(self, *lights: NDArray[np.floating]) -> None:
        """Scale lights (the model's arrays of colours) in place."""
        for colours in lights:
            colours[:] = colours * self.brightness


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rotation [3, 3] around x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return z @ y @ x
