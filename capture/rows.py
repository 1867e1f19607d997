"""From a padded batch to rows: which entry of a site's tensor is which row of the archive.

Legend: `B` examples in the batch, `T` padded positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from residua.capture.placement import BatchRows, Indices
from residua.store.errors import CaptureError


@dataclass(frozen=True, kw_only=True)
class ExampleRows:
    """One example of a batch.

    Attributes:
        example: Its number in the archive.
        first_row: Row of its first kept position.
        input_ids: Its tokens, (tokens,).
        positions: The kept positions, (rows,), strictly increasing.
        padded: Where each token lies among the padded positions, (tokens,).
    """

    example: int
    first_row: int
    input_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    padded: Indices


def batch_rows(examples: Sequence[ExampleRows], n_positions: int) -> BatchRows:
    """Return the rows of a batch whose tensors have `n_positions` padded positions."""
    counts = [len(example.positions) for example in examples]
    return BatchRows(
        source=np.concatenate(
            [b * n_positions + example.padded[example.positions] for b, example in enumerate(examples)]
        ).astype(np.int64),
        row=np.concatenate(
            [np.arange(example.first_row, example.first_row + n) for example, n in zip(examples, counts, strict=True)]
        ).astype(np.int64),
        token=np.concatenate([example.input_ids[example.positions] for example in examples]).astype(np.int32),
        position=np.concatenate([example.positions for example in examples]).astype(np.int32),
        example=np.repeat(np.array([example.example for example in examples], np.int64), counts),
        tokens_of=[example.padded for example in examples],
        n_positions=n_positions,
    )


def by_position(site: str, tensor: torch.Tensor, n_examples: int, n_positions: int) -> torch.Tensor:
    """Return `tensor` as (B, T, *row).

    Canonical sites come so already; a `module:` site may have its first two axes flattened, as mixture-of-experts
    layers have, or, where rows are whole examples (`T` is 1), no position axis at all.

    Raises:
        CaptureError: The tensor does not hold one entry a position.
    """
    shape = tuple(tensor.shape)
    if shape[:2] == (n_examples, n_positions):
        return tensor
    if shape and shape[0] == n_examples * n_positions:
        return tensor.view(n_examples, n_positions, *shape[1:])
    raise CaptureError(
        f"{site} gave a tensor of shape {shape} for {n_examples} examples of {n_positions} positions: it does not "
        "hold one entry a position, so it has no rows. Choose a site inside the model that does."
    )


def row_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of one row of a (B, T, *row) tensor; a scalar a row is a row of width 1."""
    return tuple(tensor.shape[2:]) or (1,)
