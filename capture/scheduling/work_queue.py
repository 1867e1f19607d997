"""Work queues: which runs of consecutive shards, or of other units of work, this worker processes next.

`SharedQueue` hands out runs to workers that come, go and die. A counter that all workers share says which run is next.
A worker claims a run by writing its number at it. A worker that finds no run left looks at what is done (for a capture:
the commit records on the disk, which alone decide) and claims the runs whose owner is gone. Two workers that process
the same run by mistake write the same bytes, and the first commit record counts.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

from residua.capture.scheduling.membership import Membership

_MOST_LOOK_SECONDS = 0.5
_LOOK_FRACTION = 0.1  # of the time waited so far: nobody waits much longer than the other workers work


class WorkQueue(Protocol):
    """Gives runs of consecutive shards to one worker or to several."""

    def take(self) -> range | None:
        """Return the next run; None if there is none now."""
        ...

    def is_over(self) -> bool:
        """Return whether no run will come any more, whatever happens to other workers."""
        ...


class LocalQueue:
    """The queue of a single worker: every shard, in one run."""

    def __init__(self, n_shards: int) -> None:
        self._runs = [range(n_shards)]

    def take(self) -> range | None:
        """Return the run; None after that."""
        return self._runs.pop() if self._runs else None

    def is_over(self) -> bool:
        """Return True: there is nothing to wait for."""
        return True


class Run(NamedTuple):
    """Consecutive shards, and those of them that were done when the run was taken."""

    shards: range
    committed: frozenset[int]


def runs_of(work: WorkQueue, done: Callable[[], Collection[int]]) -> Iterator[Run | None]:
    """Yield the runs of a queue; None while there is none, but one may come.

    Args:
        work: The queue.
        done: Returns the shards that are done.
    """
    while True:
        shards = work.take()
        if shards is not None:
            yield Run(shards, frozenset(done()).intersection(shards))
        elif work.is_over():
            return
        else:
            yield None


class SharedQueue:
    """A queue that several workers share; it ends when every shard is done.

    Args:
        membership: This worker's membership in the job.
        runs: All runs; the same for every worker.
        done: Returns the shards that are done, by any worker.
    """

    def __init__(self, membership: Membership, runs: Sequence[range], done: Callable[[], Collection[int]]) -> None:
        self._membership = membership
        self._runs = runs
        self._done = done
        self._is_exhausted = False
        self._exhausted_at = 0.0
        self._left: list[int] = []
        self._next_look = 0.0

    def take(self) -> range | None:
        """Return the next run, or one that a lost worker did not finish; None if there is none now."""
        while not self._is_exhausted:
            run = self._membership.count("runs") - 1
            if run >= len(self._runs):
                self._is_exhausted, self._exhausted_at = True, time.monotonic()
            elif self._membership.claim(f"run/{run}"):
                return self._runs[run]
        return self._take_over()

    def is_over(self) -> bool:
        """Return whether every shard is done."""
        return self._is_exhausted and not self._left

    def _take_over(self) -> range | None:
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + min(_MOST_LOOK_SECONDS, _LOOK_FRACTION * (now - self._exhausted_at))
        done = frozenset(self._done())
        self._left = [run for run, shards in enumerate(self._runs) if not done.issuperset(shards)]
        for run in self._left:
            owner = self._membership.lost_owner(f"run/{run}")
            if owner is not None and self._membership.claim(f"run/{run}", owner):
                return self._runs[run]
        return None
