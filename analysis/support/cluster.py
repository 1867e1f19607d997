"""Where analyses run: a cluster of processes on this machine, one that exists, or this very process.

A job is given paths and numbers, opens the archive where it runs, and returns something small: so no activations
travel, and none are spilled. A job whose worker dies runs again on another.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

import distributed
import torch
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from distributed import Client, KilledWorker
from distributed.system import MEMORY_LIMIT
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from residua.store.base.errors import AnalysisError, ResiduaError

Job = TypeVar("Job")
Result = TypeVar("Result")

INLINE = "inline"
_dask: Any = distributed  # whose functions have no types
_LIMIT = "4GiB"
_AHEAD = 2  # jobs that a worker has at a time, so that it never waits for the next
_CONNECT_SECONDS = 10


class Cluster(Protocol):
    """What runs jobs; see `connect`."""

    @property
    def n_workers(self) -> int:
        """How many jobs run at a time."""
        ...

    @property
    def memory_limit(self) -> int:
        """Bytes that the process of one job may take in all."""
        ...

    def map(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], *, stage: str
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number and the result of each job as they complete, which is not in order.

        Function and jobs are pickled; torch and numpy use one thread inside a job, wherever it runs. A job whose
        worker dies runs again.

        Args:
            function: Called with a job where it runs: a function of a module, or a `functools.partial` of one.
            jobs: Small things, for example paths and `Block`s.
            stage: What is being done, in the words of the progress bar.

        Raises:
            AnalysisError: A job failed, and the cause is chained; or its workers died again and again. The other jobs
                are given up. An error of Residua's own comes up as it is.
        """
        ...


@contextmanager
def connect(
    scheduler: str | None = None, *, workers: int | None = None, memory_limit: str | int = _LIMIT, shown: bool = False
) -> Iterator[Cluster]:
    """Start or find what runs jobs, and let it go at the end; Dask arrays are computed there, too, meanwhile.

    Args:
        scheduler: Address of a Dask scheduler, for example ``tcp://host:8786``; ``inline`` for this process, one job
            after the other; None for a cluster of processes on this machine, with one thread each.
        workers: Processes of a cluster on this machine; by default one a core, as many as the memory allows.
        memory_limit: Memory of one worker. Workers of a cluster that exists have limits of their own, which count.
        shown: Whether to draw progress bars, on standard error.

    Raises:
        AnalysisError: No scheduler answers at that address, it has no workers, or the numbers make no sense.
    """
    limit = _positive_bytes(memory_limit)
    if workers is not None and workers < 1:
        raise AnalysisError(f"{workers} workers were asked for: ask for at least 1")
    if scheduler == INLINE:
        yield _Inline(limit, shown=shown)
        return
    with _local(workers, limit) if scheduler is None else _remote(scheduler) as client:
        yield _Distributed(client, shown=shown)


def _positive_bytes(size: str | int) -> int:
    try:
        found = int(parse_bytes(size))
    except ValueError as error:
        raise AnalysisError(f"the memory limit {size!r} is no size ({error}): write for example 4GiB") from error
    if found < 1:
        raise AnalysisError(f"the memory limit is {size!r}: a worker needs more")
    return found


def or_inline(cluster: Cluster | None) -> Cluster:
    """Return `cluster`, or this process where there is none."""
    return _Inline(_positive_bytes(_LIMIT), shown=False) if cluster is None else cluster


class _Inline:
    """Runs jobs in this process, one after the other."""

    n_workers = 1

    def __init__(self, memory_limit: int, *, shown: bool) -> None:
        self.memory_limit = memory_limit
        self._shown = shown

    def map(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], *, stage: str
    ) -> Iterator[tuple[int, Result]]:
        with _bar(stage, len(jobs), shown=self._shown) as bar:
            for number, job in enumerate(jobs):
                with _one_thread(), _failing(stage, number):
                    result = function(job)
                bar.update()
                yield number, result


class _Distributed:
    """Runs jobs on the workers of a Dask cluster, a few for each at a time."""

    def __init__(self, client: Client, *, shown: bool) -> None:
        self._client: Any = client
        self._shown = shown
        known = client.scheduler_info(n_workers=-1)["workers"].values()
        self.n_workers = sum(worker["nthreads"] for worker in known)
        # A worker without a limit is taken to have this machine's memory.
        self.memory_limit = min((worker["memory_limit"] or MEMORY_LIMIT) // worker["nthreads"] for worker in known)

    def map(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], *, stage: str
    ) -> Iterator[tuple[int, Result]]:
        waiting = iter(enumerate(jobs))
        numbers: dict[Any, int] = {}  # of the jobs by their futures
        completed = _dask.as_completed(loop=self._client.loop)

        def submit(n_jobs: int) -> None:
            for number, job in islice(waiting, n_jobs):
                future = self._client.submit(_alone, function, job, pure=False)
                numbers[future] = number
                completed.add(future)

        try:
            with _bar(stage, len(jobs), shown=self._shown) as bar:
                submit(_AHEAD * self.n_workers)
                for future in completed:
                    number = numbers.pop(future)
                    with _failing(stage, number):
                        result = future.result()
                    del future  # the result may be large, and is the caller's now
                    # Workers come and go; and while one job is left to be submitted, the loop must not run dry.
                    room = _AHEAD * sum(self._client.nthreads().values()) - len(numbers)
                    submit(max(room, 0 if numbers else 1))
                    bar.update()
                    yield number, result
        finally:
            self._client.cancel(list(numbers))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread of torch and of numpy's BLAS inside, as workers do, and as many as before outside."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(n_threads)


def _alone(function: Callable[[Job], Result], job: Job) -> Result:
    """Do one job, with one thread of torch and of numpy's BLAS: as many jobs as cores run beside each other.

    The limits stay: another job of this process may still run when this one ends.
    """
    torch.set_num_threads(1)
    threadpool_limits(1)
    return function(job)


@contextmanager
def _failing(stage: str, number: int) -> Iterator[None]:
    """Turn whatever a job raises into one of our errors."""
    try:
        yield
    except ResiduaError:
        raise
    except KilledWorker as error:
        raise AnalysisError(
            f"{stage}: job {number} was given up, since every worker that tried it died, which mostly means that it "
            "took more memory than allowed: allow more, or ask for less at once"
        ) from error
    except Exception as error:
        raise AnalysisError(f"{stage}: job {number} failed: {error}") from error


@contextmanager
def _local(workers: int | None, memory_limit: int) -> Iterator[Client]:
    n_workers = workers or max(1, min(CPU_COUNT, MEMORY_LIMIT // memory_limit))
    # Jobs keep to the limit by themselves. Pausing a worker that is near it could wait for ever.
    fractions = {f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause")}
    with (
        _dask.LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=memory_limit,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,  # what matters of it is raised
            config=fractions,
        ) as cluster,
        _dask.Client(cluster) as client,
    ):
        yield client


@contextmanager
def _remote(scheduler: str) -> Iterator[Client]:
    try:
        client = _dask.Client(scheduler, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise AnalysisError(
            f"no Dask scheduler answers at {scheduler} ({error}): start one (dask scheduler, and dask worker) and "
            "give its address, tcp://host:port; or leave it out for a cluster on this machine, or say inline"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
        except TimeoutError as error:
            raise AnalysisError(
                f"the Dask scheduler at {scheduler} has no workers: start some (dask worker {scheduler}), or wait "
                "until those that were asked for have started"
            ) from error
        yield client


def _bar(stage: str, n_jobs: int, *, shown: bool) -> tqdm:
    return tqdm(total=n_jobs, desc=stage, unit="job", file=sys.stderr, leave=False, disable=not shown)
