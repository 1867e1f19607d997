"""Numbered units of work that processes share: the groups of a replay, the pairs of a sweep, the batches of a sample.

One replica of the model does each unit alone, with the same figures whichever replica it is. So the results do not
depend on the number of processes. If several processes hold a replica together, its first rank takes units for all of
them and keeps the results.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from residua.capture.layout.process_layout import spans_processes, worker_group_of
from residua.capture.runtime.collectives import Agreement, failed_together, in_step
from residua.capture.runtime.sharded import is_sharded, is_zero3
from residua.capture.scheduling.membership import Membership
from residua.capture.scheduling.work_queue import unit_runs, units_left
from residua.capture.scheduling.worker_group import WorkerGroup
from residua.pipelines.jobs.workers import Progress, missing_work, plan_once
from residua.store.base.canonical import differences, flatten
from residua.store.base.errors import CaptureError, PlanError

StepT = TypeVar("StepT")
_IDLE_SECONDS = 0.1


class SharedWork:
    """What one process does of a job that several share.

    Args:
        membership: The workers that were launched together; None for one process alone.
        model: The model in this process. Making this object is a collective of the processes that hold the model.
        alike: Whether all steps take the same number of forward passes. If so, processes with FSDP2 take steps of
            their own; otherwise all processes take the same step. With ZeRO-3 they always do: it gathers weights module
            by module, and fails if some processes skip a block.

    Attributes:
        is_leader: Whether this process keeps the results of its replica.
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
        self._progress = Progress(membership)

    def plan_once(self, make: Callable[[], Mapping[str, Any]], check: Callable[[], None]) -> Mapping[str, Any]:
        """Let worker 0 call `make`, and every other worker `check` after that; return what `make` returned."""
        return plan_once(self._membership, make, check)

    def agree_on(self, request: Mapping[str, Any]) -> None:
        """Check that every process was given the same request as worker 0.

        Args:
            request: The request, as JSON values.

        Raises:
            PlanError: This process was given another request.
        """
        here = json.loads(json.dumps(request))
        first = self.plan_once(lambda: here, lambda: None)
        if first != here:
            listed = "\n  ".join(differences(flatten(first), flatten(here), ("the first", "this one")))
            raise PlanError(f"the processes were given different requests:\n  {listed}")

    def units(self, n: int, done: Callable[[], Collection[int]]) -> Iterator[int | None]:
        """Yield the units that this process is to do; None while it has none but may get one.

        Args:
            n: Number of units.
            done: Returns the units that are done, by any process; called at the start, and while waiting for others.
        """
        runs = unit_runs(self._membership, n, done)
        if self._worker_group is not None:
            runs = self._worker_group.in_lockstep(runs, waits=self._agree is None)
        yield from units_left(runs)

    def steps(self, steps: Iterator[StepT | None], *, along: Callable[[], object]) -> Iterator[StepT]:
        """Yield steps of units; wait while there is none.

        Args:
            steps: Steps that take the same number of forward passes each; None while there is none.
            along: Makes as many forward passes without a result, where the forward passes of a sharded model need
                every process.
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
        """Explain a forward pass that fails while several processes run it together.

        Raises:
            CaptureError: The forward pass failed.
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
        """Report how many units this process has done; return on worker 0 how many all have done."""
        n_mine = n_done if self.is_leader else 0
        return n_done if self._membership is None else n_mine + sum(self._progress.others(n_mine))

    def finish(
        self, said: Mapping[str, Any], close: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """Wait until all processes have ended; return on every process what `close` makes of their messages.

        Args:
            said: This process's message, as JSON values.
            close: Called by worker 0 with the message of each process, in the order of their numbers.

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
        """Return, on every process, the result of `find` for each unit; one replica computes each.

        Args:
            n: Number of units.
            find: Computes the result of a unit, as JSON values.
            close: Called by worker 0 with all results, before any process returns.
            on_unit: Called with the units done and in all; on worker 0 with those of all processes.

        Raises:
            CaptureError: Another process is gone, and its units with it.
        """
        membership, results = self._membership, dict[int, Mapping[str, Any]]()

        def done() -> Collection[int]:
            if membership is not None:
                others = {unit: membership.message(f"found/{unit}") for unit in range(n) if unit not in results}
                results.update({unit: message for unit, message in others.items() if message is not None})
            return results.keys()

        def close_all(_said: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
            if n_missing := n - len(done()):
                raise self.missing(f"results of {n_missing} of {n}")
            in_order = [results[unit] for unit in range(n)]
            close(in_order)
            return {"found": in_order}

        units = self.steps(self.units(n, done), along=lambda: find(0))
        for n_done, unit in enumerate(units, start=1):
            with self.forward():
                found = find(unit)
            if self.is_leader:
                results[unit] = found
                if membership is not None:
                    membership.publish(f"found/{unit}", found)
            on_unit(min(n, self.so_far(n_done)), n)
        everything: list[Mapping[str, Any]] = self.finish({}, close_all)["found"]
        on_unit(n, n)
        return everything

    def missing(self, what: str) -> CaptureError:
        """Return the error for results that are missing because workers ended early."""
        return missing_work(self._membership, what)
