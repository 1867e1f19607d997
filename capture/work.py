"""What a worker is to do: runs of consecutive shards, one after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from residua.store.commits import committed_shards
from residua.store.schedule import Schedule


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

    def __init__(self, schedule: Schedule) -> None:
        self._runs = [range(schedule.n_shards)]

    def take(self) -> range | None:
        """Return the run, once."""
        return self._runs.pop() if self._runs else None

    def is_over(self) -> bool:
        """Say that there is nothing to wait for."""
        return True


class Run(NamedTuple):
    """Consecutive shards, and those of them that had a commit when they were taken."""

    shards: range
    committed: frozenset[int]


def runs_of(work: Work, archive: Path) -> Iterator[Run | None]:
    """Yield run after run; None while no run can be had, though one may come."""
    while True:
        shards = work.take()
        if shards is not None:
            yield Run(shards, frozenset(committed_shards(archive).intersection(shards)))
        elif work.is_over():
            return
        else:
            yield None
