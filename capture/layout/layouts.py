"""Who holds which part of a site's tensor, found out once and proved.

On the first batch every rank of the tensor-parallel group says what it has: shape, type and checksum. With the
shape that the whole tensor has (see `residua.capture.sites.reference_model`) this leaves one of three answers: every
rank has all of it; it is split along one axis, into parts whose sizes add up; or neither, and then nothing is guessed.
Sums that are not yet summed, rows local to an expert and ranks that were fed different tokens are all caught by the
checksum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from residua.capture.runtime.collectives import everyones, on_rank
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import CaptureError
from residua.store.storage.crc import crc32c

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How one tensor lies over the ranks of a group.

    Attributes:
        dim: The axis along which it is split; None where every rank has all of it.
        sizes: Length of each rank's part along that axis, in the order of the group.
    """

    dim: int | None = None
    sizes: Shape = ()

    def fits(self, local: Tensor, whole: Shape | None, rank_in_group: int) -> bool:
        """Tell whether a later tensor of the same site still lies like this."""
        if whole is None or self.dim is None:
            return whole is None or local.shape[2:] == whole[2:]
        return whole[self.dim] == sum(self.sizes) and local.shape[self.dim] == self.sizes[rank_in_group]


@dataclass(frozen=True)
class ShardReport:
    """What one rank says of its tensor: global rank, shape, type, crc32c of the bytes."""

    rank: int
    shape: Shape
    dtype: str
    checksum: int


def full_shape(info: SiteInfo, batch_shape: tuple[int, int] | None, local: Shape) -> Shape | None:
    """Return the shape that a site's tensor has in the unsharded model; None where that is not known.

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


def prove_layout(name: str, local: Tensor, whole: Shape | None, group: ProcessGroup) -> Layout:
    """Find out how a tensor lies over a group; every rank of it has to ask at the same time.

    Args:
        name: The site, for messages.
        local: What this rank has.
        whole: Shape in the unsharded model, if it is known.
        group: The ranks that share the model.

    Raises:
        CaptureError: Nothing can be proved; all ranks raise it.
    """
    mine = ShardReport(dist.get_rank(), tuple(local.shape), str(local.dtype), _checksum(local))
    parts = everyones(group, mine)
    layout = infer_layout(parts, whole)
    if isinstance(layout, Layout):
        return layout
    shapes = ", ".join(f"rank {part.rank}: {list(part.shape)}" for part in parts)
    raise CaptureError(
        f"Site {name!r} on rank {mine.rank}: its layout cannot be proved, for {layout}. Found {shapes}; the whole "
        f"would be {'of unknown shape' if whole is None else list(whole)}. Tap another site, or pass gather=False "
        "to get what each rank has."
    )


def infer_layout(parts: Sequence[ShardReport], whole: Shape | None) -> Layout | str:
    """Tell how a tensor lies from what the ranks say of their parts.

    Args:
        parts: What each rank says, in the order of the group.
        whole: Shape in the unsharded model; None where it is not known.

    Returns:
        The layout, or in words why there is none.
    """
    shapes = [part.shape for part in parts]
    if len({len(shape) for shape in shapes}) > 1 or len({part.dtype for part in parts}) > 1:
        return "the ranks have tensors of different kinds"
    is_same = len(set(shapes)) == 1
    if is_same and (whole is None or len(whole) == len(shapes[0])) and _rows_are_whole(shapes[0], whole):
        if len({part.checksum for part in parts}) == 1:
            return Layout()
        if whole is None or shapes[0] == whole:
            return (
                "every rank has a tensor of the same shape with other values: sums that are not yet added up, rows of "
                "different experts, or ranks that were fed different tokens"
            )
    return "the shape of the whole is not known" if whole is None else _split(shapes, whole)


def _rows_are_whole(shape: Shape, whole: Shape | None) -> bool:
    """Whether rows are whole; how many there are is another matter (a model may be asked for its last logits)."""
    return whole is None or shape[2:] == whole[2:]


def _split(shapes: Sequence[Shape], whole: Shape) -> Layout | str:
    if len(shapes[0]) != len(whole):
        return "the parts have another number of axes than the whole"
    if len(whole) > 1 and len({shape[1] for shape in shapes}) == 1 and sum(shape[1] for shape in shapes) != whole[1]:
        whole = (whole[0], shapes[0][1], *whole[2:])  # keys of a cache, or fewer positions than the call has
    dims = {dim for shape in shapes for dim, (part, all_) in enumerate(zip(shape, whole, strict=True)) if part != all_}
    if len(dims) != 1:
        return "the parts differ from the whole along several axes"
    dim = dims.pop()
    sizes = tuple(shape[dim] for shape in shapes)
    return Layout(dim, sizes) if sum(sizes) == whole[dim] else "the parts do not add up to the whole"


def _checksum(tensor: Tensor) -> int:
    return crc32c(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


class ProvedLayouts:
    """Remembers how the sites of one model replica lie over the ranks that hold it."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[str, bool], Layout] = {}

    def of(
        self, name: str, local: Tensor, whole: Shape | None, group: ProcessGroup, *, is_gradient: bool = False
    ) -> Layout:
        """Return how a tensor lies; the first time all ranks of the group find out together.

        Args:
            name: The site.
            local: What this rank has.
            whole: Shape in the unsharded model, if it is known.
            group: The ranks that share the model's activations.
            is_gradient: Whether it is the gradient; its layout is proved by itself.

        Raises:
            CaptureError: Nothing can be proved, or the tensor lies otherwise than the first one did.
        """
        key = (name, is_gradient)
        known = self._layouts.get(key)
        if known is None or (known.dim is not None and whole is not None and whole[known.dim] != sum(known.sizes)):
            known = self._layouts[key] = prove_layout(name, local, whole, group)
        if not known.fits(local, whole, dist.get_rank(group)):
            raise CaptureError(
                f"Site {name!r}{on_rank()} has shape {list(local.shape)} and lay otherwise on the first batch; the "
                f"whole would be {list(whole or ())}. Tap batches of different layout in contexts of their own."
            )
        return known
