"""Logistic regression in passes over the rows: exact, and for several penalties and labellings in the same passes.

The problem is scikit-learn's: for rows z standardised to mean 0 and variance 1, minimise

    mean over rows of -log softmax(W z + b)[label]  +  penalty / 2 * |W|²

With two classes, W is one row and the first class has logit 0. A penalty is 1 / (C n_rows), with scikit-learn's C.

L-BFGS runs in coordinates in which the Hessian at zero is the identity: `W = V diag(p) Qᵀ`, with the eigenvectors Q
and eigenvalues L of the rows' covariance and `p = (h L + penalty)^(-1/2)`, `h = (1 - 1/K) / K` for K classes. This
changes the path and not the solution: ten to thirty passes are enough, where the plain coordinates take hundreds.

The covariance of a sample of the rows is enough for that (`SAMPLE_ROWS`): it costs width² for each row, far more than a
pass. `loss_sums` sums losses and gradients over one block of rows. It depends on its arguments alone, and the sums of
several blocks merge, so the blocks of one site can be summed by several workers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from residua.analysis.probes.lbfgs import minimise
from residua.analysis.support.eigen import eigenvectors_
from residua.analysis.support.moments import Moments
from residua.analysis.support.sums import FieldSums

Floats: TypeAlias = npt.NDArray[np.float64]
Codes: TypeAlias = npt.NDArray[np.int64]


SAMPLE_ROWS = 4
"""Rows for each channel of the sample that gives the coordinates: its covariance is then right within a factor of 2."""
_WIDE = 1024


def standardised(values: npt.NDArray[np.floating], mean: Floats, scale: Floats) -> npt.NDArray[np.floating]:
    """Return `values` minus `mean`, divided by `scale`, in their own dtype."""
    centred = values - mean.astype(values.dtype)
    centred *= (1 / scale).astype(values.dtype)
    return centred


@dataclass
class Covariance(FieldSums):
    """Sums over some standardised rows of the products of all pairs of channels, (width, width) float64."""

    n_rows: int
    products: Floats

    @classmethod
    def zero(cls, width: int) -> "Covariance":
        """Return the sums over no rows."""
        return cls(0, np.zeros((width, width)))

    def add(self, rows: npt.NDArray[np.floating]) -> None:
        """Add standardised rows, (rows, width), whose products are computed in their own dtype."""
        self.n_rows += len(rows)
        self.products += rows.T @ rows


def scale_of(moments: Moments) -> Floats:
    """Return the standard deviation of each channel, 1 where it is 0, (width,)."""
    scale = np.sqrt(moments.variance)
    scale[scale == 0] = 1.0
    return np.asarray(scale)


@dataclass(frozen=True)
class Basis:
    """Coordinates of the rows, all float64 unless said otherwise.

    Attributes:
        mean: Mean of each channel, (width,).
        scale: Standard deviation of each channel, 1 where it is 0, (width,).
        values: Eigenvalues of the covariance of standardised rows, (width,).
        vectors: Its eigenvectors, (width, width), of wide rows float32, as the rows are: half the time of each turn.
            None: the standardised channels are the coordinates.
    """

    mean: Floats
    scale: Floats
    values: Floats
    vectors: npt.NDArray[np.floating] | None

    @classmethod
    def of(cls, moments: Moments, sample: "Covariance | None") -> "Basis":
        """Return coordinates for the rows behind `moments`.

        Args:
            moments: The rows' mean and variance.
            sample: Products of the channels of some standardised rows; None: the standardised channels are enough.
        """
        scale = scale_of(moments)
        if sample is None:
            return cls(moments.mean, scale, np.ones(len(scale)), None)
        matrix = sample.products / max(1, sample.n_rows)
        # In float32, half the time: the coordinates need not be exact, only the same in both directions.
        values, vectors = eigenvectors_(matrix.astype(np.float32 if len(scale) > _WIDE else np.float64))
        return cls(moments.mean, scale, np.maximum(values, 0.0).astype(np.float64), vectors)

    def rotated(self, weights: Floats) -> Floats:
        """Return weights in these coordinates, (width, n), as weights of standardised rows."""
        if self.vectors is None:
            return weights
        return np.asarray(self.vectors @ weights.astype(self.vectors.dtype, copy=False), np.float64)

    def rotated_back(self, gradients: Floats) -> Floats:
        """Return gradients by weights of standardised rows, (width, n), in these coordinates."""
        if self.vectors is None:
            return gradients
        return np.asarray(self.vectors.T @ gradients.astype(self.vectors.dtype, copy=False), np.float64)


@dataclass(frozen=True)
class Problem:
    """One regression: the number of its labelling, its number of classes, and its penalty."""

    labelling: int
    n_classes: int
    penalty: float

    @property
    def n_vectors(self) -> int:
        """Number of weight vectors: one for two classes, else one for each class."""
        return 1 if self.n_classes == 2 else self.n_classes


@dataclass(frozen=True)
class Fitted:
    """A solution for rows as they are stored.

    Attributes:
        weight: (vectors, width) float64.
        bias: (vectors,) float64.
        n_steps: Steps of L-BFGS.
        is_converged: Whether the loss is within the tolerance of its minimum.
    """

    weight: Floats
    bias: Floats
    n_steps: int
    is_converged: bool


Summed: TypeAlias = "Callable[[Sequence[Problem], Floats], LossSums]"
"""Returns the sums over all rows for some problems at weights (width + 1, vectors of all of them): one pass."""


def fit_logistic(
    summed: Summed,
    problems: Sequence[Problem],
    basis: Basis,
    *,
    tolerance: float = 1e-8,
    most_passes: int = 300,
    starts: Mapping[int, Fitted] = MappingProxyType({}),
    on_pass: Callable[[float], object] = lambda _: None,
) -> list[Fitted]:
    """Solve several problems over the same rows, all in the same passes.

    Args:
        summed: Makes a pass over the rows.
        problems: The problems.
        basis: Coordinates of these rows, or of a superset of them. The penalty is that of rows standardised by it.
        tolerance: How far the mean loss may be above its minimum, in nats, as L-BFGS estimates it.
        most_passes: Most passes over the rows.
        starts: Solutions of similar problems to begin with, by the number of the problem; others begin with zero.
        on_pass: Called after each pass with the least loss of its problems, in nats.

    Returns:
        One solution for each problem.
    """
    width = len(basis.mean)
    scales = [_preconditioner(problem, basis) for problem in problems]

    def weights_at(numbers: Sequence[int], points: Sequence[Floats]) -> Floats:
        """Return the weights of several problems side by side, turned at once: the basis is large."""
        scaled = [point.reshape(width + 1, -1) * scales[number] for number, point in zip(numbers, points, strict=True)]
        vectors = np.hstack(scaled)
        vectors[:-1] = basis.rotated(vectors[:-1])
        return vectors

    def start_of(number: int) -> Floats:
        found = starts.get(number)
        if found is None:
            return np.zeros((width + 1) * problems[number].n_vectors)
        weight = (found.weight * basis.scale).T  # of standardised rows
        bias = found.bias + found.weight @ basis.mean
        return np.asarray((np.vstack([basis.rotated_back(weight), bias]) / scales[number]).reshape(-1))

    def evaluate(numbers: Sequence[int], points: Sequence[Floats]) -> list[tuple[float, Floats]]:
        asked = [problems[number] for number in numbers]
        weights = weights_at(numbers, points)
        sums = summed(asked, weights)
        penalties = np.repeat([one.penalty for one in asked], [one.n_vectors for one in asked])
        down = sums.gradients / sums.n_rows
        down[:-1] = basis.rotated_back(down[:-1] + penalties * weights[:-1])
        answers = []
        ends = _ends(asked)[:-1]
        parts = zip(
            numbers, sums.losses / sums.n_rows, np.split(weights, ends, 1), np.split(down, ends, 1), strict=True
        )
        for number, loss, weight, gradient in parts:
            loss += problems[number].penalty / 2 * float(np.square(weight[:-1]).sum())
            answers.append((float(loss), (gradient * scales[number]).reshape(-1)))
        on_pass(min(loss for loss, _ in answers))
        return answers

    found = []
    points = [start_of(number) for number in range(len(problems))]
    size = math.log(max(problem.n_classes for problem in problems))  # the loss at zero
    descents = minimise(evaluate, points, tolerance=tolerance, most_passes=most_passes, size=size)
    for number, descent in enumerate(descents):
        weights = weights_at([number], [descent.point])
        weight = np.ascontiguousarray((weights[:-1] / basis.scale[:, None]).T)
        found.append(Fitted(weight, weights[-1] - weight @ basis.mean, descent.n_steps, descent.is_converged))
    return found


@dataclass
class LossSums(FieldSums):
    """Sums over some rows, for several problems at some weights each; those of several blocks add up.

    Attributes:
        n_rows: Number of rows.
        losses: Of each problem, (problems,) float64.
        gradients: By the weights of all problems, (width + 1, vectors) float64; the bias stands last.
    """

    n_rows: int
    losses: Floats
    gradients: Floats

    @classmethod
    def zero(cls, n_problems: int, shape: tuple[int, ...]) -> "LossSums":
        """Return the sums over no rows for weights of this shape."""
        return cls(0, np.zeros(n_problems), np.zeros(shape))


def loss_sums(rows: npt.NDArray[np.floating], codes: Codes, problems: Sequence[Problem], weights: Floats) -> LossSums:
    """Sum losses and gradients over one block of rows; a function of its arguments alone.

    Args:
        rows: Standardised, (rows, width) float32 or float64, in which the products are computed.
        codes: Numbers of classes, (rows, labellings).
        problems: The problems, without their penalties.
        weights: Of standardised rows, (width + 1, vectors of all problems); the bias stands last.
    """
    logits = rows @ weights[:-1].astype(rows.dtype) + weights[-1].astype(rows.dtype)
    losses = np.zeros(len(problems))
    for number, (problem, end) in enumerate(zip(problems, _ends(problems), strict=True)):
        losses[number] = _residual_(logits[:, end - problem.n_vectors : end], codes[:, problem.labelling])
    gradients = np.vstack([rows.T @ logits, logits.sum(axis=0, dtype=np.float64)])
    return LossSums(len(rows), losses, gradients)


def _ends(problems: Sequence[Problem]) -> list[int]:
    """Return the number of the column after the last of each problem."""
    ends: list[int] = np.cumsum([problem.n_vectors for problem in problems]).tolist()
    return ends


def log_losses(logits: npt.NDArray[np.floating], codes: Codes) -> Floats:
    """Return -log probability of each row's class: (rows,) for `logits` (rows, vectors)."""
    scores = _with_zero(logits).astype(np.float64)
    most = scores.max(axis=1)
    return np.asarray(most + np.log(np.exp(scores - most[:, None]).sum(axis=1)) - scores[np.arange(len(codes)), codes])


