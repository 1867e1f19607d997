"""Where analyses run, and how the results of their jobs are added up.

Jobs run on worker processes of this machine, on an existing Dask cluster, or in this process. A job takes paths and
numbers, opens the archive where it runs, and returns a small result, so no activations are sent or spilled. A job whose
worker dies runs again on another worker.

Floating-point sums depend on their order, and jobs finish in any order. `in_order` yields results in the order of their
jobs. `OrderedSum` adds results in a fixed order, so that few of them wait in memory.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import distributed
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from distributed import Client, KilledWorker
from distributed.system import MEMORY_LIMIT
from tqdm import tqdm

from residua.analysis.support.threads import one_thread
from residua.store.base.errors import AnalysisError, ResiduaError
from residua.store.base.naming import names_flags, naming_flags

Job = TypeVar("Job")
Result = TypeVar("Result")
Term = TypeVar("Term")

INLINE = "inline"
_dask: Any = distributed  # its functions have no types
_MEMORY_LIMIT = "4GiB"
_LEAST_BYTES = 64 * 2**20  # of a worker process: Python with numpy and Dask takes about that
_JOBS_PER_WORKER = 2  # submitted at a time, so that a worker never waits for its next job


class Cluster(Protocol):
    """Runs jobs. `connect` makes one.

    Attributes:
        n_workers: Number of jobs that run at a time.
        memory_limit: Bytes of memory that the process of one job may use in total.
    """

    n_workers: int
    memory_limit: int

    def map(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], *, label: str
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number and the result of each job as it completes, in any order.

        The function and the jobs are pickled. Torch and numpy use one thread inside a job. A job whose worker dies runs
        again.

        Args:
            function: Called with one job on a worker: a module-level function, or a `functools.partial` of one.
            jobs: Small objects, for example paths and `Block`s.
            label: Text of the progress bar.

        Raises:
            AnalysisError: A job failed (the cause is chained), or every worker that tried it died. The other jobs are
                cancelled. Residua's own errors are raised unchanged.
        """
        ...


@contextmanager
def connect(
    scheduler: str | None = None,
    *,
    workers: int | None = None,
    memory_limit: str | int = _MEMORY_LIMIT,
    shown: bool = False,
    timeout: float = 10,
) -> Iterator[Cluster]:
    """Connect to workers, or start them, for a ``with`` block. Dask arrays are computed there, too.

    Args:
        scheduler: Address of a Dask scheduler, for example ``tcp://host:8786``; ``inline`` runs one job after the other
            in this process; None starts single-threaded worker processes on this machine.
        workers: Number of worker processes to start; by default one per core, as far as memory allows.
        memory_limit: Memory of one worker, in bytes or as text (``4GiB``). Workers of an existing cluster keep their
            own limits.
        shown: Draw progress bars on standard error.
        timeout: Seconds to wait for an existing scheduler, and then for its first worker.

    Raises:
        AnalysisError: No scheduler answers at the address, it has no workers, or a number is out of range.
    """
    limit = _positive_bytes(memory_limit)
    if workers is not None and workers < 1:
        raise AnalysisError(f"{workers} workers were requested: request at least 1")
    if scheduler == INLINE:
        yield _Inline(limit, shown=shown)
        return
    with _local(workers, limit) if scheduler is None else _remote(scheduler, timeout) as client:
        yield _Distributed(client, shown=shown)


def _positive_bytes(size: str | int) -> int:
    try:
        found = int(parse_bytes(size))
    except ValueError as error:
        raise AnalysisError(f"the memory limit {size!r} is not a size ({error}): write, for example, 4GiB") from error
    if found < 1:
        raise AnalysisError(f"the memory limit is {size!r}: give each worker more than 0 bytes")
    return found


def or_inline(cluster: Cluster | None) -> Cluster:
    """Return `cluster`; if it is None, one that runs jobs in this process."""
    return _Inline(_positive_bytes(_MEMORY_LIMIT), shown=False) if cluster is None else cluster


class _Inline:
    """Runs jobs in this process, one after the other."""

    n_workers = 1

    def __init__(self, memory_limit: int, *, shown: bool) -> None:
        self.memory_limit = memory_limit
        self._shown = shown

    def map(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], *, label: str
    ) -> Iterator[tuple[int, Result]]:
        with _bar(label, len(jobs), shown=self._shown) as bar:
            for number, job in enumerate(jobs):
                with one_thread(), _failing(label, number):
                    result = function(job)
                bar.update()
                yield number, result


