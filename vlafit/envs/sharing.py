"""Check that an environment draws the same alone, after other episodes, and beside another in its process.

    python -m vlafit.envs.sharing my_lab.dot --renderer egl

Run it with the interpreter that has the simulator. Renderers of two environments, or of two episodes, can
disturb each other in one process: pictures are then noise or another scene, and nothing raises. An
environment that passes may say `SHARES_PROCESS = True` in its module.
"""

import argparse
import gc
import logging
import sys
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec, Renderer, make
from vlafit.envs.checks import check_observation
from vlafit.envs.garbage import unguarded
from vlafit.errors import SimulationError
from vlafit.types import Env, Observation

log = logging.getLogger("vlafit.envs.sharing")

STEPS = 4
ROUNDING = 2  # grey levels by which two pictures of one scene may differ
SAME_START = (
    "an episode must follow from its task, its seed and its actions only; look for what stays from an "
    "earlier episode, and for global random numbers"
)
SAME_RENDERER = (
    "make the renderer's OpenGL context current before each picture, and free the old renderer, with its own "
    "context current, before a reset makes another (examples/robosuite_lift.py does both)"
)


def check_sharing(spec: EnvSpec) -> None:
    """Raise SimulationError if pictures or states depend on other episodes, environments or collections.

    Three environments of `spec` are created one after another, then two at a time; each plays `STEPS` steps.
    Garbage is collected at the worst moments only, without the guard of `vlafit.envs.garbage`.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with unguarded():
            _check(spec)
    finally:
        if enabled:
            gc.enable()


def _check(spec: EnvSpec) -> None:
    alone = []
    for number in (0, 1):
        episode = _Episode(make(spec), number)
        alone.append([episode.reset(), *(episode.step() for _ in range(STEPS))])
        _compare(episode.reset(), alone[number][0], episode, "reset a second time", SAME_START)
        episode.env.close()

    one = _Episode(make(spec), 0)
    for number in (1, 0):
        one.number = number
        seen = one.reset()
    _compare(seen, alone[0][0], one, "at the start of a second episode")
    gc.collect()
    for step in range(STEPS):
        _compare(one.step(), alone[0][step + 1], one, "in a second episode, after a garbage collection")

    two = _Episode(make(spec), 1)
    beside = "beside another environment in one process"
    _compare(one.reset(), alone[0][0], one, beside)
    two.reset()
    _compare(two.reset(), alone[1][0], two, beside)
    gc.collect()
    for step in range(1, STEPS):
        _compare(one.step(), alone[0][step], one, beside)
        _compare(two.step(), alone[1][step], two, beside)
        gc.collect()
    two.env.close()
    del two
    gc.collect()
    _compare(one.step(), alone[0][STEPS], one, "after another environment in its process was closed")
    one.env.close()


class _Episode:
    """An episode that is played step by step: number 0 of the first task, 1 of the last."""

    def __init__(self, env: Env, number: int) -> None:
        self.env, self.number = env, number

    @property
    def start(self) -> tuple[str, int]:
        """Task and seed."""
        return self.env.tasks[-self.number], self.number

    def reset(self) -> Observation:
        self._random = np.random.default_rng(self.number)
        return self._checked(self.env.reset(*self.start))

    def step(self) -> Observation:
        robot = self.env.embodiment
        return self._checked(self.env.step(self._action(robot.action.shape), render=True)[0])

    def _action(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return self._random.uniform(-1, 1, shape).astype(np.float32)

    def _checked(self, seen: Observation) -> Observation:
        where = "task {!r}, seed {}".format(*self.start)
        seen = check_observation(seen, self.env.embodiment, where, images=True)
        images = {name: image.copy() for name, image in seen.images.items()}
        return Observation(images, seen.state.copy(), seen.instruction)


def _compare(
    seen: Observation, alone: Observation, episode: _Episode, when: str, fix: str = SAME_RENDERER
) -> None:
    task, seed = episode.start
    where = f"task {task!r}, seed {seed}, {when}"
    if not np.array_equal(seen.state, alone.state):
        raise SimulationError(
            f"{where}: the state is {seen.state.tolist()}, of an environment alone {alone.state.tolist()}; "
            + SAME_START
        )
    for name, image in alone.images.items():
        difference = np.abs(seen.images[name].astype(int) - image)
        if difference.max() > ROUNDING:
            raise SimulationError(
                f"{where}: the picture of camera {name!r} differs from that of an environment alone by up to "
                f"{difference.max()} grey levels, {difference.mean():.3g} on average; {fix}"
            )


def main() -> int:
    """Check the environment that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m vlafit.envs.sharing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="module of the environment, as a protocol names it")
    parser.add_argument("--renderer", choices=get_args(Renderer), default="auto")
    parser.add_argument("--size", type=int, default=64, help="width and height of the pictures [64]")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        check_sharing(EnvSpec(options.name, options.size, options.renderer))
    except SimulationError as error:
        log.error("%s: %s", options.name, error)
        return 1
    log.info("%s draws alike alone, after other episodes and beside another environment", options.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
