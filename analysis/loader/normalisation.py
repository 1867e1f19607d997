"""Scaling activations for training: constants from stored rows, applied to batches and folded back into weights.

| kind | what holds afterwards | as |
| --- | --- | --- |
| ``mean_norm`` | the mean norm of a row is sqrt(width) | Anthropic (April 2024), SAELens `expected_average_only_in` |
| ``standardise`` | every channel has mean 0 and variance 1 | scikit-learn's `StandardScaler` |
| ``whiten`` | rows have mean 0 and the identity as covariance | SAELens `covariance_whitening` (arXiv 2511.13981) |

The constants come from up to 65,536 of the chosen rows, in blocks from all of the archive, and 16 for each channel
where that is more. They follow from archive and choice alone, so all ranks, and a training that is resumed, have the
same. Rows that are not finite are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from torch import Tensor

from residua.analysis.loader.order import ChosenRows, EpochOrder, Numbers, Source
from residua.analysis.support.moments import Floats, Moments
from residua.store.base.errors import AnalysisError

Kind: TypeAlias = Literal["mean_norm", "standardise", "whiten"]

_SAMPLE_ROWS = 2**16
_ROWS_PER_CHANNEL = 16
_PIECE_ROWS = 2**12
_SHRINKAGE = 1e-3  # of the mean variance, added to each direction's


@dataclass(frozen=True)
class Normalisation:
    """The constants of one site: a row becomes ``(row - mean) * factor``, or ``(row - mean) @ factor`` if whitened.

    Attributes:
        kind: ``mean_norm``, ``standardise`` or ``whiten``.
        mean: What is subtracted, float64, (width,); zeros for ``mean_norm``. Sites with heads have all values of a row
            one after the other.
        factor: float64: () for ``mean_norm``, (width,) for ``standardise``, (width, width) for ``whiten``.
        inverse: Undoes `factor`, of the same shape.
    """

    kind: Kind
    mean: Tensor
    factor: Tensor
    inverse: Tensor

    def apply(self, values: Tensor) -> Tensor:
        """Return normalised rows, ``(rows, *row shape)``; float32, or float64 if `values` are."""
        flat = _computable(values.reshape(len(values), -1))
        mean, factor, _ = self._constants(flat)
        return _times(flat - mean, factor).reshape(values.shape)

    def undo(self, values: Tensor) -> Tensor:
        """Return rows as they were before `apply`, ``(rows, *row shape)``; float32, or float64 if `values` are."""
        flat = _computable(values.reshape(len(values), -1))
        mean, _, inverse = self._constants(flat)
        return (_times(flat, inverse) + mean).reshape(values.shape)

    def _constants(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self._single if flat.dtype == torch.float32 else (self.mean, self.factor, self.inverse)
        mean, factor, inverse = (each.to(flat.device) for each in found)
        return mean, factor, inverse

    @cached_property
    def _single(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean.float(), self.factor.float(), self.inverse.float()


def checked_kind(kind: str) -> Kind:
    """Return `kind` if it is one; else raise AnalysisError."""
    if kind not in get_args(Kind):
        raise AnalysisError(f"normalise={kind!r} is unknown: choose {', '.join(get_args(Kind))}, or none")
    return cast("Kind", kind)


def normalisation(site: str, source: Source, chosen: ChosenRows, kind: Kind) -> Normalisation:
    """Compute the constants of a site from some of the chosen rows.

    Args:
        site: Its name, for messages.
        source: Its values.
        chosen: The rows to choose from.
        kind: What shall hold afterwards.

    Raises:
        AnalysisError: No row is finite, or all are zero.
    """
    width = int(np.prod(source.shape[1:]))
    moments, norms = Moments(width, full=kind == "whiten"), 0.0
    for rows in _sample(chosen, max(_SAMPLE_ROWS, _ROWS_PER_CHANNEL * width)):
        values: Floats = np.asarray(source.numpy(rows, dtype=np.float64), np.float64).reshape(len(rows), width)
        values = values[np.isfinite(values).all(axis=1)]
        norms += float(np.linalg.norm(values, axis=1).sum())
        moments.add(values)
    if not norms or not np.isfinite(norms):
        raise AnalysisError(
            f"{site} cannot be normalised: of the rows that were looked at, {moments.n:,} are finite, and the sum of "
            f"their norms is {norms}: choose other rows or another site"
        )
    if kind == "mean_norm":
        return _of(kind, np.zeros(width), np.array(width**0.5 * moments.n / norms))
    if kind == "standardise":
        deviation = np.sqrt(moments.variance)
        return _of(kind, moments.mean, 1 / np.where(deviation > 0, deviation, 1))
    variances, directions = np.linalg.eigh(moments.scatter / moments.n)
    spread = np.sqrt(np.maximum(variances, 0) + _SHRINKAGE * float(moments.variance.mean()))
    return _of(kind, moments.mean, directions / spread, spread[:, None] * directions.T)


def _of(kind: Kind, mean: Floats, factor: Floats, inverse: Floats | None = None) -> Normalisation:
    undone = 1 / factor if inverse is None else inverse
    return Normalisation(kind, *(torch.from_numpy(np.asarray(each)) for each in (mean, factor, undone)))


def _sample(chosen: ChosenRows, n_rows: int) -> Sequence[Numbers]:
    """Return numbers of rows in pieces that fit into memory: blocks in random order, each time the same."""
    order = EpochOrder(chosen, np.random.default_rng(0))
    found: list[Numbers] = []
    for piece in order.rows(0, min(n_rows, order.n_rows)):
        rows = np.asarray(piece)
        found += [rows[at : at + _PIECE_ROWS] for at in range(0, len(rows), _PIECE_ROWS)]
    return found


def _times(flat: Tensor, factor: Tensor) -> Tensor:
    return flat @ factor if factor.ndim == 2 else flat * factor


def _computable(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
