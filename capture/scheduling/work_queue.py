"""Work queues: which runs of consecutive shards, or of other units of work, this worker processes next.

`shared_queue` gives runs to workers that come, go and die. A counter that all workers share says which run is next. A
worker claims a run by writing its number at it. A worker that finds no run left looks at what is done (for a capture:
the commit records on the disk, which alone decide) and claims the runs whose owner is gone. Two workers that process
the same run by mistake write the same bytes, and the first commit record counts.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from residua.capture.scheduling.membership import Membership

_LOOK_FRACTION = 0.1  # of the time waited so far: nobody waits much longer than the other workers work

WorkQueue: TypeAlias = Iterator[range | None]
"""Runs of consecutive shards; None while there is none, but one may come. The queue of a single worker has one run."""


class Run(NamedTuple):
    """Consecutive shards, and those of them that were done when the run was taken."""

    shards: range
    committed: frozenset[int]


def runs_of(queue: WorkQueue, done: Callable[[], Collection[int]]) -> Iterator[Run | None]:
    """Yield the runs of a queue with those of their shards that are done; None while the queue has none.

    Args:
        queue: The queue.
        done: Returns the shards that are done.
    """
    for shards in queue:
        yield None if shards is None else Run(shards, frozenset(done()).intersection(shards))


def unit_runs(
    membership: Membership | None, n: int, done: Callable[[], Collection[int]], *, name: str = "run"
) -> Iterator[Run | None]:
    """Yield units of work as runs, with those that were done before; None while there is none. See `units_left`.

    All units are runs of the queue, also those that are done: the numbers of runs are the same for every worker,
    whenever it comes.

    Args:
        membership: This worker's membership in the job; None for a single worker, which gets one run.
        n: Number of units.
        done: Returns the units that are done, by any worker.
        name: As for `shared_queue`.
    """
    before = frozenset(done())
    everything = [range(unit, unit + 1) for unit in range(n)]
    alone: WorkQueue = iter([range(n)])
    queue = alone if membership is None else shared_queue(membership, everything, done, name=name)
    return runs_of(queue, lambda: before)


def units_left(runs: Iterator[Run | None]) -> Iterator[int | None]:
    """Yield the units of runs that were not done when the runs were taken; None while there is none."""
    for run in runs:
        if run is None:
            yield None
        else:
            yield from (unit for unit in run.shards if unit not in run.committed)


def shared_queue(
    membership: Membership,
    runs: Sequence[range],
    done: Callable[[], Collection[int]],
    *,
    name: str = "run",
    more: Iterator[Sequence[range] | None] | None = None,
    max_wait_seconds: float = 0.5,
) -> WorkQueue:
    """Yield the runs that this worker processes, of those that several workers share, until every shard is done.

    Args:
        membership: This worker's membership in the job.
        runs: All runs; the same for every worker.
        done: Returns the shards that are done, by any worker.
        name: Tells this work from other work of the same job.
        more: Yields runs that follow `runs`, the same for every worker; None while there are none, but some may come.
        max_wait_seconds: Longest time between two looks at `done`, once no run is left to claim.
    """
    known = list(runs)
    yield from _in_turn(membership, known, iter(()) if more is None else more, name)
    exhausted_at = time.monotonic()
    next_look = 0.0
    while True:
        now = time.monotonic()
        if now < next_look:
            yield None
            continue
        next_look = now + min(max_wait_seconds, _LOOK_FRACTION * (now - exhausted_at))
        finished = frozenset(done())
        left = [number for number, shards in enumerate(known) if not finished.issuperset(shards)]
        if not left:
            return
        yield next((known[number] for number in left if _claim_lost(membership, f"{name}/{number}")), None)


def _in_turn(
    membership: Membership, known: list[range], more: Iterator[Sequence[range] | None], name: str
) -> WorkQueue:
    """Yield the runs that this worker gets from the counter; add to `known` what comes meanwhile."""
    while True:
        number = membership.count(f"{name}s") - 1
        while number >= len(known):
            try:
                came = next(more)
            except StopIteration:
                return
            known.extend(came or ())
            if number >= len(known):
                yield None
        if membership.claim(f"{name}/{number}"):
            yield known[number]


def _claim_lost(membership: Membership, name: str) -> bool:
    """Claim a run whose owner is gone, or that nobody owns; return whether that was so."""
    owner = membership.lost_owner(name)
    return owner is not None and membership.claim(name, owner)
