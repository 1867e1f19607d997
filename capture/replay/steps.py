"""What a replay does at a site besides edits: stored rows go in, and the graph of gradients begins.

Legend: `B` examples in the batch, `T` padded positions.
"""

from collections.abc import Callable

from torch import Tensor

from residua.capture.buffers.host_buffers import torch_dtype
from residua.capture.buffers.row_index import batch_rows
from residua.capture.edits.prepare import with_rows
from residua.capture.edits.stored_rows import StoredRows, refuse_overflow
from residua.capture.forward.plan_batch import PlanBatch

Step = Callable[[Tensor], Tensor]
"""From the (B, T, *row) tensor of a site to the one that the model goes on with."""


def stored_rows_in(stored: StoredRows, name: str, batch: PlanBatch, dtype: str | None) -> Step:
    """Return what puts a batch's stored rows in; they are read only where the site is met, and by whom it is met.

    Args:
        stored: Reads the archive.
        name: The site.
        batch: The batch.
        dtype: The type in which the model has the site; None for float32.

    Raises:
        PlanError: That type cannot hold what is stored.
        NotCapturedError: Rows are not captured yet.
    """
    rows = batch_rows(batch.rows, batch.n_positions)
    stored.require(name, rows.row, torch_dtype(dtype or "float32"))

    def put_in(tensor: Tensor) -> Tensor:
        found = stored.read(name, rows.row)
        new = found.to(device=tensor.device, dtype=tensor.dtype)
        refuse_overflow(name, found, new)
        return with_rows(rows.source, tensor, new)

    return put_in


def graph_begins(name: str, leaves: dict[str, Tensor]) -> Step:
    """Return what lets autograd's graph begin at a site, and notes the tensor in `leaves`."""

    def begin(tensor: Tensor) -> Tensor:
        leaves[name] = tensor.detach().requires_grad_()
        return leaves[name]

    return begin