def probabilities(logits: npt.NDArray[np.floating]) -> Floats:
    """Return the probability of each class, (rows, classes), for `logits` (rows, vectors)."""
    return np.asarray(softmax(_with_zero(logits).astype(np.float64), axis=1))


def _preconditioner(problem: Problem, basis: Basis) -> Floats:
    """Return the factors of the entries of a point, (width + 1, 1); the bias stands last."""
    curvature = (1 - 1 / problem.n_classes) / problem.n_classes
    entries = np.append(curvature * basis.values + problem.penalty, curvature)
    return np.asarray(1 / np.sqrt(entries))[:, None]


def _residual_(logits: npt.NDArray[np.floating], codes: Codes) -> float:
    """Replace `logits` by probability minus truth, and return the sum of the losses."""
    scores = _with_zero(logits)
    scores = scores - scores.max(axis=1, keepdims=True)
    at = np.arange(len(codes))
    truth = scores[at, codes].astype(np.float64)
    np.exp(scores, out=scores)
    sums = scores.sum(axis=1, keepdims=True)
    loss = float(np.log(sums, dtype=np.float64).sum() - truth.sum())
    scores /= sums
    scores[at, codes] -= 1
    logits[:] = scores[:, -logits.shape[1] :]
    return loss


def _with_zero(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Return the logits of all classes; the first of two classes has logit zero."""
    return np.hstack([np.zeros_like(logits), logits]) if logits.shape[1] == 1 else logits
