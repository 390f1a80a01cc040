"""PushT whose physics and drawing are timed, for every program that plays gym-pusht's own class.

As an environment of vlafit (`[env] name = "benchmarks.timed_pusht"`) it writes its times at each episode's
end into the folder that TIMES names, because its process is another one than the policy's.
"""

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gym_pusht.envs.pusht import PushTEnv
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.envs.pusht import PushT
from vlafit.types import Observation

TIMES = "VLAFIT_BENCHMARK_TIMES"
Seconds = dict[str, float]


def timed_simulation() -> Seconds:
    """Let gym-pusht count the CPU seconds of this process's `simulation` and `drawing`, from now on."""
    seconds: Seconds = {"simulation": 0.0, "drawing": 0.0}
    timed_method(PushTEnv, "_render", seconds, "drawing")
    timed_method(PushTEnv, "step", seconds, "simulation", without="drawing")
    timed_method(PushTEnv, "reset", seconds, "simulation", without="drawing")
    return seconds


def timed_method(owner: Any, name: str, seconds: Seconds, part: str, without: str = "") -> None:
    """Add the thread's CPU seconds in a method to a part, less those that went to the part `without`."""
    inner: Callable[..., Any] = getattr(owner, name)
    seconds.setdefault(part, 0.0)

    @functools.wraps(inner)
    def outer(*values: Any, **named: Any) -> Any:
        began, other = time.thread_time(), seconds.get(without, 0.0)
        try:
            return inner(*values, **named)
        finally:
            seconds[part] += time.thread_time() - began - (seconds.get(without, 0.0) - other)

    setattr(owner, name, outer)


class TimedPushT(PushT):
    """PushT that writes what it took after each episode."""

    def __init__(self, spec: EnvSpec) -> None:
        super().__init__(spec)
        self._path = Path(os.environ[TIMES]) / f"{os.getpid()}.json"

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        """Step as PushT does."""
        seen, success, truncated = super().step(action, render=render)
        if success or truncated:
            self._path.write_text(json.dumps(_SECONDS))
        return seen, success, truncated


_SECONDS: Seconds = {}


def make(spec: EnvSpec) -> TimedPushT:
    """Create a timed PushT as `spec` describes."""
    global _SECONDS
    _SECONDS = _SECONDS or timed_simulation()
    return TimedPushT(spec)
