"""Moving the shards of one tensor between the ranks of a group: to one rank and back, or to all of them.

Shards may differ in length. They are padded to the longest before they are sent, since backends want equal sizes.
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
    """Run a function on the full tensor, on the owner alone; return this rank's shard of the replacement.

    Raises:
        CaptureError: The function failed on the owner, or was interrupted there; the owner itself raises the
            function's own error.
    """
    full = _to_owner(local, layout, group)
    new: Tensor | None = None
    error: BaseException | None = None
    if full is not None:
        try:
            new = function(full)
        except BaseException as raised:  # noqa: BLE001  # Ctrl-C too: the others wait; it is raised once they know
            error = raised
    if not _is_replaced(new, error, group, local.device, name):
        return None
    return _from_owner(new, local, layout, group)


def run_everywhere(local: Tensor, layout: Layout, group: ProcessGroup, function: Function) -> Tensor | None:
    """Run a function on the full tensor on every rank, with gradients; return this rank's shard of the replacement.

    The function has to do the same on every rank. Gradients are those of a single process: each rank has the full
    gradient of what the function uses, and nothing is counted twice.
    """
    if layout.dim is None:
        return function(local)
    new = function(_apply(_Gathered, local, layout, group))
    return None if new is None else _apply(_LocalShard, new, layout, group)


def gathered(local: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
    """Return the full tensor on every rank; `local` itself where every rank has all of it."""
    if layout.dim is None:
        return local
    padded = _padded(local, layout)
    shards = [torch.empty_like(padded) for _ in layout.sizes]
    dist.all_gather(shards, padded, group=group)
    return _joined(shards, layout)


def local_shard(full: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
    """Return this rank's shard of a full tensor that every rank has."""
    if layout.dim is None:
        return full
    rank = dist.get_rank(group)
    return full.narrow(layout.dim, sum(layout.sizes[:rank]), layout.sizes[rank]).contiguous()


class _Gathered(torch.autograd.Function):
    """From shard to full tensor; every rank has the same gradient of the full tensor, and takes its shard of it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
        ctx.layout, ctx.group = layout, group
        return gathered(local, layout, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return local_shard(gradients[0], ctx.layout, ctx.group), None, None


class _LocalShard(torch.autograd.Function):
    """From full tensor to shard; the shards of the gradient are gathered."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
        ctx.layout, ctx.group = layout, group
        return local_shard(full, layout, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gathered(gradients[0], ctx.layout, ctx.group), None, None


def _apply(change: type[torch.autograd.Function], tensor: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
    result: Tensor = change.apply(tensor, layout, group)  # type: ignore[no-untyped-call]  # torch has no types here
    return result


def _is_replaced(
    new: Tensor | None, error: BaseException | None, group: ProcessGroup, device: torch.device, name: str
) -> bool:
    """Return on every rank whether the owner's function gave a replacement; raise on every rank if it failed."""
    outcome = torch.tensor([_FAILED if error else _NOTHING if new is None else _REPLACED], device=device)
    dist.broadcast(outcome, group=group, group_src=OWNER)
    if outcome.item() != _FAILED:
        return bool(outcome.item() == _REPLACED)
    reason = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(reason, group=group, group_src=OWNER)
    if error is not None:
        raise error
    owner = dist.get_global_rank(group, OWNER)
    raise CaptureError(f"Site {name!r} on rank {dist.get_rank()}: the function failed on rank {owner}: {reason[0]}")


def _to_owner(local: Tensor, layout: Layout, group: ProcessGroup) -> Tensor | None:
    """Return the full tensor on the owner, and None elsewhere."""
    is_owner = dist.get_rank(group) == OWNER
    if layout.dim is None:
        return local.clone() if is_owner else None
    padded = _padded(local, layout)
    shards = [torch.empty_like(padded) for _ in layout.sizes] if is_owner else None
    dist.gather(padded, shards, group=group, group_dst=OWNER)
    return None if shards is None else _joined(shards, layout)


def _from_owner(new: Tensor | None, local: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
    """Return this rank's shard of what the owner has."""
    if layout.dim is None:
        full = torch.empty(local.shape, dtype=local.dtype, device=local.device) if new is None else new.contiguous()
        dist.broadcast(full, group=group, group_src=OWNER)
        return full
    shard = torch.empty_like(_padded(local, layout))
    shards = None if new is None else [_padded(cut, layout) for cut in torch.split(new, list(layout.sizes), layout.dim)]
    dist.scatter(shard, shards, group=group, group_src=OWNER)
    return shard.narrow(layout.dim, 0, local.shape[layout.dim]).contiguous()


def _padded(shard: Tensor, layout: Layout) -> Tensor:
    dim = layout.dim or 0
    shape = [*shard.shape]
    shape[dim] = max(layout.sizes) - shard.shape[dim]
    return torch.cat([shard, shard.new_zeros(shape)], dim) if shape[dim] else shard.contiguous()


def _joined(shards: list[Tensor], layout: Layout) -> Tensor:
    dim = layout.dim or 0
    return torch.cat([shard.narrow(dim, 0, size) for shard, size in zip(shards, layout.sizes, strict=True)], dim)
