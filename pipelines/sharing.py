"""Numbered units of work that processes share: the groups of a replay, the pairs of a sweep, the batches of a sample.

Processes that were launched together find each other as those of a capture do. Each unit is done by one replica of the
model, whole: with the same figures whichever it is, so that nothing tells afterwards how many there were. Where several
processes hold a replica together, its first rank takes units for all of them and keeps what is found.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from residua.capture.crew import Crew
from residua.capture.handout import HandOut
from residua.capture.sharded import Agreement, in_step, is_sharded
from residua.capture.split import is_split, team_of
from residua.capture.work import AllAtOnce, runs_of
from residua.pipelines.meeting import meeting
from residua.pipelines.replicas import replica_group
from residua.pipelines.settings import CaptureSettings
from residua.store.errors import CaptureError

StepT = TypeVar("StepT")
_IDLE_SECONDS = 0.1
_LOOK_SECONDS = 1.0


@contextmanager
def sharing(out: Path | None, settings: CaptureSettings) -> Iterator[Crew | None]:
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
        meeting(out, join=False) as crew,
        nullcontext() if crew is None else crew,
        replica_group(settings, crew),
    ):
        yield crew


class SharedWork:
    """What one process does of a job that several share.

    Args:
        crew: Those that were launched together; None for one process alone.
        model: The model, as this process has it; making this is a collective of those that hold it together.

    Attributes:
        is_leader: Whether this process keeps what its replica finds.
    """

    def __init__(self, crew: Crew | None, model: nn.Module) -> None:
        self._crew = crew
        self._team = team_of(model, crew) if crew is not None and is_split(model) else None
        self._agree = Agreement() if crew is not None and is_sharded(model) else None
        self.is_leader = self._team is None or self._team.is_leader
        self._next_look = 0.0
        self._n_others = 0

    def plan_once(self, make: Callable[[], Mapping[str, Any]], check: Callable[[], None]) -> Mapping[str, Any]:
        """Let worker 0 call `make`, and every other one `check` after that; return what `make` returned."""
        if self._crew is None:
            return make()
        said = self._crew.once("plan", make)
        if self._crew.number:
            check()
        return said

    def units(self, n: int, done: Callable[[], Collection[int]]) -> Iterator[int | None]:
        """Yield the units that this process is to do; None while it has none, though one may come.

        Args:
            n: How many there are.
            done: Says which are done, whoever did them.
        """
        everything = [range(unit, unit + 1) for unit in range(n)]
        work = AllAtOnce(n) if self._crew is None else HandOut(self._crew, everything, done)
        runs = runs_of(work, done)
        if self._team is not None:
            runs = self._team.in_lockstep(runs, waits=self._agree is None)
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
            if self._team is None and self._agree is None:
                raise
            raise CaptureError(
                "the forward pass failed, perhaps because another process that holds this model died: "
                f"{(str(error).splitlines() or [''])[0]}. What was finished before is safe; run the same command "
                "again to go on."
            ) from error

    def so_far(self, n_done: int) -> int:
        """Tell the others how many this process has done; return, on worker 0, how many all have."""
        if self._crew is None:
            return n_done
        n_mine = n_done if self.is_leader else 0
        self._crew.tell(n_done=n_mine)
        if self._crew.number == 0 and time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            others = [f for f in self._crew.all_figures() if f["worker"] != self._crew.number]
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
        if self._crew is None:
            return close([said])
        crew = self._crew
        crew.tell(said=said)
        return crew.finish(lambda: close([f["said"] for f in crew.all_figures() if "said" in f]))

    def missing(self, what: str) -> CaptureError:
        """Return the error for results that are missing because workers are gone."""
        gone = "" if self._crew is None else self._crew.gone()
        return CaptureError(
            f"{what} are missing because {gone or 'a worker'} is gone. What was finished is safe; run the same "
            "command again to go on."
        )
