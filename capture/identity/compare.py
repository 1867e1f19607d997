"""Comparing what a model computes with what an archive holds, row by row."""

from dataclasses import dataclass

import numpy as np
import torch

from residua.capture.buffers.host_buffers import torch_dtype
from residua.capture.buffers.row_index import BatchRows, RowIndex
from residua.store.read.archive import Archive


@dataclass(kw_only=True)
class SiteComparison:
    """How one site compares.

    Attributes:
        rows: Rows compared.
        equal_rows: Rows that are equal bit for bit.
        largest_error: Largest absolute difference of two values.
        largest_value: Largest magnitude in the archive, to hold it against.
    """

    rows: int = 0
    equal_rows: int = 0
    largest_error: float = 0.0
    largest_value: float = 0.0


class RowComparison:
    """Takes rows as a `ShardFiller` does, and compares them with those that are stored.

    Args:
        archive: What to compare with.

    Attributes:
        sites: What was found so far, by site.
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
        if site.startswith("pattern."):
            row_index.copy_pattern(tensor.cpu(), computed, batch)
        else:
            row_index.copy(tensor.flatten(0, 1).cpu(), computed)
        stored = self._archive[site].torch(batch.row)
        _add(self.sites[site], computed.flatten(1), stored.flatten(1))


def _add(found: SiteComparison, computed: torch.Tensor, stored: torch.Tensor) -> None:
    bits = torch.int8
    same = (computed.contiguous().view(bits) == stored.contiguous().view(bits)).all(-1)
    finite = computed.double().isfinite() & stored.double().isfinite()
    error = (computed.double() - stored.double()).abs()[finite]
    found.rows += len(same)
    found.equal_rows += int(same.sum())
    found.largest_error = max(found.largest_error, float(error.max()) if error.numel() else 0.0)
    largest = stored.double().abs()[finite]
    found.largest_value = max(found.largest_value, float(largest.max()) if largest.numel() else 0.0)
