"""Which process holds which shard of a tensor: found out once, proved, and held to afterwards.

A plain tensor does not say that it is one rank's shard. So every rank of the tensor-parallel group reports the shape,
type and checksum of what it has. With the shape of the full tensor (see `residua.capture.sites.reference_model`) this
leaves one of three answers: every rank has the full tensor; the tensor is cut along one axis into shards whose sizes
add up; or neither, and then nothing is guessed. The checksum catches partial sums, rows of different experts, and
ranks that were given different tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from residua.capture.buffers.row_index import FIRST_ROW_AXIS
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.collectives import all_gather_short, on_rank
from residua.store.base.errors import CaptureError
from residua.store.storage.crc import crc32c

Shape = tuple[int, ...]
_PROVED_SHAPES = 4


@dataclass(frozen=True)
class Layout:
    """How one tensor lies over the ranks of a group.

    Attributes:
        dim: The axis along which it is cut; None where every rank has the full tensor.
        sizes: Length of each rank's shard along that axis, in the order of the group.
    """

    dim: int | None = None
    sizes: Shape = ()

    def fits(self, local: Tensor, full: Shape | None, rank_in_group: int) -> bool:
        """Return whether a later tensor of the same site lies like this."""
        if full is None or self.dim is None:
            return full is None or local.shape[FIRST_ROW_AXIS:] == full[FIRST_ROW_AXIS:]
        return full[self.dim] == sum(self.sizes) and local.shape[self.dim] == self.sizes[rank_in_group]


@dataclass(frozen=True)
class ShardReport:
    """What one rank reports of its tensor: global rank, shape, type, crc32c of the bytes."""

    rank: int
    shape: Shape
    dtype: str
    checksum: int


def shard_reports(local: Tensor, group: ProcessGroup | None) -> list[ShardReport]:
    """Return what each rank of a group has of a tensor, in their order; a collective of the group."""
    # Copied, since torch could not free memory of FSDP's that NumPy has seen.
    values = local.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    checksum = crc32c(values.reshape(-1).view(torch.uint8).numpy())
    everyone: list[Any] = all_gather_short(group, [dist.get_rank(), [*local.shape], str(local.dtype), checksum])
    return [ShardReport(rank, tuple(shape), dtype, crc) for rank, shape, dtype, crc in everyone]


def infer_layout(
    reports: Sequence[ShardReport], full: Shape | None, *, n_free_axes: int = FIRST_ROW_AXIS
) -> Layout | str:
    """Infer how a tensor lies from what the ranks report.

    Args:
        reports: One report a rank, in the order of the group.
        full: Shape of the full tensor; None where it is not known.
        n_free_axes: Leading axes whose length a run may change: examples and positions of an activation (a model may
            be asked for its last logits only, and the keys of a cache precede those of the call); none of a parameter.

    Returns:
        The layout, or the reason why there is none.
    """
    shapes = [report.shape for report in reports]
    if len({len(shape) for shape in shapes}) > 1 or len({report.dtype for report in reports}) > 1:
        return "the ranks have tensors of different kinds"
    first = shapes[0]
    has_full_rows = full is None or (len(first) == len(full) and first[n_free_axes:] == full[n_free_axes:])
    if len(set(shapes)) == 1 and has_full_rows:
        if len({report.checksum for report in reports}) == 1:
            return Layout()
        if full is None or first == full:
            return (
                "every rank has a tensor of the same shape with other values: partial sums that are not yet added up, "
                "rows of different experts, or ranks that were given different tokens"
            )
    return "the shape of the full tensor is not known" if full is None else _cut_along(shapes, full, n_free_axes)


def _cut_along(shapes: Sequence[Shape], full: Shape, n_free_axes: int) -> Layout | str:
    if len(shapes[0]) != len(full):
        return "the shards have another number of axes than the full tensor"
    if n_free_axes > 1 and len(full) > 1:
        lengths = {shape[1] for shape in shapes}
        if len(lengths) == 1 and sum(shape[1] for shape in shapes) != full[1]:
            full = (full[0], *lengths, *full[2:])  # keys of a cache, or fewer positions than the call has
    dims = {dim for shape in shapes for dim, size in enumerate(shape) if size != full[dim]}
    if len(dims) != 1:
        return "the shards differ from the full tensor along several axes"
    dim = dims.pop()
    sizes = tuple(shape[dim] for shape in shapes)
    return Layout(dim, sizes) if sum(sizes) == full[dim] else "the shards do not add up to the full tensor"


class ProvedLayouts:
    """The layouts of one model's sites, each proved when the site is met first, and again for batches of other shapes.

    A layout may depend on the shape of the batch, for example where positions are split if their number allows it. So
    it is proved for the first few shapes, and then each time their number has doubled: a proof reads the full tensor.
    """

    def __init__(self) -> None:
        self._layouts: dict[tuple[str, bool], dict[Shape | None, Layout]] = {}

    def of(
        self,
        name: str,
        local: Tensor,
        full: Shape | None,
        group: ProcessGroup,
        *,
        batch_shape: tuple[int, int] | None,
        is_gradient: bool = False,
    ) -> Layout:
        """Return how a tensor lies; a call that proves it is a collective of the group.

        Args:
            name: The site.
            local: What this rank has.
            full: Shape of the full tensor, if it is known.
            group: The ranks that share the model's activations.
            batch_shape: (examples, positions) of the call, the same on every rank; None if it is not known.
            is_gradient: Whether it is the gradient; its layout is proved by itself.

        Raises:
            CaptureError: Nothing can be proved, or the tensor lies differently from the one that was proved.
        """
        of_shapes = self._layouts.setdefault((name, is_gradient), {})
        n_shapes = len(of_shapes) + (batch_shape not in of_shapes)
        # all ranks see the same shapes, so they agree on when to prove
        is_due = n_shapes <= _PROVED_SHAPES or n_shapes & (n_shapes - 1) == 0
        known = of_shapes.get(batch_shape)
        if known is None and not is_due:
            known = next(reversed(of_shapes.values()))
        if known is None or _is_outgrown(known, full):
            known = _prove(name, local, full, group)
        of_shapes[batch_shape] = known
        if not known.fits(local, full, dist.get_rank(group)):
            raise CaptureError(
                f"Site {name!r}{on_rank()} has shape {list(local.shape)} of a full {list(full or ())}, and its layout "
                "differs from that of the first batch. Tap batches of different layouts in separate contexts."
            )
        return known


def _is_outgrown(known: Layout, full: Shape | None) -> bool:
    return known.dim is not None and full is not None and full[known.dim] != sum(known.sizes)


def _prove(name: str, local: Tensor, full: Shape | None, group: ProcessGroup) -> Layout:
    reports = shard_reports(local, group)
    layout = infer_layout(reports, full)
    if isinstance(layout, Layout):
        return layout
    shapes = ", ".join(f"rank {report.rank}: {list(report.shape)}" for report in reports)
    raise CaptureError(
        f"Site {name!r} on rank {dist.get_rank()}: its layout cannot be proved, because {layout}. Found {shapes}; the "
        f"full tensor has {'an unknown shape' if full is None else f'shape {list(full)}'}. Tap another site, or pass "
        "gather=False to get what each rank has."
    )


def full_shape(info: SiteInfo, batch_shape: tuple[int, int] | None, local: Shape) -> Shape | None:
    """Return the shape of a site's tensor in the unsharded model; None where it is not known.

    Axes whose length only the run knows (the keys of a pattern) are taken from `local`.
    """
    if info.row_shape is None or (batch_shape is None and info.per_token):
        return None
    lead = local[:1] if batch_shape is None else batch_shape if info.per_token else batch_shape[:1]
    n_lead = len(lead)
    if len(local) != n_lead + len(info.row_shape):
        return None
    row = tuple(local[n_lead + i] if size is None else size for i, size in enumerate(info.row_shape))
    return (*lead, *row)


def refuse_shard(name: str, local: Tensor, full: Shape | None, *, remedy: str = "") -> None:
    """Raise CaptureError if a tensor of a model that shows no group has rows of another shape than the full tensor.

    Args:
        name: The site.
        local: What this rank has.
        full: Shape of the full tensor, if it is known.
        remedy: What else the user can do.
    """
    if full is not None and local.shape[FIRST_ROW_AXIS:] != full[FIRST_ROW_AXIS:]:
        raise CaptureError(
            f"Site {name!r}{on_rank()} has shape {list(local.shape)}, and the full tensor has {list(full)}: the model "
            f"is split over ranks that Residua cannot see. Name them with tensor_parallel=.{remedy}"
        )


def mesh_of(name: str, tensor: DTensor) -> DeviceMesh:
    """Return the mesh of one dimension over which the DTensor of a site lies.

    Raises:
        CaptureError: The mesh has several dimensions.
    """
    mesh = tensor.device_mesh
    if mesh.ndim != 1:
        raise CaptureError(
            f"Site {name!r}{on_rank()} is a DTensor over a mesh of {mesh.ndim} dimensions; only one dimension can be "
            "gathered. Choose another site, or tap it with gather=False to get what each rank has."
        )
    return mesh
