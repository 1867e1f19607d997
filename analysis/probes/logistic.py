"""Logistic regression in passes over the rows: exact, and for several penalties and labellings in the same passes.

The problem is scikit-learn's: for rows z standardised to mean 0 and variance 1, minimise

    mean over rows of -log softmax(W z + b)[label]  +  penalty / 2 * |W|²

With two classes, W is one row and the first class has logit 0. A penalty is 1 / (C n_rows), with scikit-learn's C.

L-BFGS starts from the best constant guess, in coordinates in which the Hessian at zero is about the identity. With the
eigenvectors Q and eigenvalues L of the rows' covariance and `p = (h L + penalty)^(-1/2)`, `h = (1 - 1/K) / K` for K
classes, these are `W = V diag(p) Qᵀ`. This changes the path and not the solution. A `Basis` has all eigenvectors, or
only the leading ones, and takes all other directions for equally long: what makes the plain coordinates slow is a few
long directions, and all eigenvectors cost width³, and width² for each row of a sample and each turn of a weight.

The covariance of a sample of the rows is enough (`SAMPLE_ROWS`). `loss_sums` sums losses and gradients over one block
of rows. It depends on its arguments alone, and the sums of several blocks merge, so the blocks of one site can be
summed by several workers.
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
N_LEADING = 64
"""Directions of a basis that has only the leading ones."""
_WIDE = 1024
_ROUNDING = 1e-6  # of the greatest eigenvalue: below this, products in float32 say nothing
_LEAST_SHARE = 1e-7  # of the rows of a class that has none, in the best constant guess


def standardised(values: npt.NDArray[np.floating], mean: Floats, scale: Floats) -> npt.NDArray[np.floating]:
    """Return `values` minus `mean`, divided by `scale`, in their own dtype."""
    centred = values - mean.astype(values.dtype)
    centred *= (1 / scale).astype(values.dtype)
    return centred


@dataclass
class Products(FieldSums):
    """Sums over some standardised rows of their products with themselves.

    Attributes:
        n_rows: Number of rows.
        products: Each row times its products with some directions, (width, directions) float64; or of all pairs of
            channels, (width, width).
        squares: Sum of the squares of all values.
    """

    n_rows: int
    products: Floats
    squares: float

    @classmethod
    def zero(cls, width: int, directions: Floats | None = None) -> "Products":
        """Return the sums over no rows; `directions`, (width, n), or None for all channels."""
        return cls(0, np.zeros((width, width) if directions is None else directions.shape), 0.0)

    def add(self, rows: npt.NDArray[np.floating], directions: Floats | None = None) -> None:
        """Add standardised rows, (rows, width), whose products are computed in their own dtype."""
        self.n_rows += len(rows)
        self.products += rows.T @ (rows if directions is None else rows @ directions.astype(rows.dtype))
        self.squares += float(np.square(rows).sum(dtype=np.float64))


Sampled: TypeAlias = Callable[[Floats | None], Products]
"""Returns the products of a sample of the rows with directions, (width, n), or of all pairs of channels."""


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
        values: Eigenvalues of the covariance of standardised rows, (directions,).
        vectors: Its eigenvectors, (width, directions): all of them, of wide rows float32, as the rows are, half the
            time of each turn; or the leading ones.
        rest: Mean eigenvalue of all other directions.
    """

    mean: Floats
    scale: Floats
    values: Floats
    vectors: npt.NDArray[np.floating]
    rest: float

    @classmethod
    def of(cls, moments: Moments, sampled: Sampled, *, is_whole: bool) -> "Basis":
        """Return coordinates for the rows behind `moments`, along all eigenvectors or along the leading ones.

        The leading ones are those of Nyström's approximation from random directions, multiplied by the covariance once
        (Frangella, Tropp and Udell 2021, "Randomized Nyström Preconditioning"): two products with a sample.
        """
        scale = scale_of(moments)
        width = len(scale)
        if is_whole:
            sample = sampled(None)
            matrix = sample.products / max(1, sample.n_rows)
            # In float32, half the time: the coordinates need not be exact, only the same in both directions.
            values, vectors = eigenvectors_(matrix.astype(np.float32 if width > _WIDE else np.float64))
            return cls(moments.mean, scale, np.maximum(values, 0.0).astype(np.float64), vectors, 0.0)
        drawn = np.random.default_rng(0).standard_normal((width, min(width, N_LEADING)))
        sample = sampled(np.linalg.qr(drawn).Q)
        directions = np.linalg.qr(sample.products).Q
        sample = sampled(directions)
        n_rows = max(1, sample.n_rows)
        products = sample.products / n_rows
        inner = directions.T @ products
        sizes, turns = np.linalg.eigh((inner + inner.T) / 2)
        least = _ROUNDING * float(np.abs(sizes).max()) + np.finfo(np.float64).tiny
        vectors, lengths, _ = np.linalg.svd(products @ turns / np.sqrt(np.maximum(sizes, least)), full_matrices=False)
        values = np.square(lengths)
        rest = max(0.0, sample.squares / n_rows - float(values.sum())) / max(1, width - len(values))
        return cls(moments.mean, scale, values, vectors, rest)

    @property
    def is_whole(self) -> bool:
        """Whether the coordinates are those along all eigenvectors."""
        return len(self.vectors) == len(self.values)

    def weights(self, points: Floats, lengths: Floats, rest: Floats) -> Floats:
        """Return points as weights of standardised rows.

        Args:
            points: (width, n).
            lengths: Of each direction in each column, (directions, n).
            rest: Of all other directions in each column, (n,).
        """
        if self.is_whole:
            return self._product(self.vectors, lengths * points)
        return np.asarray(rest * points + self.vectors @ ((lengths - rest) * (self.vectors.T @ points)))

    def points(self, gradients: Floats, lengths: Floats, rest: Floats) -> Floats:
        """Return gradients by weights as gradients by points: the transpose of `weights`.

        With the inverse of the lengths it is the inverse of `weights`.
        """
        if self.is_whole:
            return lengths * self._product(self.vectors.T, gradients)
        return self.weights(gradients, lengths, rest)

    @staticmethod
    def _product(vectors: npt.NDArray[np.floating], columns: Floats) -> Floats:
        return np.asarray(vectors @ columns.astype(vectors.dtype, copy=False), np.float64)


