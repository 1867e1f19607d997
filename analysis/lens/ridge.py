"""The closed form of a lens: ridge regression (Hoerl and Kennard 1970) from a point of the residual stream to the end.

The target is the final residual stream as normalised by the final norm, without its parameters. Its length does not
affect the logits, and with it the fit would serve the few longest rows. One pass over the rows computes the sums that
the solution needs, in float64 and for all layers together. Their eigenvectors also whiten the input of the refinement.

Axes: `N` rows, `D` width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from residua.analysis.lens.checkpoint import Translator
from residua.analysis.lens.rows import LensRows, Rows
from residua.analysis.lens.unembedding import Decoder
from residua.analysis.support.eigen import eigenvectors_
from residua.store.base.errors import AnalysisError

_BATCH_ROWS = 8192  # rows that are multiplied at a time in float32
_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # in units of the mean variance
_BLOCK_COLUMNS = 256
_DAMPING = 1e-3  # in units of the mean variance; without it, whitening enlarges directions that hardly vary


def fit_bytes(width: int, n_held_out: int) -> int:
    """Return the most memory that `solve_ridge` takes in bytes, its arguments included, and the refinement thereafter.

    Three matrices of float64 (covariance, eigenvectors and cross products), or two and two of float32 (maps); the
    refinement has six of float32. Besides there are blocks of columns, and the held-out rows: both arguments as they
    are, centred, and along the eigenvectors.
    """
    return 24 * width**2 + 32 * min(_BLOCK_COLUMNS, width) * width + 5 * 4 * n_held_out * width


class Gram(NamedTuple):
    """Sums over rows of the values at a point, minus `origin`, and of their targets, all float64.

    The origin is close to the mean, so that products keep their digits in float32 although some channels are large and
    nearly constant. The matrices may be a block of their columns, so that those of a wide model fit into memory.
    """

    n_rows: Tensor
    origin: Tensor
    input_sum: Tensor
    target_sum: Tensor
    input_input: Tensor
    input_target: Tensor

    @classmethod
    def zero(cls, origin: Tensor, n_columns: int | None = None) -> Self:
        """Return the sums over no rows, with all columns of the matrices or `n_columns` of them."""
        width = len(origin)
        shapes = ((), (width,), (width,), *2 * ((width, width if n_columns is None else n_columns),))
        n_rows, *sums = (torch.zeros(shape, dtype=torch.float64, device=origin.device) for shape in shapes)
        return cls(n_rows, origin.float().double(), *sums)  # as it is subtracted from rows in float32

    def add_(self, input_ND: Tensor, target_ND: Tensor, columns: slice = slice(None)) -> None:
        """Add rows and their targets, (rows, width), float32, to the matrices' `columns`."""
        shifted = input_ND - self.origin.float()
        self.n_rows.add_(len(shifted))
        self.input_sum.add_(shifted.sum(0, dtype=torch.float64))
        self.target_sum.add_(target_ND.sum(0, dtype=torch.float64))
        self.input_input.add_(shifted.T @ shifted[:, columns])
        self.input_target.add_(shifted.T @ target_ND[:, columns])

    def merge_(self, other: Self) -> Self:
        """Add the sums over other rows, with the same origin and columns."""
        for mine, theirs in zip(self, other, strict=True):
            if mine is not self.origin:
                mine.add_(theirs)
        return self

    @classmethod
    def joined(cls, blocks: Sequence[Self]) -> Self:
        """Return all columns, of which `blocks` hold neighbouring ones in order."""
        matrices = (torch.cat([block[at] for block in blocks], 1) for at in (4, 5))
        return cls(*blocks[0][:4], *matrices)


def add_rows(
    grams: Mapping[str, Gram],
    final: str,
    rows: Rows,
    reader: LensRows,
    decoder: Decoder,
    *,
    columns: slice = slice(None),
) -> None:
    """Add `rows` to the sums of all sites; `final` is the site of the final residual stream."""
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = rows[start : start + _BATCH_ROWS]
        target = decoder.normalise(reader.read(final, batch).to(decoder.device).float())
        for site, gram in grams.items():
            gram.add_(reader.read(site, batch).to(decoder.device).float(), target, columns)


