"""Ridge regression from means and covariances: exact, after one pass, for any number of penalties.

The problem is scikit-learn's `Ridge` on rows z standardised to mean 0 and variance 1: minimise

    mean over rows of (w z + b - y)²  +  penalty * |w|²

A penalty is 1 / n_rows of scikit-learn's alpha. Moments are those of rows with the numbers to predict behind the
channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from residua.analysis.support.moments import Moments

Floats = npt.NDArray[np.float64]


class Line(NamedTuple):
    """A solution, in the coordinates of the rows as they are stored: (width,) weights and a bias."""

    weight: Floats
    bias: float


def solve(moments: Moments, width: int, column: int, penalties: Sequence[float]) -> list[Line]:
    """Return the solution for each penalty.

    Args:
        moments: Whole ones, of (rows, width + columns).
        width: How many channels predict.
        column: Which of the columns behind them is predicted.
        penalties: Above 0.
    """
    scale = np.sqrt(moments.variance[:width])
    scale[scale == 0] = 1.0
    covariance = moments.scatter[:width, :width] / (moments.n * np.outer(scale, scale))
    values, vectors = np.linalg.eigh(covariance)
    turned = vectors.T @ (moments.scatter[:width, width + column] / (moments.n * scale))
    lines = []
    for penalty in penalties:
        weight = vectors @ (turned / (np.maximum(values, 0) + penalty)) / scale
        lines.append(Line(weight, float(moments.mean[width + column] - weight @ moments.mean[:width])))
    return lines


def mean_squared_error(line: Line, moments: Moments, column: int) -> float:
    """Return the mean of (w x + b - y)² over the rows behind `moments`."""
    width = len(line.weight)
    at = width + column
    pull = moments.scatter[:width, at] @ line.weight
    around = moments.scatter[at, at] - 2 * pull + line.weight @ moments.scatter[:width, :width] @ line.weight
    offset = moments.mean[:width] @ line.weight + line.bias - moments.mean[at]
    return float(max(around / moments.n, 0.0) + offset**2)
