"""Numbered units of work that processes share: the groups of a replay, the pairs of a sweep, the batches of a sample.

Processes that were launched together find each other as those of a capture do. Each unit is done by one replica of the
model, whole: with the same figures whichever it is, so that nothing tells afterwards how many there were. Where several
processes hold a replica together, its first rank takes units for all of them and keeps what is found.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from residua.capture.layout.process_layout import spans_processes, worker_group_of
from residua.capture.runtime.collectives import Agreement, failed_together, in_step
from residua.capture.runtime.sharded import is_sharded, is_zero3
from residua.capture.scheduling.membership import Membership
from residua.capture.scheduling.work_queue import LocalQueue, SharedQueue, runs_of
from residua.capture.scheduling.worker_group import WorkerGroup
from residua.pipelines.jobs.rendezvous import meeting
from residua.pipelines.jobs.replicas import replica_group
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.canonical import differing
from residua.store.base.errors import CaptureError, PlanError

StepT = TypeVar("StepT")
_IDLE_SECONDS = 0.1
_LOOK_SECONDS = 1.0


@contextmanager
def sharing(out: Path | None, settings: CaptureSettings) -> Iterator[Membership | None]:
    """Yield this process's place among those that were launched together; None if it is alone.

    Args:
        out: Folder of the results, which is kept from other runs meanwhile; None where none is written.
        settings: They say over how many processes a model is split that is loaded here.

    Raises:
        ArchiveInUseError: Another run is at work on `out`.
        CaptureError: The others do not appear.
        PlanError: As many processes cannot be shared out.
    """
    with (
        meeting(out, join=False) as membership,
        nullcontext() if membership is None else membership,
        replica_group(settings, membership),
    ):
        yield membership


class SharedWork:
    """What one process does of a job that several share.

    Args:
        membership: Those that were launched together; None for one process alone.
        model: The model, as this process has it; making this is a collective of those that hold it together.
        alike: Whether all steps take the same number of forward passes. If so, processes with FSDP2 take steps of
            their own; otherwise they all take the same. With ZeRO-3 they always do: it gathers weights module by
            module, which blocks that only some of them leave out would disturb.

    Attributes:
        is_leader: Whether this process keeps what its replica finds.
    """

    def __init__(self, membership: Membership | None, model: nn.Module, *, alike: bool) -> None:
        self._membership = membership
        self._worker_group: WorkerGroup | None = None
        self._agree: Agreement | None = None
        if membership is not None and is_sharded(model) and (not alike or is_zero3(model)):
            self._worker_group = WorkerGroup(membership, range(membership.n_launched))
        elif membership is not None:
            self._worker_group = worker_group_of(model, membership) if spans_processes(model) else None
            self._agree = Agreement() if is_sharded(model) else None
        self.is_leader = self._worker_group is None or self._worker_group.is_leader
        self._next_look = 0.0
        self._n_others = 0

    def plan_once(self, make: Callable[[], Mapping[str, Any]], check: Callable[[], None]) -> Mapping[str, Any]:
        """Let worker 0 call `make`, and every other one `check` after that; return what `make` returned."""
        if self._membership is None:
            return make()
        said = self._membership.once("plan", make)
        if self._membership.number:
            check()
        return said

    def agree_on(self, request: Mapping[str, Any]) -> None:
        """Make sure that every process was asked for the same as worker 0.

        Args:
            request: What was asked for, as JSON values.

        Raises:
            PlanError: This one was asked for something else.
        """
        here = json.loads(json.dumps(request))
        first = self.plan_once(lambda: here, lambda: None)
        if first != here:
            listed = "\n  ".join(differing(first, here, word="here"))
            raise PlanError(
                f"the processes were not asked for the same, the first one there, this one here:\n  {listed}"
            )

    def units(self, n: int, done: Callable[[], Collection[int]]) -> Iterator[int | None]:
        """Yield the units that this process is to do; None while it has none, though one may come.

        Args:
            n: How many there are.
            done: Says which are done, whoever did them; asked once, and then while others are waited for.
        """
        before = frozenset(done())
        everything = [range(unit, unit + 1) for unit in range(n)]
        work = LocalQueue(n) if self._membership is None else SharedQueue(self._membership, everything, done)
        runs = runs_of(work, lambda: before)
        if self._worker_group is not None:
            runs = self._worker_group.in_lockstep(runs, waits=self._agree is None)
        for run in runs:
            if run is None:
                yield None
            else:
                yield from (unit for unit in run.shards if unit not in run.committed)

    def steps(self, steps: Iterator[StepT | None], *, along: Callable[[], object]) -> Iterator[StepT]:
        """Yield steps of units, and wait where there is none yet.

        Args:
            steps: Steps that take the same number of forward passes each; None while there is none.
            along: Makes as many forward passes for nothing, where those of a sharded model need every process.
        """
        for step in steps if self._agree is None else in_step(steps, self._agree):
            if step is not None:
                yield step
            elif self._agree is not None:
                along()
            else:
                time.sleep(_IDLE_SECONDS)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Say in words what it means if a forward pass fails that several processes make together.

        Raises:
            CaptureError: It failed.
        """
        try:
            yield
        except CaptureError:
            raise
        except RuntimeError as error:
            if self._worker_group is None and self._agree is None:
                raise
            raise failed_together(error, safe="finished") from error

    def so_far(self, n_done: int) -> int:
        """Tell the others how many this process has done; return, on worker 0, how many all have."""
        if self._membership is None:
            return n_done
        n_mine = n_done if self.is_leader else 0
        self._membership.report(n_done=n_mine)
        if self._membership.number == 0 and time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            others = [f for f in self._membership.all_statuses() if f["worker"] != self._membership.number]
            self._n_others = sum(figures.get("n_done", 0) for figures in others)
        return n_mine + self._n_others

    def finish(
        self, said: Mapping[str, Any], close: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """Wait until all have ended; return on every process what `close` makes of what they say.

        Args:
            said: What this process has to say, as JSON values.
            close: Called by worker 0 with what each said, in the order of their numbers.

        Raises:
            CaptureError: Worker 0 is gone.
        """
        if self._membership is None:
            return close([said])
        membership = self._membership
        membership.report(said=said)
        return membership.finish(lambda: close([f["said"] for f in membership.all_statuses() if "said" in f]))

    def found(
        self,
        n: int,
        find: Callable[[int], Mapping[str, Any]],
        *,
        close: Callable[[list[Mapping[str, Any]]], None],
        on_unit: Callable[[int, int], None],
    ) -> list[Mapping[str, Any]]:
        """Return, on every process, what `find` gives for each unit; each is found by one replica.

        Args:
            n: How many units there are.
            find: Looks at one unit; what it gives has to be JSON values.
            close: Called by worker 0 with all of it, before any process returns.
            on_unit: Called with the units done and in all; on worker 0 with those of all processes.

        Raises:
            CaptureError: Another process is gone, and its units with it.
        """
        findings = _Findings(self._membership, n)

        def of_all(_said: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
            if n_missing := n - len(findings.done()):
                raise self.missing(f"results of {n_missing} of {n}")
            close(findings.in_order())
            return {"found": findings.in_order()}

        units = self.steps(self.units(n, findings.done), along=lambda: find(0))
        for n_done, unit in enumerate(units, start=1):
            with self.forward():
                found = find(unit)
            if self.is_leader:
                findings.add(unit, found)
            on_unit(min(n, self.so_far(n_done)), n)
        everything: list[Mapping[str, Any]] = self.finish({}, of_all)["found"]
        on_unit(n, n)
        return everything

    def missing(self, what: str) -> CaptureError:
        """Return the error for results that are missing because workers are gone."""
        gone = "" if self._membership is None else self._membership.unfinished()
        return CaptureError(
            f"{what} are missing because {gone or 'a worker'} is gone. What was finished is safe; run the same "
            "command again to go on."
        )


class _Findings:
    """What was found of each unit, by this process and by the others, who tell it in the worker group's store.

    Args:
        membership: The others, if there are any.
        n: How many units there are.
    """

    def __init__(self, membership: Membership | None, n: int) -> None:
        self._membership = membership
        self._n = n
        self._found: dict[int, Mapping[str, Any]] = {}

    def add(self, unit: int, found: Mapping[str, Any]) -> None:
        """Take what this process found."""
        self._found[unit] = found
        if self._membership is not None:
            self._membership.publish(f"found/{unit}", found)

    def done(self) -> Collection[int]:
        """Return the units that anybody has found something of."""
        for unit in range(self._n) if self._membership is not None else ():
            message = (
                None if unit in self._found or self._membership is None else self._membership.message(f"found/{unit}")
            )
            if message is not None:
                self._found[unit] = message
        return self._found.keys()

    def in_order(self) -> list[Mapping[str, Any]]:
        """Return everything, by unit."""
        return [self._found[unit] for unit in range(self._n)]
