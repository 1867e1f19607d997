"""Adding up what tasks return, in an order that does not depend on which was done first.

Floating-point sums depend on their order. Results are therefore merged as the leaves of one fixed binary tree:
the sum is the same, bit for bit, for any number of workers, and while one task is late, only a logarithm of the
results before it wait in memory.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

Part = TypeVar("Part")


class OrderedSum(Generic[Part]):
    """The sum of `n_parts` parts that arrive in any order.

    Args:
        n_parts: How many there will be, at least one.
        merge: Adds its second argument to its first and returns the sum; may change the first.
    """

    def __init__(self, n_parts: int, merge: Callable[[Part, Part], Part]) -> None:
        self._widths = [n_parts]  # nodes of each level of the tree, leaves first
        while self._widths[-1] > 1:
            self._widths.append(-(-self._widths[-1] // 2))
        self._merge = merge
        self._waiting: dict[tuple[int, int], Part] = {}

    def add(self, index: int, part: Part) -> Part | None:
        """Take in part `index`; returns the sum when it was the last one, else None."""
        for level, width in enumerate(self._widths[:-1]):
            neighbour = index ^ 1
            if neighbour < width:
                if (level, neighbour) not in self._waiting:
                    self._waiting[level, index] = part
                    return None
                other = self._waiting.pop((level, neighbour))
                part = self._merge(part, other) if index < neighbour else self._merge(other, part)
            index //= 2
        return part
