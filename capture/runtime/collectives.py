"""From parts of all rows to all of some rows: one exchange between the ranks that hold a tensor together.

A tensor that is split over ranks lies on each as a part of every row, or, split by position, as all of some rows. A
shard is written by one rank. So each rank cuts what it has by who stores it, and one `all_to_all` brings everything to
its place: nothing is sent twice, and nothing is sent that is not stored.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Shape = tuple[int, ...]


class Exchange:
    """Exchanges pieces between the ranks of a group.

    Args:
        group: The ranks.

    Attributes:
        sent_bytes: Bytes that this rank has sent to others.
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
            outgoing: What this rank has to give, all of one type; at least one piece.
            to: For each piece the rank that gets it.
            incoming: For each rank the shapes of the pieces that come from there, in the order in which it has them.

        Returns:
            For each rank its pieces.
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
        return {rank: _cut(part.view(dtype), incoming[rank]) for rank, part in enumerate(torch.split(received, coming))}


def _cut(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    parts = torch.split(flat, [prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
