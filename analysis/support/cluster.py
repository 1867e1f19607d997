"""Where analyses run: on worker processes of this machine, on an existing Dask cluster, or in this process.

A job takes paths and numbers, opens the archive where it runs, and returns a small result, so no activations are sent
or spilled. A job whose worker dies runs again on another worker.

`Cluster.map` returns the result of every job. `Cluster.sum` returns the sum of the results: it is added up where the
jobs run, in a fixed order (`residua.analysis.support.sums`), and only the total comes back.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import uuid4

import distributed
from dask.system import CPU_COUNT
from distributed import Client, KilledWorker
from distributed.system import MEMORY_LIMIT
from tqdm import tqdm

from residua.analysis.support.kept import let_go
from residua.analysis.support.sums import Nodes, Share, joined, shares, sum_share, total_of
from residua.analysis.support.threads import one_thread
from residua.store.base.errors import AnalysisError, ResiduaError
from residua.store.base.freed_memory import return_freed_memory
from residua.store.base.naming import names_flags, naming_flags
from residua.store.base.sizes import Size, n_bytes

Job = TypeVar("Job")
Term = TypeVar("Term")
Advance = Callable[[float], object]
"""Takes the share of a piece of work that was done since the last call."""
OnReport = Callable[[int, tuple[float, ...]], object]
"""Takes the number of a job and what the job reports."""
Result = TypeVar("Result")

INLINE = "inline"
_dask: Any = distributed  # its functions have no types
_MEMORY_LIMIT = "4GiB"
_LEAST_BYTES = 64 * 2**20  # of a worker process: Python with numpy and Dask takes about that
_JOBS_PER_WORKER = 2  # submitted at a time, so that a worker never waits for its next job
_SHARES_PER_WORKER = 2  # of the leaves of a sum: an idle worker may take the second from a slow one
_JOINED = 8  # partial sums of as many jobs that are added in one job, or of two if they are large
_TOPIC = "residua"  # of events by which jobs report
_TERMS_SHARE = 8  # of a worker's memory, in which the partial sums of a job must have room


class Cluster(Protocol):
    """Runs jobs. `connect` makes one.

    Attributes:
        n_workers: Number of jobs that run at a time.
        memory_limit: Bytes of memory that the process of one job may use in total.
    """

    n_workers: int
    memory_limit: int

    def map(
        self,
        function: Callable[..., Result],
        jobs: Sequence[Job],
        *,
        label: str,
        on_report: OnReport | None = None,
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number and the result of each job as it completes, in any order.

        The function and the jobs are pickled. Torch and numpy use one thread inside a job. A job whose worker dies runs
        again.

        Args:
            function: Called with one job on a worker: a module-level function, or a `functools.partial` of one.
            jobs: Small objects, for example paths and `Block`s.
            label: Text of the progress bar.
            on_report: Draw no bar. Instead, a job gets as its second argument a function that sends numbers here, to
                report its progress; `on_report` is called with the number of the job and with them, soon and in any
                thread.

        Raises:
            AnalysisError: A job failed (the cause is chained), or every worker that tried it died. The other jobs are
                cancelled. Residua's own errors are raised unchanged.
        """
        ...

    def send(self, value: Any) -> Any:
        """Return what stands for `value` in the arguments of `sum`, so that it reaches each worker once.

        It is not changed by the jobs. A worker that joins or replaces another gets it when it needs it.
        """
        ...

    def sum(
        self,
        term: Callable[..., Term],
        arguments: Sequence[Any],
        n_leaves: int,
        *,
        merge: Callable[[Term, Term], Term],
        label: str,
        term_bytes: int = 0,
        first_worker: int = 0,
        bar: Advance | None = None,
    ) -> Term:
        """Return the sum of `term(*arguments, leaf)` over the leaves 0 to `n_leaves` - 1.

        The tree of the sum is fixed, so every cluster gives the same bits. Workers add up shares of neighbouring leaves
        and then the sums of these; there are a few jobs for each worker, however many leaves there are. In repeated
        calls, a leaf goes to the worker that it went to before, as long as the workers are the same, so that it may
        keep what it has read (`residua.analysis.support.kept`). Several threads may call this at once.

        Args:
            term: A module-level function, or a `functools.partial` of one.
            arguments: Its first arguments, or what `send` returned for them.
            n_leaves: Number of leaves, at least one.
            merge: Adds its second argument to its first, which it may change, and returns the sum.
            label: Names the sum in messages, and in its bar unless there is a `bar`.
            term_bytes: Bytes of a term. If the partial sums of many leaves do not fit into an eighth of a worker's
                memory, a job is one leaf.
            first_worker: Where the first leaf goes; sums of few leaves side by side need different numbers.
            bar: Called with shares of the leaves that are done, which add up to one.

        Raises:
            AnalysisError: As `map`.
        """
        ...

    def bar(self, label: str, total: float, unit: str) -> tqdm:
        """Return a progress bar, which is drawn if the bars of jobs are."""
        ...

    def let_go(self, analysis: str) -> None:
        """Make all workers keep no value of `analysis` any longer (`residua.analysis.support.kept`)."""
        ...


