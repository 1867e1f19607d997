"""The parts of a replay's tables: which there are, which are written, and writing those that processes share.

A part holds the examples of one group of the schedule, which one replica runs, batch after batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from residua.capture.forward.plan_batch import PlanBatch
from residua.pipelines.jobs.sharing import SharedWork
from residua.pipelines.replay.tables import EXAMPLES, part_path, write_part
from residua.store.examples.schedule import Schedule


class Compared(NamedTuple):
    """What a batch gave: a table an example, and what has to be said, by its kind."""

    tables: list[pa.Table]
    notes: dict[str, str]


class Runs(Protocol):
    """Runs batches of an archive, edited and not."""

    def batches(self, examples: Sequence[list[int]]) -> Iterator[PlanBatch]:
        """Yield the batches of some examples."""
        ...

    def compare(self, batch: PlanBatch, *, is_leader: bool) -> Compared:
        """Run a batch."""
        ...


class ReplayParts:
    """The parts of a folder, numbered from 0.

    Args:
        folder: Where they lie.
        schedule: Says which examples run together.
        chosen: Per example, whether it is in the tables.
    """

    def __init__(self, folder: Path, schedule: Schedule, chosen: npt.NDArray[np.bool_]) -> None:
        self._folder = folder
        groups = ((group, _members(schedule, group, chosen)) for group in range(schedule.n_shards))
        self._groups = [(group, batches) for group, batches in groups if batches]

    def __len__(self) -> int:
        return len(self._groups)

    def batches(self, part: int) -> list[list[int]]:
        """Return the examples of each batch of a part."""
        return self._groups[part][1]

    def n_examples(self, part: int) -> int:
        """Return how many examples a part has."""
        return sum(map(len, self.batches(part)))

    def done(self) -> set[int]:
        """Return the parts that are on the disk."""
        there = {path.name for path in (self._folder / EXAMPLES).glob("part-*")}
        return {
            part
            for part, (group, _) in enumerate(self._groups)
            if part_path(self._folder, EXAMPLES, group).name in there
        }

    def write(self, part: int, tables: Sequence[pa.Table]) -> None:
        """Write a part, durably."""
        write_part(self._folder, self._groups[part][0], tables)


def _members(schedule: Schedule, group: int, chosen: npt.NDArray[np.bool_]) -> list[list[int]]:
    members = (batch.examples[chosen[batch.examples]] for batch in schedule.batches(group))
    return [examples.tolist() for examples in members if len(examples)]


class _Step(NamedTuple):
    """One batch of a part."""

    part: int
    batch: PlanBatch
    is_last: bool


def write_parts(
    parts: ReplayParts, runs: Runs, shared: SharedWork, on_example: Callable[[int, int], None]
) -> tuple[str, ...]:
    """Write the parts that are not there yet, as far as they fall to this process; return when all are there.

    Returns:
        What has to be said of the batches, of all processes: the first of a kind speaks for all.

    Raises:
        CaptureError: Parts are missing, because a process is gone.
    """
    n_before = sum(map(parts.n_examples, parts.done()))
    total, n_done = sum(map(parts.n_examples, range(len(parts)))), 0
    tables: list[pa.Table] = []  # and not the logits, which would not fit
    notes: dict[str, tuple[int, str]] = {}

    def run(batch: PlanBatch) -> Compared:
        with shared.forward():
            return runs.compare(batch, is_leader=shared.is_leader)

    def run_along() -> None:
        run(next(runs.batches([parts.batches(0)[0][:1]])))

    for step in shared.steps(_steps(parts, runs, shared), along=run_along):
        found = run(step.batch)
        tables += found.tables
        n_done += len(step.batch.rows)
        for kind, note in found.notes.items():
            notes.setdefault(kind, (step.part, note))
        if step.is_last and shared.is_leader:
            parts.write(step.part, tables)
            tables = []
        on_example(min(total, n_before + shared.so_far(n_done)), total)
    everyones: Mapping[str, Any] = shared.finish({"notes": notes}, lambda said: _joined(parts, shared, said))
    on_example(total, total)
    return tuple(everyones["notes"])


def _steps(parts: ReplayParts, runs: Runs, shared: SharedWork) -> Iterator[_Step | None]:
    for part in shared.units(len(parts), parts.done):
        if part is None:
            yield None
            continue
        batches = parts.batches(part)
        for number, batch in enumerate(runs.batches(batches), start=1):
            yield _Step(part, batch, number == len(batches))


def _joined(parts: ReplayParts, shared: SharedWork, said: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the notes of all; of each kind that of the first part."""
    missing = len(parts) - len(parts.done())
    if missing:
        raise shared.missing(f"{missing} of {len(parts)} parts")
    found: dict[str, tuple[int, str]] = {}
    for notes in (one["notes"] for one in said):
        for kind, (part, note) in notes.items():
            found[kind] = min(found.get(kind, (part, note)), (part, note))
    return {"notes": [found[kind][1] for kind in sorted(found)]}
