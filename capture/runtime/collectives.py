"""Collectives: which rank this process is, and what the ranks of a group exchange.

`Exchange` turns slices of all rows into all of some rows. A tensor that is distributed over ranks lies on each rank as
a slice of every row or, if it is distributed by position, as all of some rows. One rank writes a shard. So each rank
cuts its tensor by the rank that stores each piece, and one `all_to_all` brings every piece to that rank: nothing is
sent twice, and nothing is sent that is not stored.

`Agreement` and `in_step` keep workers together whose forward passes are collectives.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from residua.store.base.canonical import Json
from residua.store.base.errors import CaptureError

T = TypeVar("T")
BatchT = TypeVar("BatchT")
Shape = tuple[int, ...]
SHORT_BYTES = 512


def is_alone() -> bool:
    """Return whether there is only one process."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def on_rank() -> str:
    """Return `` on rank 3``, with a leading space, for messages; empty if there is only one process."""
    return "" if is_alone() else f" on rank {dist.get_rank()}"


def all_gather_objects(group: ProcessGroup | None, value: T) -> list[T]:
    """Return the value of each rank of a group, in rank order; without a group, this process's value alone."""
    if group is None:
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def all_gather_short(group: ProcessGroup | None, value: Json) -> list[Json]:
    """Return the JSON value of each rank of a group, in rank order, by one collective; without a group, `value` alone.

    `all_gather_objects` takes two, since it has to learn the lengths first.

    Raises:
        ValueError: The value takes more than `SHORT_BYTES` as JSON.
    """
    if group is None:
        return [value]
    text = json.dumps(value).encode()
    if len(text) > SHORT_BYTES:
        raise ValueError(f"a value of {len(text)} bytes is longer than {SHORT_BYTES}: {text!r}")
    mine = torch.frombuffer(bytearray(text.ljust(SHORT_BYTES)), dtype=torch.uint8).to(device_of(group))
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [json.loads(of_rank.cpu().numpy().tobytes()) for of_rank in everyone]


def device_of(group: ProcessGroup | None) -> torch.device:
    """Return a device whose tensors the ranks of a group can exchange; None stands for the default group."""
    if "gloo" in str(dist.get_backend(group)):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def failed_together(error: RuntimeError, *, safe: str = "committed") -> CaptureError:
    """Return the error to raise after a forward pass failed that several processes run together.

    Args:
        error: The failure.
        safe: What was done with the work that is not lost, for the message.
    """
    return CaptureError(
        "the forward pass failed, perhaps because another process that holds this model died: "
        f"{(str(error).splitlines() or [''])[0]}. What was {safe} before is safe; run the same command again "
        "to go on."
    )


class Agreement:
    """Tells all workers, before each batch, whether any of them has one; a collective of all workers."""

    def __init__(self) -> None:
        self._flag = torch.zeros((), device=device_of(None))

    def __call__(self, has_batch: bool) -> bool:
        """Return whether any worker called this with True.

        Raises:
            CaptureError: Another worker is gone.
        """
        self._flag.fill_(float(has_batch))
        try:
            dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
            return bool(self._flag.item())
        except RuntimeError as error:
            raise failed_together(error) from error


def in_step(batches: Iterator[BatchT | None], agree: Callable[[bool], bool]) -> Iterator[BatchT | None]:
    """Yield the batches, then None as long as any other worker has a batch."""
    batch = next(batches, None)
    while agree(batch is not None):
        yield batch
        batch = None if batch is None else next(batches, None)


class Exchange:
    """Exchanges pieces between the ranks of a group.

    Args:
        group: The ranks.

    Attributes:
        sent_bytes: Bytes that this rank has sent to other ranks.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.n_ranks = dist.get_world_size(group)
        self.sent_bytes = 0

    def __call__(
        self, outgoing: Sequence[Tensor], to: Sequence[int], incoming: Mapping[int, Sequence[Shape]]
    ) -> dict[int, list[Tensor]]:
        """Send each piece to its rank; a collective of the group.

        Args:
            outgoing: The pieces that this rank sends, all of one dtype; at least one.
            to: For each piece the rank that receives it.
            incoming: For each rank the shapes of the pieces that it sends here, in its order.

        Returns:
            For each rank the pieces that it sent here.
        """
        order = sorted(range(len(to)), key=lambda i: to[i])
        pieces = [outgoing[i].contiguous().view(-1).view(torch.uint8) for i in order]
        sizes = [0] * self.n_ranks
        for i, piece in zip(order, pieces, strict=True):
            sizes[to[i]] += piece.numel()
        dtype, item_bytes = outgoing[0].dtype, outgoing[0].element_size()
        coming = [item_bytes * sum(prod(shape) for shape in incoming[rank]) for rank in range(self.n_ranks)]
        sent = torch.cat(pieces)
        received = sent.new_empty(sum(coming))
        dist.all_to_all_single(received, sent, coming, sizes, group=self._group)
        self.sent_bytes += sum(sizes) - sizes[self.rank]
        by_rank = enumerate(torch.split(received, coming))
        return {rank: _split(of_rank.view(dtype), incoming[rank]) for rank, of_rank in by_rank}


def _split(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    pieces = torch.split(flat, [prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
