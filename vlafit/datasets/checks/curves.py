"""Correlations of an episode's frames with its states, at each shift of the frames, by three methods."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.motion import scale_of

GRID = 16  # cells a side into which a frame is averaged
FEATURES = (
    128  # random projections of the cells; with 32 or 64 the shift of a clean episode is off by 3 (LOG.md)
)
FURTHEST = 12  # frames by which a video may be late or early
SHIFTS = range(-FURTHEST, FURTHEST + 1)
MANY = 100  # episodes from which on one more or less changes no fit
RIDGES = (1e-3, 1e-4)  # times the mean variance of a feature; few episodes need less, or more
RIDGE_OF_SPEEDS = 1e-6
RELIABLE = 0.8  # correlation from which on frames show a state dimension
STILL = 1e-6  # a state dimension that varies less says nothing


@cache
def projection() -> NDArray[np.float32]:
    """Return the matrix [GRID * GRID * 3, FEATURES] that makes features of cells, always the same."""
    size = GRID * GRID * 3
    matrix = (np.random.default_rng(0).normal(size=(size, FEATURES)) / np.sqrt(size)).astype(np.float32)
    matrix.flags.writeable = False
    return matrix


@dataclass(frozen=True)
class Track:
    """Measurements of one camera of one episode, step by step."""

    episode: str
    state: NDArray[np.float32]  # [T, s]
    features: NDArray[np.float32]  # [T, FEATURES]
    change: NDArray[np.float64]  # [T - 1], mean absolute difference of neighbouring frames
    speed: NDArray[np.float64]  # [T - 1], of the state


def usual_place(curves: NDArray[np.float64]) -> int:
    """Return the position in the curves [episodes, shifts] at which most episodes do best."""
    return int(np.median(curves, axis=0).argmax())


def motions(tracks: Sequence[Track]) -> NDArray[np.float64]:
    """Return the correlations of the image's change with the speeds of the state's dimensions [n, shifts].

    A camera shows some dimensions better than others, so each speed has a weight, fitted to the other
    episodes; none is negative, because nothing moves without changing the image.
    """
    scale = scale_of([track.state for track in tracks])
    speeds = [scale.each(track.state) for track in tracks]
    changes = [track.change for track in tracks]
    fits = {shift: _fit(speeds, changes, shift) for shift in SHIFTS}
    best = max(fits, key=lambda shift: _height(fits[shift].together(), speeds, changes, shift))
    each = fits[best].each()
    return np.stack(
        [_correlations(s @ w, change) for s, w, change in zip(speeds, each, changes, strict=True)]
    )


@dataclass(frozen=True)
class _Fit:
    """The least squares of the image's change by the speeds and a constant, in each episode."""

    gram: NDArray[np.float64]  # [n, d + 1, d + 1]
    product: NDArray[np.float64]  # [n, d + 1]

    def together(self) -> NDArray[np.float64]:
        """Return the weights [d] fitted to all episodes."""
        return self._weights(self.gram.sum(axis=0), self.product.sum(axis=0))

    def each(self) -> list[NDArray[np.float64]]:
        """Return the weights [d] for each episode, fitted to the others."""
        gram, product = self.gram.sum(axis=0), self.product.sum(axis=0)
        if len(self.gram) > MANY:
            return [self._weights(gram, product)] * len(self.gram)
        return [self._weights(gram - g, product - p) for g, p in zip(self.gram, self.product, strict=True)]

    def _weights(self, gram: NDArray[np.float64], product: NDArray[np.float64]) -> NDArray[np.float64]:
        from scipy.optimize import nnls

        ridge = RIDGE_OF_SPEEDS * np.trace(gram) / len(gram) + 1e-12
        root = np.linalg.cholesky(gram + ridge * np.eye(len(gram)))
        return nnls(root.T, np.linalg.solve(root, product))[0][:-1]


def _fit(speeds: Sequence[NDArray], changes: Sequence[NDArray], shift: int) -> _Fit:
    grams, products = [], []
    for speed, change in zip(speeds, changes, strict=True):
        x, y = overlap(speed, change, shift)
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        grams.append(x.T @ x)
        products.append(x.T @ y)
    return _Fit(np.stack(grams), np.stack(products))


