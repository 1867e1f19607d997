"""What this rank has of a site's tensor, and how the shards of all ranks lie. Partial sums are reduced first."""

from collections.abc import Mapping
from typing import cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from residua.capture.buffers.row_index import FIRST_ROW_AXIS, by_position, row_shape
from residua.capture.hooks.site import SiteInfo
from residua.capture.layout.layouts import Layout, ProvedLayouts, full_shape, mesh_of, refuse_shard
from residua.capture.runtime.collectives import is_alone, on_rank
from residua.store.base.errors import CaptureError


def full_row_shape(site: str, local: Tensor, layout: Layout, batch_shape: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a full row of a tensor of which this rank has a shard."""
    if layout.dim is None:
        return row_shape(by_position(site, local, *batch_shape))
    row = [*row_shape(local)]
    if layout.dim >= FIRST_ROW_AXIS:
        row[layout.dim - FIRST_ROW_AXIS] = sum(layout.sizes)
    return tuple(row)


class LocalShards:
    """Finds out and remembers how the sites of one replica lie.

    Args:
        sites: What is known of each site in the unsharded model.
        group: The ranks over which activations may be split; None where this rank has full ones.
    """

    def __init__(self, sites: Mapping[str, SiteInfo], group: ProcessGroup | None) -> None:
        self._sites = sites
        self._group = group
        self._layouts = ProvedLayouts()

    def of(self, site: str, tensor: Tensor, batch_shape: tuple[int, int]) -> tuple[Tensor, Layout]:
        """Return this rank's shard of a tensor and the layout; all ranks of the group call this at the same time.

        Args:
            site: The site.
            tensor: What the model has there.
            batch_shape: (examples, positions) of the batch.

        Raises:
            CaptureError: The layout cannot be proved.
        """
        if isinstance(tensor, DTensor):
            return _shard_of(site, cast("DTensor", by_position(site, tensor, *batch_shape)), self._group)
        full = full_shape(self._sites[site], batch_shape, tuple(tensor.shape))
        if self._group is not None:
            return tensor, self._layouts.of(site, tensor, full, self._group, batch_shape=batch_shape)
        if not is_alone():
            refuse_shard(site, tensor, full)
        return tensor, Layout()


def _shard_of(site: str, tensor: DTensor, group: ProcessGroup | None) -> tuple[Tensor, Layout]:
    """Follow the placement that the tensor itself carries. Partial sums are reduced."""
    mesh, placement = mesh_of(site, tensor), tensor.placements[0]
    ranks = None if group is None else dist.get_process_group_ranks(group)
    if not isinstance(placement, Shard) or ranks != dist.get_process_group_ranks(mesh.get_group()):
        return tensor.full_tensor(), Layout()
    local, dim = tensor.to_local(), placement.dim % tensor.ndim
    sizes = _chunk_sizes(tensor.shape[dim], mesh.size())
    expected = sizes[dist.get_rank(group)]
    if local.shape[dim] != expected:
        raise CaptureError(
            f"Site {site!r}{on_rank()} is a DTensor with {tensor.shape[dim]} entries along axis {dim}. This rank has "
            f"{local.shape[dim]} of them where torch gives it {expected}, so its rows cannot be placed. Choose another "
            "site."
        )
    return local, Layout(dim, sizes)


def _chunk_sizes(length: int, n: int) -> tuple[int, ...]:
    """Return the lengths of a DTensor's shards along an axis, as `torch.chunk` cuts it; the last ones may be empty."""
    size = -(-length // n)
    return tuple(max(0, min(size, length - start * size)) for start in range(n))
