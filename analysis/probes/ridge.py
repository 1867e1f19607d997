"""Ridge regression from means and covariances: exact, after one pass, for any number of penalties.

Ridge regression is that of Hoerl and Kennard (1970), "Ridge Regression: Biased Estimation for Nonorthogonal Problems".
The problem is scikit-learn's `Ridge` on rows z standardised to mean 0 and variance 1: minimise

    mean over rows of (w z + b - y)²  +  penalty * |w|²

A penalty is scikit-learn's alpha divided by the number of rows. The moments are those of rows to which the numbers to
predict were appended as further channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from residua.analysis.support.moments import Moments

Floats = npt.NDArray[np.float64]


class Line(NamedTuple):
    """A solution for rows as they are stored: weights, (width,) float64, and a bias."""

    weight: Floats
    bias: float


def solve(moments: Moments, width: int, column: int, penalties: Sequence[float]) -> list[Line]:
    """Return the solution for each penalty.

    Args:
        moments: Moments of (rows, width + columns), with the scatter of all pairs.
        width: Number of channels that predict.
        column: Number of the appended column that is predicted.
        penalties: Numbers above 0.
    """
    scale = np.sqrt(moments.variance[:width])
    scale[scale == 0] = 1.0
    covariance = moments.scatter[:width, :width] / (moments.n * np.outer(scale, scale))
    values, vectors = np.linalg.eigh(covariance)
    rotated = vectors.T @ (moments.scatter[:width, width + column] / (moments.n * scale))
    lines = []
    for penalty in penalties:
        weight = vectors @ (rotated / (np.maximum(values, 0) + penalty)) / scale
        lines.append(Line(weight, float(moments.mean[width + column] - weight @ moments.mean[:width])))
    return lines


def mean_squared_error(line: Line, moments: Moments, column: int) -> float:
    """Return the mean of (w x + b - y)² over the rows behind `moments`."""
    width = len(line.weight)
    at = width + column
    cross = moments.scatter[:width, at] @ line.weight
    scatter = moments.scatter[at, at] - 2 * cross + line.weight @ moments.scatter[:width, :width] @ line.weight
    offset = moments.mean[:width] @ line.weight + line.bias - moments.mean[at]
    return float(max(scatter / moments.n, 0.0) + offset**2)
