"""The closed form of a lens: ridge regression from a point of the residual stream to the final one.

The target is the final residual stream as the final norm sees it (of root mean square 1, for RMS norm): its length
carries nothing that the head reads, and regressing on it wastes the fit on the few longest rows. One pass over the rows
adds up, in float64 and for all layers side by side, what the solution needs; its eigenvectors also whiten the input
for the refinement.

Axes: `N` rows, `D` width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from residua.analysis.lens.decoder import Decoder
from residua.analysis.lens.rows import LensRows, Rows
from residua.analysis.lens.translator import Translator
from residua.store.base.errors import AnalysisError

_PIECE = 8192  # rows that are multiplied at a time in float32
_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the mean variance
_DAMPING = 1e-3  # of the mean variance; without it, directions that hardly vary are blown up


class Gram(NamedTuple):
    """Sums over rows, float64, of what lies at a point, less `origin`, and of its target.

    The origin, close to the mean, keeps channels with a large constant part from drowning the rest in float32.
    """

    n_rows: Tensor
    origin: Tensor
    input_sum: Tensor
    target_sum: Tensor
    input_input: Tensor
    input_target: Tensor

    @classmethod
    def zero(cls, origin: Tensor) -> "Gram":
        """Return the sums over no rows."""
        width = len(origin)
        vector, matrix = (width,), (width, width)
        shapes: tuple[tuple[int, ...], ...] = ((), vector, vector, matrix, matrix)
        n_rows, *sums = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        return cls(n_rows, origin.double(), *sums)

    def add_(self, input_ND: Tensor, target_ND: Tensor) -> None:
        """Add rows, float32."""
        shifted = input_ND - self.origin.float()
        self.n_rows.add_(len(shifted))
        self.input_sum.add_(shifted.sum(0, dtype=torch.float64))
        self.target_sum.add_(target_ND.sum(0, dtype=torch.float64))
        self.input_input.add_(shifted.T @ shifted)
        self.input_target.add_(shifted.T @ target_ND)

    def merge_(self, other: "Gram") -> None:
        """Add the sums over other rows, taken about the same origin."""
        for mine, theirs in zip(self, other, strict=True):
            if mine is not self.origin:
                mine.add_(theirs)


def add_rows(grams: dict[str, Gram], final: str, rows: Rows, reader: LensRows, decoder: Decoder) -> None:
    """Add `rows` to the sums of all sites."""
    for start in range(0, len(rows), _PIECE):
        piece = rows[start : start + _PIECE]
        target = decoder.unit(reader.read(final, piece).float())
        for site, gram in grams.items():
            gram.add_(reader.read(site, piece).float(), target)


@dataclass(frozen=True)
class Ridge:
    """The solution at one point.

    Attributes:
        translator: The map itself.
        penalty: Its penalty, in mean variances, chosen on held-out rows.
        mean: Mean input, (width,), float32.
        whitening: (width, width), float32: centred rows times it have nearly uncorrelated entries of variance 1.
        whitened: The map's weight for whitened rows, (width, width), float32.
        offset: The map's bias for whitened rows, (width,), float32.
    """

    translator: Translator
    penalty: float
    mean: Tensor
    whitening: Tensor
    whitened: Tensor
    offset: Tensor


def solve_ridge(gram: Gram, held_input_ND: Tensor, held_target_ND: Tensor) -> Ridge:
    """Solve for the map that minimises the squared error plus a penalty on its weight, not on its bias.

    Args:
        gram: Sums over the training rows.
        held_input_ND: Rows that choose the penalty by their squared error, float32.
        held_target_ND: Their targets.

    Raises:
        AnalysisError: The rows hold NaN or infinities, or there are none.
    """
    n_rows = gram.n_rows.item()
    if not n_rows or not all(bool(part.isfinite().all()) for part in gram):
        raise AnalysisError(
            f"a lens was to be trained on {n_rows:,.0f} rows, and they hold NaN or infinities, or there are none: "
            "capture in bfloat16 or float32, which do not overflow, or choose other rows"
        )
    shift, offset = gram.input_sum / n_rows, gram.target_sum / n_rows
    mean = gram.origin + shift
    variances, axes = torch.linalg.eigh(gram.input_input / n_rows - torch.outer(shift, shift))
    variances = variances.clamp_min(0)
    scale = max(variances.mean().item(), 1e-30)
    along_axes = axes.T @ (gram.input_target / n_rows - torch.outer(shift, offset))

    def weight(penalty: float) -> Tensor:
        return torch.div(along_axes, (variances + penalty * scale)[:, None])

    rotated, missing = (held_input_ND - mean.float()) @ axes.float(), held_target_ND - offset.float()
    errors = [(rotated @ weight(penalty).float() - missing).square().mean().item() for penalty in _PENALTIES]
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