def has_many_rows(n_rows: int, width: int, n_vectors: int) -> bool:
    """Return whether all eigenvectors pay off: what they save in passes is more than they cost.

    Counted in operations. They cost 14 width³ (of a sample of 4 rows a channel, and LAPACK) and a turn in each pass. If
    the covariance has a long tail, they save half of some 150 passes of one problem, each 4 width for each row and
    vector; beside these vectors, a pass reads the rows, which takes as long as eight.
    """
    return width * (width / 20 + 2 * n_vectors) <= n_rows * (n_vectors + 8)


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


def best_constant(n_rows: Codes, width: int) -> Fitted:
    """Return the best solution without weights: the logarithm of each class's share of the rows.

    Args:
        n_rows: Rows of each class; a class without rows gets a share that does not matter.
        width: Width of a row.
    """
    logits = np.log(np.maximum(n_rows / max(1, n_rows.sum()), _LEAST_SHARE))
    bias = logits[1:] - logits[0] if len(logits) == 2 else logits - logits.mean()
    return Fitted(np.zeros((len(bias), width)), bias, 0, is_converged=False)


Summed: TypeAlias = "Callable[[Sequence[Problem], Floats], LossSums]"
"""Returns the sums over all rows for some problems at weights (width + 1, vectors of all of them): one pass."""


def fit_logistic(
    summed: Summed,
    problems: Sequence[Problem],
    basis: Basis,
    *,
    tolerance: float | Sequence[float] = 1e-8,
    most_passes: int = 300,
    starts: Mapping[int, Fitted] = MappingProxyType({}),
    on_pass: Callable[[float], object] = lambda _: None,
) -> list[Fitted]:
    """Solve several problems over the same rows, all in the same passes.

    Args:
        summed: Makes a pass over the rows.
        problems: The problems.
        basis: Coordinates of these rows, or of a superset of them. The penalty is that of rows standardised by it.
        tolerance: How far the mean loss may be above its minimum, in nats, as L-BFGS estimates it: one number,
            or one for each problem.
        most_passes: Most passes over the rows.
        starts: Solutions of similar problems to begin with, by the number of the problem; others begin with zero.
        on_pass: Called after each pass with the least loss of its problems, in nats.

    Returns:
        One solution for each problem.
    """
    width = len(basis.mean)
    lengths = [_lengths(problem, basis) for problem in problems]

    def lengths_of(numbers: Sequence[int]) -> tuple[Floats, Floats, Floats]:
        """Return the lengths of directions, of all others and of the bias in all columns of several problems."""
        found = np.vstack([lengths[number] for number in numbers])
        columns = np.repeat(found, [problems[number].n_vectors for number in numbers], axis=0).T
        return columns[:-2], columns[-2], columns[-1]

    def weights_at(numbers: Sequence[int], points: Sequence[Floats]) -> Floats:
        """Return the weights of several problems side by side, rotated at once: the basis is large."""
        along, rest, of_bias = lengths_of(numbers)
        weights = np.hstack([point.reshape(width + 1, -1) for point in points])
        weights[:-1] = basis.weights(weights[:-1], along, rest)
        weights[-1] *= of_bias
        return weights

    def start_of(number: int) -> Floats:
        along, rest, of_bias = lengths_of([number])
        found = starts.get(number)
        if found is None:
            return np.zeros((width + 1) * len(rest))
        weight = (found.weight * basis.scale).T  # of standardised rows
        bias = (found.bias + found.weight @ basis.mean) / of_bias
        return np.asarray(np.vstack([basis.points(weight, 1 / along, 1 / rest), bias]).reshape(-1))

    def evaluate(numbers: Sequence[int], points: Sequence[Floats]) -> list[tuple[float, Floats]]:
        asked = [problems[number] for number in numbers]
        along, rest, of_bias = lengths_of(numbers)
        weights = weights_at(numbers, points)
        sums = summed(asked, weights)
        penalties = np.repeat([one.penalty for one in asked], [one.n_vectors for one in asked])
        down = sums.gradients / sums.n_rows
        down[:-1] = basis.points(down[:-1] + penalties * weights[:-1], along, rest)
        down[-1] *= of_bias
        answers = []
        ends = _ends(asked)[:-1]
        parts = zip(
            numbers, sums.losses / sums.n_rows, np.split(weights, ends, 1), np.split(down, ends, 1), strict=True
        )
        for number, loss, weight, gradient in parts:
            loss += problems[number].penalty / 2 * float(np.square(weight[:-1]).sum())
            answers.append((float(loss), gradient.reshape(-1)))
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


def _lengths(problem: Problem, basis: Basis) -> Floats:
    """Return the lengths of the directions of the basis, of all others, and of the bias, (directions + 2,)."""
    curvature = (1 - 1 / problem.n_classes) / problem.n_classes
    along = curvature * np.append(basis.values, basis.rest) + problem.penalty
    return np.asarray(1 / np.sqrt(np.append(along, curvature)))


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