def weights(
    speeds: Sequence[NDArray[np.float64]], changes: Sequence[NDArray[np.float64]], shift: int
) -> NDArray[np.float64]:
    """Return by which weights [d] the speeds of the state make the image's change, `shift` steps later."""
    return _fit(speeds, changes, shift).together()


def overlap(a: NDArray, b: NDArray, shift: int) -> tuple[NDArray, NDArray]:
    """Return the rows of `a` and those of `b` that are `shift` steps later."""
    return a[max(0, -shift) : len(a) - max(0, shift)], b[max(0, shift) : len(b) + min(0, shift)]


def _height(weights: NDArray, speeds: Sequence[NDArray], changes: Sequence[NDArray], shift: int) -> float:
    pairs = (overlap(s @ weights, change, shift) for s, change in zip(speeds, changes, strict=True))
    return float(np.median([correlation(a, b) for a, b in pairs]))


def correlation(a: NDArray, b: NDArray) -> float:
    """Return the correlation of two series, 0 if one of them does not change."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def _correlations(speed: NDArray, change: NDArray) -> NDArray[np.float64]:
    return np.asarray([correlation(*overlap(speed, change, shift)) for shift in SHIFTS])


def predictions(tracks: Sequence[Track]) -> NDArray[np.float64]:
    """Return the correlations of the states with their prediction from frames [n, shifts].

    By the linear map, fitted to the other episodes, that predicts best.
    """
    features, states = [t.features for t in tracks], [t.state.astype(np.float64) for t in tracks]
    ridges = RIDGES[:1] if len(tracks) > MANY else RIDGES
    made = [_predicted(features, states, ridge) for ridge in ridges]
    return max(made, key=lambda curves: float(np.median(curves[:, usual_place(curves)])))


def together(motion: NDArray[np.float64], prediction: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return one curve an episode [n, shifts], of two methods that see different things.

    What it leaves unexplained is the geometric mean of what they do.
    """
    return 1 - np.sqrt(np.clip(1 - motion, 1e-6, None) * np.clip(1 - prediction, 1e-6, None))


def _inputs(features: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)


def _predicted(
    features: list[NDArray[np.float32]], states: list[NDArray[np.float64]], ridge: float
) -> NDArray[np.float64]:
    """Return the correlation of each episode's states with their prediction, for each shift [n, shifts].

    Of the state dimensions that frames show well in most episodes; 0 if there is none.
    """
    spread = np.concatenate(states).std(axis=0)
    moving = spread > STILL
    targets = [rows[:, moving] / spread[moving] for rows in states]
    gram, product = np.zeros((FEATURES + 1,) * 2), np.zeros((FEATURES + 1, int(moving.sum())))
    for f, y in zip(features, targets, strict=True):
        x = _inputs(f)
        gram, product = gram + x.T @ x, product + x.T @ y
    sums = np.zeros((3, len(features), len(SHIFTS), int(moving.sum())))  # of a * b, a * a and b * b
    for n, (f, y) in enumerate(zip(features, targets, strict=True)):
        x = _inputs(f)  # again, because all episodes' would take gigabytes
        others = gram - x.T @ x
        penalty = np.full(len(others), ridge * np.trace(others[:-1, :-1]) / FEATURES + 1e-9)
        penalty[-1] = 1e-9  # the constant term is free
        predicted = x @ np.linalg.solve(others + np.diag(penalty), product - x.T @ y)
        for place, shift in enumerate(SHIFTS):
            a, b = overlap(y, predicted, shift)
            a, b = a - a.mean(axis=0), b - b.mean(axis=0)
            sums[:, n, place] = (a * b).sum(axis=0), (a * a).sum(axis=0), (b * b).sum(axis=0)
    each = sums[0] / np.sqrt(sums[1] * sums[2] + 1e-12)
    shown = np.median(each, axis=0).max(axis=0) >= RELIABLE
    ab, aa, bb = sums[..., shown].sum(axis=-1)
    return ab / np.sqrt(aa * bb + 1e-12)
