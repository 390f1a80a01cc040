"""Findings: the results of a dataset check."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Columns = list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]
"""Id, states [T, s] and actions [T, a] of each episode."""
Shown = tuple[tuple[str, int], ...]
"""The columns of a finding."""


@dataclass(frozen=True)
class Finding:
    """One suspicious thing in a dataset."""

    severity: Literal["error", "warning"]
    """error: training on it teaches something wrong; warning: look at it."""
    kind: str
    """A name for its kind, the same in every report."""
    episode: str
    """Id of the episode; empty if it concerns the whole dataset."""
    step: int | None
    """The first step concerned, if it is at some."""
    message: str
    """The measurement."""
    effect: str
    """The effect on training."""
    fix: str
    """The remedy."""
    cameras: tuple[str, ...] = ()
    """The cameras whose frames show it."""
    columns: tuple[tuple[str, int], ...] = ()
    """The columns whose curves show it: ("state" or "action", dimension)."""
    steps: int = 1
    """How many steps are concerned, from `step` on."""
    other: str = ""
    """Id of the episode that this one repeats, or that its frames may be of."""
