"""Comparing what a model computes with what an archive holds, row by row."""

from dataclasses import dataclass

import numpy as np
import torch

from residua.capture.buffers.host_buffers import torch_dtype
from residua.capture.buffers.row_index import BatchRows, RowIndex
from residua.store.format.site_names import is_pattern
from residua.store.read.archive import Archive


@dataclass(kw_only=True)
class SiteComparison:
    """How the computed rows of one site compare with the stored ones.

    Attributes:
        rows: Rows compared.
        equal_rows: Rows that are equal bit for bit.
        largest_error: Largest absolute difference of two values.
        largest_value: Largest magnitude in the archive, as a scale for the error.
    """

    rows: int = 0
    equal_rows: int = 0
    largest_error: float = 0.0
    largest_value: float = 0.0

    def add(self, computed: torch.Tensor, stored: torch.Tensor) -> None:
        """Compare some rows, (rows, width), both in the stored dtype."""
        same = (computed.contiguous().view(torch.int8) == stored.contiguous().view(torch.int8)).all(-1)
        computed, stored = computed.double(), stored.double()
        finite = computed.isfinite() & stored.isfinite()
        self.rows += len(same)
        self.equal_rows += int(same.sum())
        self.largest_error = _largest(self.largest_error, (computed - stored)[finite])
        self.largest_value = _largest(self.largest_value, stored[finite])


def _largest(so_far: float, values: torch.Tensor) -> float:
    return max(so_far, float(values.abs().max())) if values.numel() else so_far


class RowComparison:
    """A `RowSink` that compares rows with the stored ones.

    Args:
        archive: The archive with the stored rows.

    Attributes:
        sites: The results so far, by site.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._batch: BatchRows | None = None
        self.sites = {site: SiteComparison() for site in archive.sites}

    def begin(self, batch: BatchRows) -> None:
        """Announce the rows of the next forward pass."""
        self._batch = batch

    def put(self, site: str, tensor: torch.Tensor) -> None:
        """Compare one site's tensor, (B, T, *row)."""
        batch = self._batch
        if batch is None:
            raise RuntimeError(f"rows of {site} came before their batch was announced")
        plan = self._archive.plan.site(site)
        computed = torch.empty((len(batch.row), *plan.row_shape), dtype=torch_dtype(plan.dtype))
        row_index = RowIndex(batch.source, np.arange(len(batch.row)))
        if is_pattern(site):
            row_index.copy_pattern(tensor.cpu(), computed, batch, batch.keys_of(site))
        else:
            row_index.copy(tensor.flatten(0, 1).cpu(), computed)
        self.sites[site].add(computed.flatten(1), self._archive[site].torch(batch.row).flatten(1))