class _Distributed:
    """Runs jobs on the workers of a Dask cluster. Each worker has a few submitted jobs at a time."""

    def __init__(self, client: Client, *, shown: bool) -> None:
        self._client: Any = client
        self._shown = shown
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        self.n_workers = sum(worker["nthreads"] for worker in workers)
        # A worker without a limit is assumed to have as much memory as this machine.
        self.memory_limit = min((worker["memory_limit"] or MEMORY_LIMIT) // worker["nthreads"] for worker in workers)

    def map(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], *, label: str
    ) -> Iterator[tuple[int, Result]]:
        waiting = iter(enumerate(jobs))
        numbers: dict[Any, int] = {}  # of the jobs, by future
        completed = _dask.as_completed(loop=self._client.loop)

        def submit(n_jobs: int) -> None:
            for number, job in islice(waiting, n_jobs):
                future = self._client.submit(_run_on_worker, function, job, flags=names_flags(), pure=False)
                numbers[future] = number
                completed.add(future)

        try:
            with _bar(label, len(jobs), shown=self._shown) as bar:
                submit(_JOBS_PER_WORKER * self.n_workers)
                for future in completed:
                    number = numbers.pop(future)
                    with _failing(label, number):
                        result = future.result()
                    del future  # or the worker keeps the result, which may be large
                    # Workers come and go. The loop ends when no future is left, so always keep one while jobs wait.
                    room = _JOBS_PER_WORKER * sum(self._client.nthreads().values()) - len(numbers)
                    submit(max(room, 0 if numbers else 1))
                    bar.update()
                    yield number, result
        finally:
            self._client.cancel(list(numbers))


def _run_on_worker(function: Callable[[Job], Result], job: Job, *, flags: bool) -> Result:
    """Run one job with one thread, since every core has a worker; `flags`: how its messages name settings."""
    with one_thread(), naming_flags(flags):
        return function(job)


@contextmanager
def _failing(label: str, number: int) -> Iterator[None]:
    """Turn any error of a job into one of ours."""
    try:
        yield
    except ResiduaError:
        raise
    except KilledWorker as error:
        raise AnalysisError(
            f"{label}: job {number} was given up, because every worker that tried it died. Most likely it took more "
            "memory than allowed: raise the memory limit, or request less at once"
        ) from error
    except Exception as error:  # a job may raise anything
        raise AnalysisError(f"{label}: job {number} failed: {error}") from error


@contextmanager
def _local(workers: int | None, memory_limit: int) -> Iterator[Client]:
    if memory_limit < _LEAST_BYTES:  # Dask would start such workers again and again
        raise AnalysisError(
            f"the memory limit is {memory_limit:,} bytes, and a worker needs {_LEAST_BYTES >> 20} MiB to start: give "
            "more, for example 4GiB (a number without a unit is bytes)"
        )
    n_workers = workers or max(1, min(CPU_COUNT, MEMORY_LIMIT // memory_limit))
    # Jobs respect the limit by themselves. A worker that pauses near its limit could wait for ever.
    never = {f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause")}
    with (
        _dask.LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=memory_limit,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,  # failures are raised
            config=never,
        ) as cluster,
        _dask.Client(cluster) as client,
    ):
        yield client


@contextmanager
def _remote(scheduler: str, timeout: float) -> Iterator[Client]:
    try:
        client = _dask.Client(scheduler, timeout=timeout)
    except (OSError, ValueError) as error:
        raise AnalysisError(
            f"no Dask scheduler answers at {scheduler} ({error}): start one (dask scheduler, and dask worker) and "
            "give its address, tcp://host:port; or give no address to start workers on this machine, or give inline"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=timeout)
        except TimeoutError as error:
            raise AnalysisError(
                f"the Dask scheduler at {scheduler} has no workers: start some (dask worker {scheduler}), or wait "
                "until the requested ones have started"
            ) from error
        yield client


def _bar(label: str, n_jobs: int, *, shown: bool) -> tqdm:
    return tqdm(total=n_jobs, desc=label, unit="job", file=sys.stderr, leave=False, disable=not shown)


def in_order(results: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    """Yield what `Cluster.map` yields in the order of the jobs. Results that come before their turn wait in memory."""
    waiting: dict[int, Result] = {}
    turn = 0
    for number, result in results:
        waiting[number] = result
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1


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
        self._waiting: dict[tuple[int, int], Term] = {}

    def add(self, index: int, term: Term) -> Term | None:
        """Add the term numbered `index`. Return the sum after the last one, None before."""
        for level, width in enumerate(self._widths[:-1]):
            sibling = index ^ 1
            if sibling < width:
                if (level, sibling) not in self._waiting:
                    self._waiting[level, index] = term
                    return None
                other = self._waiting.pop((level, sibling))
                term = self._merge(term, other) if index < sibling else self._merge(other, term)
            index //= 2
        return term
