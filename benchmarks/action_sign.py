"""How often `data check` blames an episode of clean small sets, and finds a sign that is turned in one.

    python -m benchmarks.action_sign --sets 100

Each set has three action dimensions that drive the state, by its next value or its next step and with noise,
and four that are smooth and free of it. Then one of the three is turned in one episode.
"""

import argparse
from argparse import RawDescriptionHelpFormatter

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Columns
from vlafit.datasets.checks.lags import check_lags

SIZES = ((4, 36, 3), (4, 50, 6), (5, 60, 8), (6, 100, 8), (8, 60, 8), (8, 150, 10), (12, 80, 8), (32, 100, 8))
DRIVING, FREE, NOISE = 3, 4, 0.1


def smooth(rng: np.random.Generator, steps: int, dimensions: int, width: int) -> NDArray[np.float64]:
    """Return noise [steps, dimensions] smoothed by a Gaussian of `width` steps, each of variance 1."""
    kernel = np.exp(-0.5 * (np.arange(-4 * width, 4 * width + 1) / width) ** 2)
    noise = rng.normal(size=(steps + 8 * width, dimensions))
    made = np.stack([np.convolve(column, kernel, "valid") for column in noise.T], axis=1)
    return made / made.std(axis=0)


def recorded(rng: np.random.Generator, episodes: int, steps: int, width: int, velocity: bool) -> Columns:
    """Return the columns of a clean set."""
    made: Columns = []
    for number in range(episodes):
        state = smooth(rng, steps + 1, DRIVING, width)
        caused = np.diff(state, axis=0) if velocity else state[1:]
        caused = caused + NOISE * caused.std(axis=0) * rng.normal(size=caused.shape)
        actions = np.concatenate([caused, 0.3 * smooth(rng, steps, FREE, width)], axis=1)
        made.append((f"episode {number}", state[:-1], actions))
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=100, help="of each size, half of them by velocity")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    print("episodes  steps  smoothed over  clean sets with an error  turned dimension found  another blamed")
    clean, total = 0, 0
    for episodes, steps, width in SIZES:
        wrong = found = blamed = 0
        for number in range(arguments.sets):
            columns = recorded(rng, episodes, steps, width, velocity=number % 2 == 0)
            findings = check_lags(columns, [], Untested())
            wrong += any(finding.severity == "error" for finding in findings)
            turned, dimension = int(rng.integers(episodes)), int(rng.integers(DRIVING))
            columns[turned][2][:, dimension] *= -1
            errors = [f for f in check_lags(columns, [], Untested()) if f.severity == "error"]
            own = [
                f for f in errors if f.episode == columns[turned][0] and ("action", dimension) in f.columns
            ]
            found += bool(own)
            blamed += len(errors) > len(own)
        clean, total = clean + wrong, total + arguments.sets
        shares = (f"{count / arguments.sets:.1%}" for count in (wrong, found, blamed))
        print("{:8} {:6} {:14} {:>25} {:>23} {:>15}".format(episodes, steps, width, *shares), flush=True)
    print(f"clean sets with an error: {clean} of {total}")


if __name__ == "__main__":
    main()
