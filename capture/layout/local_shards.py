"""What this rank has of a site's tensor, and how the parts of all ranks lie; sums that are not added up are."""

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from residua.capture.buffers.row_index import FIRST_ROW_AXIS, by_position, row_shape
from residua.capture.layout.layouts import Layout, ProvedLayouts, Shape, full_shape
from residua.capture.runtime.collectives import on_rank
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import CaptureError


def full_row_shape(site: str, local: Tensor, layout: Layout, batch_shape: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a whole row of a tensor of which this rank has a part."""
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
        group: The ranks over which activations may be split; None where this rank has whole ones.
    """

    def __init__(self, sites: Mapping[str, SiteInfo], group: ProcessGroup | None) -> None:
        self._sites = sites
        self._group = group
        self._layouts = ProvedLayouts()

    def of(self, site: str, tensor: Tensor, batch_shape: tuple[int, int]) -> tuple[Tensor, Layout]:
        """Return this rank's part of a tensor, and how the parts lie; every rank of the group asks at the same time.

        Args:
            site: The site.
            tensor: What the model has there.
            batch_shape: (examples, positions) of the batch.

        Raises:
            CaptureError: The layout cannot be proved.
        """
        if isinstance(tensor, DTensor):
            return _part_of(site, cast("DTensor", by_position(site, tensor, *batch_shape)), self._group)
        whole = full_shape(self._sites[site], batch_shape, tuple(tensor.shape))
        if self._group is None:
            _refuse_part(site, tensor, whole)
            return tensor, Layout()
        return tensor, self._layouts.of(site, tensor, whole, self._group)


def _refuse_part(site: str, tensor: Tensor, whole: Shape | None) -> None:
    if whole is not None and on_rank() and tensor.shape[FIRST_ROW_AXIS:] != torch.Size(whole[FIRST_ROW_AXIS:]):
        raise CaptureError(
            f"Site {site!r}{on_rank()} has shape {list(tensor.shape)}, and the whole would be {list(whole)}: the model "
            "is split over ranks that are not known here. Say with tensor_parallel= which they are."
        )


def _part_of(site: str, tensor: DTensor, group: ProcessGroup | None) -> tuple[Tensor, Layout]:
    """Follow the placement that the tensor itself carries; sums are added up."""
    mesh = tensor.device_mesh
    if mesh.ndim != 1:
        raise CaptureError(
            f"Site {site!r}{on_rank()} is a DTensor over a mesh of {mesh.ndim} dimensions; only one can be gathered."
        )
    placement = tensor.placements[0]
    ranks = None if group is None else dist.get_process_group_ranks(group)
    if not isinstance(placement, Shard) or ranks != dist.get_process_group_ranks(mesh.get_group()):
        return tensor.full_tensor(), Layout()
    local, dim = tensor.to_local(), placement.dim % tensor.ndim
    sizes = _chunks(tensor.shape[dim], mesh.size())
    if local.shape[dim] != sizes[dist.get_rank(group)]:
        raise CaptureError(
            f"Site {site!r}{on_rank()} is a DTensor of {tensor.shape[dim]} along axis {dim}, and this rank has "
            f"{local.shape[dim]} of it, not {sizes[dist.get_rank(group)]} as torch cuts it: its rows cannot be placed."
        )
    return local, Layout(dim, sizes)


def _chunks(length: int, n: int) -> tuple[int, ...]:
    """Return the lengths that DTensors give to the parts of an axis, those of `torch.chunk`, later ones empty."""
    size = -(-length // n)
    return tuple(max(0, min(size, length - start * size)) for start in range(n))
