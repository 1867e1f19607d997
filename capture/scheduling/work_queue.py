"""Work queues: which runs of consecutive shards, or of other units of work, this worker processes next.

`SharedQueue` hands out runs to workers that come, go and die. A counter that all workers share says which run is next.
A worker claims a run by writing its number at it. A worker that finds no run left looks at what is done (for a capture:
the commit records on the disk, which alone decide) and claims the runs whose owner is gone. Two workers that process
the same run by mistake write the same bytes, and the first commit record counts.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

from residua.capture.scheduling.membership import Crew

_MOST_LOOK_SECONDS = 0.5
_LOOK_SHARE = 0.1  # of the time waited so far: so nobody waits much longer than the others are at work


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


class HandOut:
    """Gives this worker run after run, until every shard is done; it is the `Work` of a `record`.

    Args:
        crew: The workers.
        runs: All runs; the same for every worker.
        done: Says which shards are done, whoever did them.
    """

    def __init__(self, crew: Crew, runs: Sequence[range], done: Callable[[], Collection[int]]) -> None:
        self._crew = crew
        self._runs = runs
        self._done = done
        self._is_exhausted = False
        self._exhausted_at = 0.0
        self._left: list[int] = []
        self._next_look = 0.0

    def take(self) -> range | None:
        """Return the next run, or one that a worker who is gone left behind; None if there is none now."""
        while not self._is_exhausted:
            run = self._crew.count("runs") - 1
            if run >= len(self._runs):
                self._is_exhausted, self._exhausted_at = True, time.monotonic()
            elif self._crew.claim(f"run/{run}"):
                return self._runs[run]
        return self._take_over()

    def is_over(self) -> bool:
        """Say whether every shard is done."""
        return self._is_exhausted and not self._left

    def _take_over(self) -> range | None:
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + min(_MOST_LOOK_SECONDS, _LOOK_SHARE * (now - self._exhausted_at))
        done = frozenset(self._done())
        self._left = [run for run, shards in enumerate(self._runs) if not done.issuperset(shards)]
        for run in self._left:
            owner = self._crew.lost_owner(f"run/{run}")
            if owner is not None and self._crew.claim(f"run/{run}", owner):
                return self._runs[run]
        return None
