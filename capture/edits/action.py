"""What an edit is to a running model: an action, told which rows it is for, gives what happens to them.

Legend: `N` chosen rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from residua.capture.buffers.row_index import Indices
from residua.capture.edits.stored_rows import StoredRows
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import PlanError
from residua.store.edits.selection import RowChooser


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The rows of one batch that an edit changes, (N,) each.

    Attributes:
        source: Index into the flattened (examples, positions) axes of the batch.
        example: Number of the example.
        position: Position in the example.
        row: Row of the archive; -1 for a token that the plan left out.
        from_row: Row that takes its place, for edits that bring stored rows.
    """

    source: Indices
    example: Indices
    position: Indices
    row: Indices
    from_row: Indices


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What actions are made of, besides the edit and the site.

    Attributes:
        stored: Rows of the archive.
        chooser: Its examples.
        dtype: The type that the model computes in at the site.
    """

    stored: StoredRows
    chooser: RowChooser
    dtype: torch.dtype


Change = Callable[[Tensor], Tensor]
"""Takes rows, (N, *row); gives what they become."""
Action = Callable[[Chosen], Change]
"""Takes which rows are meant, makes ready or refuses what they need, and gives what happens to them."""


def always(change: Change) -> Action:
    """Return the action that does the same to all rows."""
    return lambda _at: change


def fitting(values: Any, info: SiteInfo, dtype: torch.dtype, what: str) -> Tensor:
    """Return float64 `values` as a tensor that goes with the site's rows, rounded to `dtype`.

    Raises:
        PlanError: Its shape does not go with the rows, or the type cannot hold its values.
    """
    shape = row_shape(info)
    if values.shape not in (shape, shape[-1:]):
        raise PlanError(f"{info.name} has rows of shape {shape}, and {what} has shape {tuple(values.shape)}")
    largest = float(np.abs(values).max(initial=0.0))
    if np.isnan(largest):
        raise PlanError(f"{what} is NaN at {info.name}: rows that it is taken of hold NaN or infinite values")
    if largest > torch.finfo(dtype).max:
        raise PlanError(f"{what} reaches {largest:.3g}, more than {name_of(dtype)} can hold at {info.name}")
    return torch.from_numpy(values).to(dtype)


def row_shape(info: SiteInfo) -> tuple[int, ...]:
    """Return the shape of a row; 0 stands for an axis as long as the example."""
    return tuple(size or 0 for size in info.row_shape or ())


def name_of(dtype: torch.dtype) -> str:
    """Return what people call a type."""
    return str(dtype).removeprefix("torch.")
