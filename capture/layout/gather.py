"""Moving the parts of one tensor between the ranks of a group: to one rank and back, or to all of them.

Parts may be of different length; what is sent is padded to the longest, since backends want equal sizes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from residua.capture.layout.layouts import Layout
from residua.store.base.errors import CaptureError

OWNER = 0  # rank in the group that runs functions for all of it
_NOTHING, _REPLACED, _FAILED = 0, 1, 2

Function = Callable[[Tensor], Tensor | None]


def run_once(local: Tensor, layout: Layout, group: ProcessGroup, function: Function, name: str) -> Tensor | None:
    """Run a function on the whole tensor, on the owner alone; return this rank's part of what it gives.

    Raises:
        CaptureError: The function failed on the owner; the owner raises what the function raised.
    """
    whole = _to_owner(local, layout, group)
    new, error = None, None
    if whole is not None:
        try:
            new = function(whole)
        except Exception as raised:  # noqa: BLE001  # the other ranks wait; it is raised once they know
            error = raised
    if not _agreed(new, error, group, local.device, name):
        return None
    return _from_owner(new, local, layout, group)


def run_everywhere(local: Tensor, layout: Layout, group: ProcessGroup, function: Function) -> Tensor | None:
    """Run a function on the whole tensor on every rank, with gradients; return this rank's part of what it gives.

    The function has to do the same on every rank. Gradients are those of one process: each rank has the whole
    gradient of what the function uses, and nothing is counted twice.
    """
    if layout.dim is None:
        return function(local)
    new = function(_apply(_WholeOf, local, layout, group))
    return None if new is None else _apply(_PartOf, new, layout, group)


def gathered(local: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
    """Return the whole tensor on every rank; `local` itself where every rank has all of it."""
    if layout.dim is None:
        return local
    padded = _padded(local, layout)
    parts = [torch.empty_like(padded) for _ in layout.sizes]
    dist.all_gather(parts, padded, group=group)
    return _joined(parts, layout)


def part_of(whole: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
    """Return this rank's part of a whole tensor that every rank has."""
    if layout.dim is None:
        return whole
    me = dist.get_rank(group)
    return whole.narrow(layout.dim, sum(layout.sizes[:me]), layout.sizes[me]).contiguous()


class _WholeOf(torch.autograd.Function):
    """From part to whole; the gradient of the whole is the same on every rank, and each takes its part of it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
        ctx.layout, ctx.group = layout, group
        return gathered(local, layout, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return part_of(gradients[0], ctx.layout, ctx.group), None, None


class _PartOf(torch.autograd.Function):
    """From whole to part; the parts of the gradient are brought together."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
        ctx.layout, ctx.group = layout, group
        return part_of(whole, layout, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gathered(gradients[0], ctx.layout, ctx.group), None, None


def _apply(change: type[torch.autograd.Function], tensor: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
    result: Tensor = change.apply(tensor, layout, group)  # type: ignore[no-untyped-call]  # torch leaves it bare
    return result


def _agreed(new: Tensor | None, error: Exception | None, group: ProcessGroup, device: torch.device, name: str) -> bool:
    """Let every rank know what came out; return whether there is a replacement."""
    outcome = _FAILED if error else _NOTHING if new is None else _REPLACED
    shared = torch.tensor([outcome], device=device)
    owner = dist.get_global_rank(group, OWNER)
    dist.broadcast(shared, src=owner, group=group)
    if shared.item() != _FAILED:
        return bool(shared.item() == _REPLACED)
    words = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(words, src=owner, group=group)
    if error is not None:
        raise error
    raise CaptureError(f"Site {name!r} on rank {dist.get_rank()}: the function failed on rank {owner}: {words[0]}")


def _to_owner(local: Tensor, layout: Layout, group: ProcessGroup) -> Tensor | None:
    """Return the whole tensor on the owner, and nothing elsewhere."""
    is_owner = dist.get_rank(group) == OWNER
    if layout.dim is None:
        return local.clone() if is_owner else None
    padded = _padded(local, layout)
    parts = [torch.empty_like(padded) for _ in layout.sizes] if is_owner else None
    dist.gather(padded, parts, dst=dist.get_global_rank(group, OWNER), group=group)
    return None if parts is None else _joined(parts, layout)


def _from_owner(new: Tensor | None, local: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
    """Return this rank's part of what the owner has."""
    owner = dist.get_global_rank(group, OWNER)
    if layout.dim is None:
        whole = torch.empty(local.shape, dtype=local.dtype, device=local.device) if new is None else new.contiguous()
        dist.broadcast(whole, src=owner, group=group)
        return whole
    part = torch.empty_like(_padded(local, layout))
    parts = (
        None if new is None else [_padded(piece, layout) for piece in torch.split(new, list(layout.sizes), layout.dim)]
    )
    dist.scatter(part, parts, src=owner, group=group)
    return part.narrow(layout.dim, 0, local.shape[layout.dim]).contiguous()


def _padded(part: Tensor, layout: Layout) -> Tensor:
    dim = layout.dim or 0
    missing = max(layout.sizes) - part.shape[dim]
    if not missing:
        return part.contiguous()
    shape = [*part.shape]
    shape[dim] = missing
    return torch.cat([part, part.new_zeros(shape)], dim)


def _joined(parts: list[Tensor], layout: Layout) -> Tensor:
    dim = layout.dim or 0
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, layout.sizes, strict=True)], dim)