@contextmanager
def connect(
    scheduler: str | None = None,
    *,
    workers: int | None = None,
    memory_limit: Size = _MEMORY_LIMIT,
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
        PlanError: The memory limit is no size.
    """
    limit = n_bytes(memory_limit, "memory_limit")
    if workers is not None and workers < 1:
        raise AnalysisError(f"{workers} workers were requested: request at least 1")
    if scheduler == INLINE:
        yield _Inline(limit, shown=shown)
        return
    with _local(workers, limit) if scheduler is None else _remote(scheduler, timeout) as client:
        yield _Distributed(client, shown=shown)


def or_inline(cluster: Cluster | None) -> Cluster:
    """Return `cluster`; if it is None, one that runs jobs in this process."""
    return _Inline(n_bytes(_MEMORY_LIMIT, "memory_limit"), shown=False) if cluster is None else cluster


class _Inline:
    """Runs jobs in this process, one after the other."""

    n_workers = 1

    def __init__(self, memory_limit: int, *, shown: bool) -> None:
        self.memory_limit = memory_limit
        self._shown = shown

    def map(
        self,
        function: Callable[..., Result],
        jobs: Sequence[Job],
        *,
        label: str,
        on_report: OnReport | None = None,
    ) -> Iterator[tuple[int, Result]]:
        with _bar(label, len(jobs), shown=self._shown and on_report is None) as bar:
            for number, job in enumerate(jobs):
                with one_thread(), _failing(label, number):
                    result = function(job) if on_report is None else function(job, partial(on_report, number))
                return_freed_memory()
                bar.update()
                yield number, result

    def send(self, value: Any) -> Any:
        return value

    def sum(
        self,
        term: Callable[..., Term],
        arguments: Sequence[Any],
        n_leaves: int,
        *,
        merge: Callable[[Term, Term], Term],
        label: str,
        term_bytes: int = 0,  # noqa: ARG002  # only log2 of them are in memory
        first_worker: int = 0,  # noqa: ARG002  # there is one
        bar: Advance | None = None,
    ) -> Term:
        with _steps(self, label, n_leaves, bar) as step:

            def counted(leaf: int) -> Term:
                with _failing(label, leaf):
                    found = term(*arguments, leaf)
                return_freed_memory()
                step()
                return found

            with one_thread():
                return total_of(sum_share(counted, Share(0, n_leaves), n_leaves, merge))

    def bar(self, label: str, total: float, unit: str) -> tqdm:
        return _bar(label, total, unit=unit, shown=self._shown)

    def let_go(self, analysis: str) -> None:
        let_go(analysis)


class _Distributed:
    """Runs jobs on the workers of a Dask cluster. Each worker has a few submitted jobs at a time."""

    def __init__(self, client: Client, *, shown: bool) -> None:
        self._client: Any = client
        self._shown = shown
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        self.n_workers = sum(worker["nthreads"] for worker in workers)
        # A worker without a limit is assumed to have as much memory as this machine.
        self.memory_limit = min((worker["memory_limit"] or MEMORY_LIMIT) // worker["nthreads"] for worker in workers)
        self._on_report: dict[str, OnReport] = {}  # by topic
        self._subscribing = Lock()

    def map(
        self,
        function: Callable[..., Result],
        jobs: Sequence[Job],
        *,
        label: str,
        on_report: OnReport | None = None,
    ) -> Iterator[tuple[int, Result]]:
        waiting = iter(enumerate(jobs))
        numbers: dict[Any, int] = {}  # of the jobs, by future
        completed = _dask.as_completed(loop=self._client.loop)
        topic = "" if on_report is None else self._subscribe(on_report)

        def submit(n_jobs: int) -> None:
            for number, job in islice(waiting, n_jobs):
                said = () if on_report is None else (_Report(topic, number),)
                future = self._client.submit(_run_on_worker, function, job, *said, flags=names_flags(), pure=False)
                numbers[future] = number
                completed.add(future)

        try:
            with _bar(label, len(jobs), shown=self._shown and on_report is None) as bar:
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
            self._on_report.pop(topic, None)
            self._client.cancel(list(numbers))

    def _subscribe(self, on_report: OnReport) -> str:
        """Call `on_report` with what jobs report under the name that is returned."""
        name = uuid4().hex
        with self._subscribing:
            if not self._on_report:
                self._client.subscribe_topic(_TOPIC, self._pass_on)
            self._on_report[name] = on_report
        return name

    def _pass_on(self, event: tuple[float, tuple[str, int, tuple[float, ...]]]) -> None:
        name, number, report = event[1]
        if on_report := self._on_report.get(name):  # the topic is that of all who use the scheduler
            on_report(number, tuple(report))

    def send(self, value: Any) -> Any:
        # As the result of a task, it is there again when the workers that had it are gone; scattered data are not.
        return self._client.submit(_same, value, pure=False)

    def sum(
        self,
        term: Callable[..., Term],
        arguments: Sequence[Any],
        n_leaves: int,
        *,
        merge: Callable[[Term, Term], Term],
        label: str,
        term_bytes: int = 0,
        first_worker: int = 0,
        bar: Advance | None = None,
    ) -> Term:
        threads = self._client.nthreads()
        workers = sorted(threads) or [None]
        n_shares = _SHARES_PER_WORKER * max(1, sum(threads.values()))
        n_joined = _JOINED
        if term_bytes * 2 * n_leaves.bit_length() > self.memory_limit // _TERMS_SHARE:
            n_shares, n_joined = n_leaves, 2
        divided = shares(n_leaves, n_shares)
        numbers: dict[Any, int] = {}
        level: list[Any] = []
        for number, share in enumerate(divided):
            worker = workers[(first_worker + number * len(workers) // len(divided)) % len(workers)]
            where = {} if worker is None else {"workers": [worker], "allow_other_workers": True}
            task = self._client.submit(
                _sum_on_worker, term, merge, share, n_leaves, *arguments, flags=names_flags(), pure=False, **where
            )
            numbers[task] = number
            level.append(task)
        completed = _dask.as_completed(level, loop=self._client.loop)
        while len(level) > 1:
            groups = [level[i : i + n_joined] for i in range(0, len(level), n_joined)]
            level = [  # before others begin, so that few partial sums wait
                self._client.submit(_join_on_worker, merge, n_leaves, *group, pure=False, priority=1)
                for group in groups
            ]
            del groups
        (total,) = level
        try:
            with _steps(self, label, len(divided), bar) as step:
                for future in completed:
                    with _failing(label, numbers.pop(future)):
                        if future.status != "finished":
                            future.result()  # raises
                    del future  # or the worker keeps the term, although it was added to another
                    step()
            with _failing(label, len(divided) - 1):
                found: Term = total_of(total.result())
        finally:
            self._client.cancel([*numbers, total])
        return found

    def bar(self, label: str, total: float, unit: str) -> tqdm:
        return _bar(label, total, unit=unit, shown=self._shown)

    def let_go(self, analysis: str) -> None:
        self._client.run(let_go, analysis, on_error="ignore")  # a worker that is gone keeps nothing


def _same(value: Result) -> Result:
    return value


def _sum_on_worker(
    term: Callable[..., Term],
    merge: Callable[[Term, Term], Term],
    share: Share,
    n_leaves: int,
    *arguments: Any,
    flags: bool,
) -> Nodes[Term]:
    """Add up the terms of one share; `flags` as in `_run_on_worker`."""
    with one_thread(), naming_flags(flags):
        return sum_share(lambda leaf: term(*arguments, leaf), share, n_leaves, merge)


def _join_on_worker(merge: Callable[[Term, Term], Term], n_leaves: int, *parts: Nodes[Term]) -> Nodes[Term]:
    """Add up partial sums; Dask may need them again if the worker of the result dies."""
    with one_thread():
        return joined(parts, n_leaves, merge)


def _run_on_worker(function: Callable[..., Result], *job: Any, flags: bool) -> Result:
    """Run one job with one thread, since every core has a worker; `flags`: how its messages name settings."""
    with one_thread(), naming_flags(flags):
        return function(*job)


class _Report(NamedTuple):
    """Sends what a job reports to the client that submitted it.

    There is one topic, because the scheduler remembers the last events of every topic for ever.
    """

    name: str
    number: int

    def __call__(self, report: tuple[float, ...]) -> None:
        _dask.get_worker().log_event(_TOPIC, (self.name, self.number, report))


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
    with _naming_lost(client, scheduler):
        try:
            client.wait_for_workers(1, timeout=timeout)
        except TimeoutError as error:
            raise AnalysisError(
                f"the Dask scheduler at {scheduler} has no workers: start some (dask worker {scheduler}), or wait "
                "until the requested ones have started"
            ) from error
        yield client


@contextmanager
def _naming_lost(client: Client, scheduler: str) -> Iterator[None]:
    """Close a client at the end; turn what follows from a lost scheduler into one error, which Dask does not log."""
    log = logging.getLogger("distributed.client")
    level, is_lost = log.level, False
    log.setLevel(logging.CRITICAL)
    try:
        with client:
            try:
                yield
            except Exception as error:
                is_lost = client.status != "running" or (_comes_of_os(error) and not _answers(client))
                raise
    except Exception as error:
        if not is_lost:
            raise
        cause = " ".join(str(error).split())  # Dask says it in two lines
        raise AnalysisError(
            f"the Dask scheduler at {scheduler} was lost while it had jobs of this command ({cause}): start it and its "
            "workers again, and run the same command again"
        ) from error
    finally:
        log.setLevel(level)


def _comes_of_os(error: BaseException | None) -> bool:
    """Say whether an error follows from one of the operating system, as those of connections do."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__
    return False


def _answers(client: Any) -> bool:
    """Say whether the scheduler still answers: a job may fail of a lost one before the client knows that it is lost."""
    try:
        client.nthreads()
    except OSError:
        return False
    return True


@contextmanager
def _steps(cluster: Cluster, label: str, n_steps: int, bar: Advance | None) -> Iterator[Callable[[], object]]:
    """Give a function to call after each of `n_steps` steps: it moves `bar`, or a bar of its own."""
    if bar is not None:
        yield partial(bar, 1 / n_steps)
        return
    with cluster.bar(label, n_steps, "job") as own:
        yield own.update


def _bar(label: str, total: float, *, shown: bool, unit: str = "job") -> tqdm:
    return tqdm(total=total, desc=label, unit=unit, file=sys.stderr, leave=False, disable=not shown)
