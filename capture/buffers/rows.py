"""From a padded batch to rows: which entry of a site's tensor is which row of the archive.

Legend: `B` examples in the batch, `T` padded positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from residua.capture.buffers.row_index import BatchRows, Indices
from residua.store.base.errors import CaptureError

FIRST_ROW_AXIS = 2
"""Of the tensor of a site; in front of it are examples and positions."""

Integer = TypeVar("Integer", np.int32, np.int64)


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
        source=_join(
            [b * n_positions + example.padded[example.positions] for b, example in enumerate(examples)], np.int64
        ),
        row=_join(
            [np.arange(example.first_row, example.first_row + len(example.positions)) for example in examples], np.int64
        ),
        token=_join([example.input_ids[example.positions] for example in examples], np.int32),
        position=_join([example.positions for example in examples], np.int32),
        example=np.repeat(np.array([example.example for example in examples], np.int64), counts),
        tokens_of=[example.padded for example in examples],
        n_positions=n_positions,
    )


def _join(parts: Sequence[npt.NDArray[Any]], dtype: type[Integer]) -> npt.NDArray[Integer]:
    """Return `parts` one behind the other; a batch may have none."""
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype)


def by_position(site: str, tensor: torch.Tensor, n_examples: int, n_positions: int) -> torch.Tensor:
    """Return `tensor` as (B, T, *row); a scalar a position is a row of width 1.

    Canonical sites come so already; a `module:` site may have its first two axes flattened, as mixture-of-experts
    layers have, or, where rows are whole examples (`T` is 1), no position axis at all.

    Raises:
        CaptureError: The tensor does not hold one entry a position.
    """
    shape = tuple(tensor.shape)
    if shape == (n_examples, n_positions):
        return tensor.unsqueeze(-1)
    if shape[:2] == (n_examples, n_positions):
        return tensor
    if shape and shape[0] == n_examples * n_positions:
        return tensor.view(n_examples, n_positions, *(shape[1:] or (1,)))
    raise CaptureError(
        f"{site} gave a tensor of shape {shape} for {n_examples} examples of {n_positions} positions: it does not "
        "hold one entry a position, so it has no rows. Choose a site inside the model that does."
    )


def row_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of one row of a (B, T, *row) tensor."""
    return tuple(tensor.shape[FIRST_ROW_AXIS:])