@dataclass(frozen=True)
class Ridge:
    """The solution at one point.

    Attributes:
        translator: The map.
        penalty: Its penalty, in units of the mean variance, chosen on held-out rows.
        mean: Mean input, (width,), float32.
        whitening: (width, width), float32: centred rows times this matrix have nearly uncorrelated channels of
            variance 1.
        whitened: The map for whitened rows, (width + 1, width), float32; the bias stands last. The refinement begins
            with it, and changes it.
    """

    translator: Translator
    penalty: float
    mean: Tensor
    whitening: Tensor
    whitened: Tensor


def solve_ridge(gram: Gram, held_input_ND: Tensor, held_target_ND: Tensor) -> Ridge:
    """Solve for the map with the least squared error plus a penalty on its weight; the bias has no penalty.

    `fit_bytes` tells the memory that it takes.

    Args:
        gram: Sums over the training rows; its matrices are overwritten.
        held_input_ND: Held-out rows; the penalty with the least squared error on them is chosen. float32.
        held_target_ND: Their targets.

    Raises:
        AnalysisError: There are no training rows, or they hold NaN or infinite values.
    """
    n_rows = gram.n_rows.item()
    if not n_rows or not all(bool(tensor.isfinite().all()) for tensor in gram[:4]):
        raise AnalysisError(
            f"a lens cannot be trained on {n_rows:,.0f} rows that hold NaN or infinite values, or on none: capture in "
            "bfloat16 or float32, which do not overflow, or choose other rows"
        )
    shift, offset = gram.input_sum / n_rows, gram.target_sum / n_rows
    mean = gram.origin + shift
    covariance = gram.input_input.div_(n_rows).addr_(shift, shift, alpha=-1)
    variances, axes = (torch.from_numpy(array) for array in eigenvectors_(covariance.numpy()))
    covariance.data = covariance.new_empty(0)  # the memory goes, whoever else has the sums
    variances = variances.clamp_min(0)
    scale = max(variances.mean().item(), 1e-30)
    cross = gram.input_target.div_(n_rows).addr_(shift, offset, alpha=-1)
    along_axes = axes.T @ cross
    cross.data = cross.new_empty(0)
    blocks = [slice(start, start + _BLOCK_COLUMNS) for start in range(0, len(mean), _BLOCK_COLUMNS)]

    def weight(penalty: float, along_columns: Tensor) -> Tensor:
        return torch.div(along_columns, (variances + penalty * scale)[:, None])

    centred, residual = held_input_ND - mean.float(), held_target_ND - offset.float()
    rotated = torch.empty_like(centred)
    for columns in blocks:
        rotated[:, columns] = centred @ axes[:, columns].float()
    errors = [
        sum(
            (rotated @ weight(penalty, along_axes[:, columns]).float() - residual[:, columns])
            .square()
            .sum(dtype=torch.float64)
            .item()
            for columns in blocks
        )
        for penalty in _PENALTIES
    ]
    penalty = _PENALTIES[errors.index(min(errors))]
    deviations = (variances + _DAMPING * scale).sqrt()
    del centred, residual, rotated
    width = len(mean)
    solution, bias = torch.empty(width, width), torch.empty(width)
    whitened = torch.empty(width + 1, width)
    whitened[-1] = offset.float()
    for columns in blocks:
        along = weight(penalty, along_axes[:, columns])
        exact = axes @ along
        solution[:, columns] = exact.float()
        bias[columns] = (offset[columns] - mean @ exact).float()
        whitened[:-1, columns] = along.mul_(deviations[:, None]).float()
    del along_axes  # before another matrix
    whitening = torch.empty(width, width)
    for columns in blocks:
        whitening[:, columns] = (axes[:, columns] / deviations[columns]).float()
    return Ridge(Translator(solution, bias), penalty, mean.float(), whitening, whitened)
