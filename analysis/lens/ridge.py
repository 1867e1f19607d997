"""The closed form of a lens: ridge regression (Hoerl and Kennard 1970) from a point of the residual stream to the end.

The target is the final residual stream as normalised by the final norm, without its parameters. Its length does not
affect the logits, and with it the fit would serve the few longest rows. One pass over the rows computes the sums that
the solution needs, in float64 and for all layers together. Their eigenvectors also whiten the input of the refinement.

Axes: `N` rows, `D` width.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from residua.analysis.lens.checkpoint import Translator
from residua.analysis.lens.rows import LensRows, Rows
from residua.analysis.lens.unembedding import Decoder
from residua.store.base.errors import AnalysisError

_BATCH_ROWS = 8192  # rows that are multiplied at a time in float32
_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # in units of the mean variance
_DAMPING = 1e-3  # in units of the mean variance; without it, whitening enlarges directions that hardly vary


class Gram(NamedTuple):
    """Sums over rows of the values at a point, minus `origin`, and of their targets, all float64.

    The origin is close to the mean, so that products keep their digits in float32 although some channels are large and
    nearly constant.
    """

    n_rows: Tensor
    origin: Tensor
    input_sum: Tensor
    target_sum: Tensor
    input_input: Tensor
    input_target: Tensor

    @classmethod
    def zero(cls, origin: Tensor) -> Self:
        """Return the sums over no rows."""
        width = len(origin)
        n_rows, *sums = (torch.zeros((width,) * rank, dtype=torch.float64) for rank in (0, 1, 1, 2, 2))
        return cls(n_rows, origin.double(), *sums)

    def add_(self, input_ND: Tensor, target_ND: Tensor) -> None:
        """Add rows and their targets, (rows, width), float32."""
        shifted = input_ND - self.origin.float()
        self.n_rows.add_(len(shifted))
        self.input_sum.add_(shifted.sum(0, dtype=torch.float64))
        self.target_sum.add_(target_ND.sum(0, dtype=torch.float64))
        self.input_input.add_(shifted.T @ shifted)
        self.input_target.add_(shifted.T @ target_ND)

    def merge_(self, other: Self) -> None:
        """Add the sums over other rows, with the same origin."""
        for mine, theirs in zip(self, other, strict=True):
            if mine is not self.origin:
                mine.add_(theirs)


def add_rows(grams: dict[str, Gram], final: str, rows: Rows, reader: LensRows, decoder: Decoder) -> None:
    """Add `rows` to the sums of all sites; `final` is the site of the final residual stream."""
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = rows[start : start + _BATCH_ROWS]
        target = decoder.normalise(reader.read(final, batch).float())
        for site, gram in grams.items():
            gram.add_(reader.read(site, batch).float(), target)


@dataclass(frozen=True)
class Ridge:
    """The solution at one point.

    Attributes:
        translator: The map.
        penalty: Its penalty, in units of the mean variance, chosen on held-out rows.
        mean: Mean input, (width,), float32.
        whitening: (width, width), float32: centred rows times this matrix have nearly uncorrelated channels of
            variance 1.
        whitened: Weight of the map for whitened rows, (width, width), float32.
        offset: Bias of the map for whitened rows, (width,), float32.
    """

    translator: Translator
    penalty: float
    mean: Tensor
    whitening: Tensor
    whitened: Tensor
    offset: Tensor


def solve_ridge(gram: Gram, held_input_ND: Tensor, held_target_ND: Tensor) -> Ridge:
    """Solve for the map with the least squared error plus a penalty on its weight; the bias has no penalty.

    Args:
        gram: Sums over the training rows.
        held_input_ND: Held-out rows; the penalty with the least squared error on them is chosen. float32.
        held_target_ND: Their targets.

    Raises:
        AnalysisError: There are no training rows, or they hold NaN or infinite values.
    """
    n_rows = gram.n_rows.item()
    if not n_rows or not all(bool(tensor.isfinite().all()) for tensor in gram):
        raise AnalysisError(
            f"a lens cannot be trained on {n_rows:,.0f} rows that hold NaN or infinite values, or on none: capture in "
            "bfloat16 or float32, which do not overflow, or choose other rows"
        )
    shift, offset = gram.input_sum / n_rows, gram.target_sum / n_rows
    mean = gram.origin + shift
    variances, axes = torch.linalg.eigh(gram.input_input / n_rows - torch.outer(shift, shift))
    variances = variances.clamp_min(0)
    scale = max(variances.mean().item(), 1e-30)
    along_axes = axes.T @ (gram.input_target / n_rows - torch.outer(shift, offset))

    def weight(penalty: float) -> Tensor:
        return torch.div(along_axes, (variances + penalty * scale)[:, None])

    rotated, residual = (held_input_ND - mean.float()) @ axes.float(), held_target_ND - offset.float()
    errors = [(rotated @ weight(penalty).float() - residual).square().mean().item() for penalty in _PENALTIES]
    penalty = _PENALTIES[errors.index(min(errors))]
    solution = axes @ weight(penalty)
    deviations = (variances + _DAMPING * scale).sqrt()
    return Ridge(
        translator=Translator(solution.float(), (offset - mean @ solution).float()),
        penalty=penalty,
        mean=mean.float(),
        whitening=(axes / deviations).float(),
        whitened=(deviations[:, None] * weight(penalty)).float(),
        offset=offset.float(),
    )
