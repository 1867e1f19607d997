"""Logistic regression from streamed rows: exact, and for several penalties and labellings in the same passes.

The problem is scikit-learn's: for rows z standardised to mean 0 and variance 1, minimise

    mean over rows of -log softmax(W z + b)[label]  +  penalty / 2 * |W|²

(with two classes, W is one row and the other class has logit 0). A penalty is 1 / (C n_rows) of scikit-learn's.

L-BFGS runs in coordinates in which the Hessian at zero is the identity: `W = V diag(p) Qᵀ`, with the eigenvectors Q
and eigenvalues L of the rows' covariance and `p = (h L + penalty)^(-1/2)`, `h = (1 - 1/K) / K` for K classes.
That changes the path and not the solution: some ten to thirty passes do, where the plain coordinates take hundreds.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from residua.analysis.probes.lbfgs import descend
from residua.analysis.support.moments import Moments

Floats: TypeAlias = npt.NDArray[np.float64]
Codes: TypeAlias = npt.NDArray[np.int64]
Batches: TypeAlias = Callable[[], Iterable[tuple[npt.NDArray[np.floating], Codes]]]
"""A new pass over the rows at each call: (rows, width) values and (rows, labellings) numbers of classes."""


@dataclass(frozen=True)
class Basis:
    """Coordinates of the rows.

    Attributes:
        mean: Of each channel, (width,).
        scale: Standard deviation of each channel, 1 where it is 0, (width,).
        values: Eigenvalues of the covariance of standardised rows, (width,).
        vectors: Its eigenvectors, (width, width); None takes the channels as they are.
    """

    mean: Floats
    scale: Floats
    values: Floats
    vectors: Floats | None

    @classmethod
    def of(cls, moments: Moments) -> "Basis":
        """Return the coordinates that the rows behind `moments` suggest."""
        scale = np.sqrt(moments.variance)
        scale[scale == 0] = 1.0
        if not moments.is_whole:
            return cls(moments.mean, scale, np.ones(len(scale)), None)
        values, vectors = np.linalg.eigh(moments.scatter / (moments.n * np.outer(scale, scale)))
        return cls(moments.mean, scale, np.maximum(values, 0.0), vectors)

    def standardised(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Return float32 or float64 rows with mean 0 and variance 1, in their own type."""
        centred = values - self.mean.astype(values.dtype)
        centred *= (1 / self.scale).astype(values.dtype)
        return centred

    def turned(self, weights: Floats) -> Floats:
        """Return (width, n) weights in these coordinates as weights of standardised rows."""
        return weights if self.vectors is None else self.vectors @ weights

    def turned_back(self, gradients: Floats) -> Floats:
        """Return (width, n) gradients of standardised rows in these coordinates."""
        return gradients if self.vectors is None else self.vectors.T @ gradients


@dataclass(frozen=True)
class Problem:
    """One regression: which labelling, how many classes, and the penalty."""

    labelling: int
    n_classes: int
    penalty: float

    @property
    def n_vectors(self) -> int:
        """Weight vectors: one for two classes."""
        return 1 if self.n_classes == 2 else self.n_classes


@dataclass(frozen=True)
class Fitted:
    """A solution, in the coordinates of the rows as they are stored.

    Attributes:
        weight: (vectors, width) float64.
        bias: (vectors,) float64.
        n_steps: Steps of L-BFGS.
        is_converged: Whether the loss came within the tolerance.
    """

    weight: Floats
    bias: Floats
    n_steps: int
    is_converged: bool


