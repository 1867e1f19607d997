"""Sums in a fixed order: the same, bit for bit, whoever computes the terms and whenever they arrive.

Floating-point sums depend on their order. The terms of a sum are the leaves of one fixed binary tree: at each level,
neighbours are added in pairs, and a last one without a neighbour moves up. `OrderedSum` adds terms of such a tree as
they arrive. A worker adds up the leaves of its share as far as the tree allows (`sum_share`), and so few partial sums
travel (`joined`); neither the tree nor the result depends on how the leaves are shared.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from itertools import pairwise
from typing import Any, Generic, NamedTuple, Self, TypeAlias, TypeVar, cast

Key = TypeVar("Key")
Result = TypeVar("Result")
Term = TypeVar("Term")
Nodes: TypeAlias = Mapping[tuple[int, int], Term]
"""Partial sums by level of the tree and number within the level."""

_GRAINS = 16  # pieces of a share: shares end at multiples of a power of two, so that they leave few partial sums


class FieldSums:
    """What a dataclass of sums over rows inherits, whose fields are numbers, arrays, lists or sums themselves."""

    def merge(self, other: Self) -> Self:
        """Add the sums over other rows, those that follow, field by field."""
        for name in (field.name for field in fields(cast("Any", self))):
            mine, theirs = getattr(self, name), getattr(other, name)
            if hasattr(mine, "merge"):
                mine.merge(theirs)
            else:
                mine += theirs
                setattr(self, name, mine)
        return self


class Share(NamedTuple):
    """The leaves `start` to `stop` (not included)."""

    start: int
    stop: int


def shares(n_leaves: int, n_shares: int) -> list[Share]:
    """Divide the leaves of a tree into at most `n_shares` shares of nearly equal size."""
    n_shares = min(n_leaves, n_shares)
    grain = 1 << (max(1, n_leaves // (n_shares * _GRAINS)).bit_length() - 1)
    edges = {min(n_leaves, round(i * n_leaves / n_shares / grain) * grain) for i in range(n_shares)} | {0, n_leaves}
    ends = sorted(edges)
    return [Share(start, stop) for start, stop in pairwise(ends)]


class OrderedSum(Generic[Term]):
    """The sum of `n_terms` terms that arrive in any order.

    The terms are the leaves of a fixed binary tree, so the sum is the same, bit for bit, whatever order they arrive in.
    While one term is late, only about log2(`n_terms`) partial sums wait in memory.

    Args:
        n_terms: Number of terms, at least one.
        merge: Adds its second argument to its first and returns the sum; may change the first in place.
    """

    def __init__(self, n_terms: int, merge: Callable[[Term, Term], Term]) -> None:
        self._widths = [n_terms]  # nodes of each level of the tree, leaves first
        while self._widths[-1] > 1:
            self._widths.append(-(-self._widths[-1] // 2))
        self._merge = merge
        self.waiting: dict[tuple[int, int], Term] = {}

    def add(self, index: int, term: Term, *, level: int = 0) -> Term | None:
        """Add a leaf, or the sum of a node of a higher level. Return the sum after the last one, None before."""
        for above, width in enumerate(self._widths[level:-1], level):
            sibling = index ^ 1
            if sibling < width:
                if (above, sibling) not in self.waiting:
                    self.waiting[above, index] = term
                    return None
                other = self.waiting.pop((above, sibling))
                term = self._merge(term, other) if index < sibling else self._merge(other, term)
            index //= 2
        self.waiting[len(self._widths) - 1, 0] = term
        return term


def sum_share(
    term: Callable[[int], Term], share: Share, n_leaves: int, merge: Callable[[Term, Term], Term]
) -> Nodes[Term]:
    """Add up `term(leaf)` over a share of `n_leaves`, as far as the tree allows."""
    total = OrderedSum(n_leaves, merge)
    for leaf in range(*share):
        total.add(leaf, term(leaf))
    return total.waiting


def joined(parts: Iterable[Nodes[Term]], n_leaves: int, merge: Callable[[Term, Term], Term]) -> Nodes[Term]:
    """Add up the partial sums of several shares as far as the tree allows; they stay as they are."""
    own: list[Term] = []  # may be changed

    def merged(first: Term, second: Term) -> Term:
        is_own = any(first is one for one in own)
        own.append(merge(first if is_own else deepcopy(first), second))
        return own[-1]

    total = OrderedSum(n_leaves, merged)
    for part in parts:
        for (level, index), term in part.items():
            total.add(index, term, level=level)
            own[:] = [one for one in own if any(one is waiting for waiting in total.waiting.values())]
    return total.waiting


def total_of(nodes: Nodes[Term]) -> Term:
    """Return the sum of all leaves, once nothing else waits."""
    (total,) = nodes.values()
    return total


def by_key(
    results: Iterable[tuple[int, Result]], keys: Sequence[Key], n_parts: int
) -> Iterator[tuple[Key, list[Result]]]:
    """Yield each key with the results of its jobs, in their order, as soon as it has all of them.

    Args:
        results: Results with the numbers of their jobs, in any order.
        keys: The key of each job.
        n_parts: Jobs of a key.
    """
    waiting: dict[Key, dict[int, Result]] = {}
    for number, result in results:
        parts = waiting.setdefault(keys[number], {})
        parts[number] = result
        if len(parts) == n_parts:
            del waiting[keys[number]]
            yield keys[number], [parts[one] for one in sorted(parts)]


def in_order(results: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    """Yield results that come with the number of their job in the order of the jobs.

    Results that come before their turn wait in memory.
    """
    waiting: dict[int, Result] = {}
    turn = 0
    for number, result in results:
        waiting[number] = result
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1
