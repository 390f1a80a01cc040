"""Factors between units that are often mixed up, and what the values are then."""

from collections.abc import Mapping

import numpy as np

SMALLER: Mapping[float, str] = {
    180 / np.pi: "radians where the statistics are of degrees",
    100.0: "0 to 1 where they are of 0 to 100",
    1000.0: "m where they are of mm",
}
"""What values are that must be multiplied by the factor."""

LARGER: Mapping[float, str] = {
    np.pi / 180: "degrees where the statistics are of radians",
    0.01: "0 to 100 where they are of 0 to 1",
    0.001: "mm where they are of m",
}

SCALES: Mapping[float, str] = {**SMALLER, **LARGER}
