"""What a worker is to do: runs of consecutive numbers of shards, or of other units of work, one after the other."""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, Protocol


class Work(Protocol):
    """Hands out runs of consecutive shards, to one worker or to several."""

    def take(self) -> range | None:
        """Return the next run, or None if there is none to take now."""
        ...

    def is_over(self) -> bool:
        """Say whether there will be none any more, whatever happens to other workers."""
        ...


class AllAtOnce:
    """Work of a single worker: every shard, in one run."""

    def __init__(self, n_shards: int) -> None:
        self._runs = [range(n_shards)]

    def take(self) -> range | None:
        """Return the run, once."""
        return self._runs.pop() if self._runs else None

    def is_over(self) -> bool:
        """Say that there is nothing to wait for."""
        return True


class Run(NamedTuple):
    """Consecutive shards, and those of them that were done when they were taken."""

    shards: range
    committed: frozenset[int]


def runs_of(work: Work, done: Callable[[], Collection[int]]) -> Iterator[Run | None]:
    """Yield run after run; None while no run can be had, though one may come.

    Args:
        work: Hands them out.
        done: Says which shards are done.
    """
    while True:
        shards = work.take()
        if shards is not None:
            yield Run(shards, frozenset(done()).intersection(shards))
        elif work.is_over():
            return
        else:
            yield None