def fit_logistic(
    batches: Batches, problems: Sequence[Problem], basis: Basis, *, tolerance: float = 1e-8, most_passes: int = 300
) -> list[Fitted]:
    """Solve several problems over the same rows, all in the same passes.

    Args:
        batches: Starts a pass over the rows.
        problems: What to solve.
        basis: Of these rows or of more like them; it decides what the penalty means and how fast it goes.
        tolerance: How far the mean loss may be above its minimum, in nats, by the estimate of L-BFGS.
        most_passes: Most passes over the rows.
    """
    width = len(basis.mean)
    scales = [_preconditioner(problem, basis) for problem in problems]

    def unpacked(number: int, point: Floats) -> tuple[Floats, Floats]:
        vectors = point.reshape(width + 1, -1) * scales[number]
        return basis.turned(vectors[:-1]), vectors[-1]

    def evaluate(numbers: Sequence[int], points: Sequence[Floats]) -> list[tuple[float, Floats]]:
        unknown = [unpacked(number, point) for number, point in zip(numbers, points, strict=True)]
        asked = [problems[number] for number in numbers]
        sums = _one_pass(batches, asked, basis, unknown)
        answers = []
        for number, (weights, _), (loss, gradient) in zip(numbers, unknown, sums, strict=True):
            penalty = problems[number].penalty
            loss += penalty / 2 * float(np.vdot(weights, weights))
            down = np.vstack([basis.turned_back(gradient[:-1] + penalty * weights), gradient[-1:]])
            answers.append((loss, (down * scales[number]).reshape(-1)))
        return answers

    starts = [np.zeros((width + 1) * problem.n_vectors) for problem in problems]
    descents = descend(evaluate, starts, tolerance=tolerance, most_passes=most_passes)
    found = []
    for number, descent in enumerate(descents):
        weights, bias = unpacked(number, descent.point)
        weight = np.ascontiguousarray((weights / basis.scale[:, None]).T)
        found.append(Fitted(weight, bias - weight @ basis.mean, descent.n_steps, descent.is_converged))
    return found


def log_losses(logits: npt.NDArray[np.floating], codes: Codes) -> Floats:
    """Return -log probability of each row's class: (rows,) for `logits` (rows, vectors)."""
    whole = _with_zero(logits).astype(np.float64)
    most = whole.max(axis=1)
    return np.asarray(most + np.log(np.exp(whole - most[:, None]).sum(axis=1)) - whole[np.arange(len(codes)), codes])


def probabilities(logits: npt.NDArray[np.floating]) -> Floats:
    """Return the probability of each class, (rows, classes), for `logits` (rows, vectors)."""
    whole = _with_zero(logits).astype(np.float64)
    whole = np.exp(whole - whole.max(axis=1, keepdims=True))
    return np.asarray(whole / whole.sum(axis=1, keepdims=True))


def _preconditioner(problem: Problem, basis: Basis) -> Floats:
    """Return what the entries of a point are multiplied with, (width + 1, 1); the bias stands last."""
    curvature = (1 - 1 / problem.n_classes) / problem.n_classes
    entries = np.append(curvature * basis.values + problem.penalty, curvature)
    return np.asarray(1 / np.sqrt(entries))[:, None]


def _one_pass(
    batches: Batches, problems: Sequence[Problem], basis: Basis, unknown: Sequence[tuple[Floats, Floats]]
) -> list[tuple[float, Floats]]:
    """Return the mean loss of each problem and its gradient, (width + 1, vectors)."""
    weights = np.hstack([weights for weights, _ in unknown])
    bias = np.concatenate([bias for _, bias in unknown])
    ends = np.cumsum([problem.n_vectors for problem in problems]).tolist()
    losses = [0.0] * len(problems)
    gradients = np.zeros((len(basis.mean) + 1, len(bias)))
    n_rows = 0
    for values, codes in batches():
        rows = basis.standardised(values)
        logits = rows @ weights.astype(rows.dtype) + bias.astype(rows.dtype)
        for number, (problem, end) in enumerate(zip(problems, ends, strict=True)):
            part = slice(end - problem.n_vectors, end)
            losses[number] += _residual_(logits[:, part], codes[:, problem.labelling])
        gradients[:-1] += rows.T @ logits
        gradients[-1] += logits.sum(axis=0, dtype=np.float64)
        n_rows += len(rows)
    gradients /= n_rows
    starts = [0, *ends[:-1]]
    return [(loss / n_rows, gradients[:, a:b]) for loss, a, b in zip(losses, starts, ends, strict=True)]


def _residual_(logits: npt.NDArray[np.floating], codes: Codes) -> float:
    """Put probability minus truth in the place of `logits`; return the sum of the losses."""
    whole = _with_zero(logits)
    whole = whole - whole.max(axis=1, keepdims=True)
    at = np.arange(len(codes))
    truth = whole[at, codes].astype(np.float64)
    np.exp(whole, out=whole)
    sums = whole.sum(axis=1, keepdims=True)
    loss = float(np.log(sums, dtype=np.float64).sum() - truth.sum())
    whole /= sums
    whole[at, codes] -= 1
    logits[:] = whole[:, -logits.shape[1] :]
    return loss


def _with_zero(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Return the logits of all classes: of two, the first one's is zero."""
    return np.hstack([np.zeros_like(logits), logits]) if logits.shape[1] == 1 else logits
