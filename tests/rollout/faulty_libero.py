"""LIBERO that breaks at the third step of an episode, in the way that its seed stands for."""

import os
import signal
import threading

import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.envs.libero import Libero
from vlafit.types import Observation

SHARES_PROCESS = True
RAISES, DIES, HANGS = 1, 2, 3  # initial states


class FaultyLibero(Libero):
    def reset(self, task: str, seed: int) -> Observation:
        self._seed = seed
        return super().reset(task, seed)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        if self._steps == 2:
            if self._seed == RAISES:
                raise RuntimeError("the simulation is unstable")
            if self._seed == DIES:
                os.kill(os.getpid(), signal.SIGSEGV)
            if self._seed == HANGS:
                threading.Event().wait()  # never comes
        return super().step(action, render=render)


def make(spec: EnvSpec) -> FaultyLibero:
    return FaultyLibero(spec)
