"""Simulated robots with one small interface, `vlafit.types.Env`; one file each.

A name is a module of this folder or a dotted path to another module; either has a function
`make(spec: EnvSpec) -> Env`. Importing this package imports no simulator.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any, Literal

from vlafit.errors import SimulationError, did_you_mean
from vlafit.types import Actor, Env

Renderer = Literal["ray", "egl", "osmesa", "auto"]

HELPERS = (
    "checks",
    "experts",
    "gl",
    "raycast",
    "sentences",
    "shapes",
    "vector",
    "view",
)  # modules that are not simulations
EXTRAS = {
    "metaworld": "metaworld",
    "mujoco": "metaworld",
    "gym_pusht": "pusht",
    "pymunk": "pusht",
}  # imported module -> extra of vlafit that installs it


@dataclass(frozen=True)
class EnvSpec:
    """Which simulation to create, and how it renders images."""

    name: str
    """A module of vlafit.envs, or a dotted path to another module."""
    size: int = 64
    """Width and height of the images in pixels."""
    renderer: Renderer = "ray"
    """Renderer of the images; part of the embodiment. "auto": the simulation's default."""
    cameras: tuple[str, ...] = ()
    """Names of the cameras. Empty: the simulation's default."""
    horizon: int = 0
    """Steps after which an episode is truncated. 0: the simulation's default."""


def names() -> list[str]:
    """Return the simulations of this folder."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if name not in HELPERS and not name.startswith("_"))


def make(spec: EnvSpec) -> Env:
    """Create the simulation that `spec` describes.

    Raises SimulationError if the simulation is unknown, its packages are missing, or it does not support the
    spec.
    """
    if spec.size < 8:
        raise SimulationError(
            f"environment {spec.name!r}: size = {spec.size} is too small; use 8 pixels or more"
        )
    if spec.horizon < 0:
        raise SimulationError(
            f"environment {spec.name!r}: horizon = {spec.horizon} is negative; use 0 for the default"
        )
    return _module(spec.name).make(spec)


def expert(name: str) -> Actor:
    """Create the scripted expert of simulation `name`, or raise SimulationError if it has none."""
    module = _module(name)
    if not callable(getattr(module, "make_expert", None)):
        raise SimulationError(f"environment {name!r} has no scripted expert to record with")
    return module.make_expert()


def _module(name: str) -> Any:
    if "." not in name and name not in names():
        raise SimulationError(f"there is no environment {name!r}{did_you_mean(name, names())}")
    path = name if "." in name else f"{__name__}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in EXTRAS:
            raise SimulationError(
                f"environment {name!r} needs the package {missing!r}, which is not installed; "
                f"install it with: pip install 'vlafit[{EXTRAS[missing]}]'"
            ) from error
        if error.name is not None and path.startswith(error.name):
            raise SimulationError(f"environment {name!r}: there is no such module") from error
        raise
    if not callable(getattr(module, "make", None)):
        raise SimulationError(f"module {path} has no function make(spec: EnvSpec) -> Env")
    return module
