"""How closely unrelated motion, as smooth as the recorded one, follows a state by chance.

Smooth signals of a few episodes correlate strongly at some lag with some dimension although nothing connects
them. Surrogates of an action keep how smooth it is and forget when it moved: the phases of its frequencies
are random in each episode.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.finding import Columns

SURROGATES = 60  # of each dimension
BEYOND = 4.0  # standard deviations above the mean of the surrogates: 0.3 % of maxima (Gumbel's distribution)
MOVING = 1e-6  # a range below this is no motion
MOST = 1 - 1e-9  # of a correlation, so that its Fisher transform is finite


def by_chance(columns: Columns, dimensions: Sequence[int], furthest: int) -> NDArray[np.float64]:
    """Return the correlation that each of the actions' `dimensions` may reach without driving any state.

    It is the largest at any lag up to `furthest`, with any dimension of the state or of its steps, in the
    median of the episodes.
    """
    rng = np.random.default_rng(0)  # the same finding in every check
    made = [
        np.concatenate([surrogates(actions[:, d], SURROGATES, rng) for d in dimensions], axis=1)
        for _, _, actions in columns
    ]
    heights = np.zeros(len(dimensions) * SURROGATES)
    for difference in (False, True):
        each = [
            curves(np.diff(state, axis=0), actions[:-1], furthest)
            if difference
            else curves(state, actions, furthest)
            for (_, state, _), actions in zip(columns, made, strict=True)
        ]
        heights = np.maximum(heights, np.abs(np.median(each, axis=0)).max(axis=(0, 2)))
    fisher = np.arctanh(np.minimum(heights, MOST)).reshape(len(dimensions), SURROGATES)
    return np.tanh(fisher.mean(axis=1) + BEYOND * fisher.std(axis=1))


def surrogates(values: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return `count` series [T, count] with the frequencies of `values` [T] and random phases.

    The series is mirrored at its end before, so that an end that differs from the start adds no frequencies.
    """
    mirrored = np.concatenate([values, values[::-1]])
    sizes = np.abs(np.fft.rfft(mirrored - mirrored.mean()))
    phases = np.exp(2j * np.pi * rng.random((len(sizes), count)))
    phases[-1] = np.sign(phases[-1].real)  # the last frequency of an even number of steps is real
    return np.fft.irfft(sizes[:, None] * phases, len(mirrored), axis=0)[: len(values)]


def curves(state: NDArray[np.float64], actions: NDArray[np.float64], furthest: int) -> NDArray[np.float64]:
    """Return the correlations of actions[t] [T, a] with state[t + lag] [T, s], for all lags up to `furthest`.

    [2 * furthest + 1, a, s]; 0 where one of the two does not move.
    """
    length = len(state)
    x, a = (values - values.mean(axis=0) for values in (state, actions))
    sums = [(_summed(values), _summed(values * values)) for values in (a, x)]
    made = []
    for lag in range(-furthest, furthest + 1):
        first, count = max(0, -lag), length - abs(lag)
        ends = [(first, first + count), (first + lag, first + lag + count)]
        parts = []
        for (total, squared), (start, end) in zip(sums, ends, strict=True):
            mean = (total[end] - total[start]) / count
            parts.append((mean, np.maximum(squared[end] - squared[start] - count * mean**2, 0.0)))
        (mean_a, size_a), (mean_x, size_x) = parts
        product = a[ends[0][0] : ends[0][1]].T @ x[ends[1][0] : ends[1][1]] - count * np.outer(mean_a, mean_x)
        size = np.sqrt(np.outer(size_a, size_x))
        made.append(np.where(size > MOVING**2, product / np.maximum(size, MOVING**2), 0.0))
    return np.stack(made)


def _summed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
