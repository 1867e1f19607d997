"""The folder of a replay's results: what was asked for, and tables in files that are complete one by one.

``residua.json`` holds the request and the conditions of the run. ``tokens/part-00003.parquet`` and
``examples/part-00003.parquet`` hold the examples whose first row lies in shard 3 of the archive: one group of the
schedule, which one model replica runs batch by batch. The file of examples is written last; when it exists, the group
is finished. The files of one table, in the order of their names, are one table. The file of examples also says, in its
Parquet metadata, what its batches are like: what the edits reached, and in what the run differs from the captured one.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.identity.provenance import environment
from residua.capture.replay.notes import Reach
from residua.pipelines.jobs.sharing import SharedWork
from residua.pipelines.replay.comparison import Compared, Comparison, example_table
from residua.store.base.canonical import differences, flatten
from residua.store.base.errors import PlanError
from residua.store.base.freed_memory import return_freed_memory
from residua.store.base.naming import named
from residua.store.examples.schedule import Schedule
from residua.store.storage.destination import Destination

RECORD = "residua.json"
TOKENS, EXAMPLES = "tokens", "examples"
_FACTS = b"residua"  # a key of the Parquet metadata of the files of examples


def begin_or_resume(out: Destination, request: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Write the record of a request, or compare the request with the record of an earlier run.

    Args:
        out: The folder.
        request: What is asked for, as JSON values; an earlier run is resumed only if its request was the same.
        facts: What else the record says, as the first run had it.

    Returns:
        Whether there is an earlier run to resume.

    Raises:
        PlanError: The folder holds the results of another request, or other files.
    """
    if out.n_bytes(RECORD) is not None:
        check_request(out, request)
        out.sweep()
        return True
    if not out.is_empty():
        raise PlanError(f"{out} is not empty and has no {RECORD}: choose another folder for the results")
    record = {"request": request, **facts, "conditions": environment()}
    out.write(RECORD, [_encoded(record)])
    return False


def note(out: Destination, notes: Sequence[str]) -> None:
    """Put the notes on a finished run into the record."""
    out.fetch([RECORD])
    record = json.loads((out.path / RECORD).read_text())
    if record["notes"] != list(notes):
        out.write(RECORD, [_encoded({**record, "notes": list(notes)})])


def _encoded(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=2, ensure_ascii=False).encode()


def check_request(out: Destination, request: Mapping[str, Any]) -> None:
    """Compare a request with the one whose results a folder holds.

    Raises:
        PlanError: They differ; the message says in what.
    """
    out.fetch([RECORD])
    request = json.loads(json.dumps(request))
    try:
        before = json.loads((out.path / RECORD).read_text())["request"]
        lines = differences(flatten(before), flatten(request), ("that request", "this one"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{out}/{RECORD} is no record of a replay: choose another folder for the results") from error
    if before != request:
        listed = "\n  ".join(lines)
        raise PlanError(f"{out} holds the results of another request:\n  {listed}\nChoose another {named('out')}.")


def table_file(table: str, group: int) -> str:
    """Return the file of a table that holds the examples of a group."""
    return f"{table}/part-{group:05d}.parquet"


def write_table(out: Destination, name: str, table: pa.Table) -> None:
    """Write a table as a Parquet file, durably, completely or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    out.write(name, [sink.getvalue().to_pybytes()])


def read_table(out: Destination, table: str) -> pa.Table:
    """Return a table of the finished groups."""
    names = (name for name in out.names(EXAMPLES) if name.startswith("part-") and name.endswith(".parquet"))
    finished = sorted(names, key=lambda name: (len(name), name))  # in the order of groups, however many there are
    out.fetch(f"{table}/{name}" for name in finished)
    files = [pq.read_table(out.path / table / name) for name in finished]
    return pa.concat_tables(files).replace_schema_metadata(None)


class TableFiles:
    """The files of the chosen examples, numbered from 0: one for each group of the schedule that has any.

    Args:
        out: The folder.
        schedule: The schedule of the archive, which says which examples run together.
        chosen: For each example, whether it is in the tables.
    """

    def __init__(self, out: Destination, schedule: Schedule, chosen: npt.NDArray[np.bool_]) -> None:
        self._out = out
        self._schedule = schedule
        self._chosen = chosen
        sizes = schedule.sizes(chosen)
        self._groups: list[int] = np.flatnonzero(sizes).tolist()
        self._sizes: list[int] = sizes[self._groups].tolist()

    def __len__(self) -> int:
        return len(self._groups)

    def batches(self, file: int) -> list[list[int]]:
        """Return the examples of each batch of a file."""
        members = (batch.examples for batch in self._schedule.batches(self._groups[file]))
        chosen = (examples[self._chosen[examples]].tolist() for examples in members)
        return [examples for examples in chosen if examples]

    def n_examples(self, files: Iterable[int]) -> int:
        """Return how many examples some files hold."""
        return sum(self._sizes[file] for file in files)

    def finished(self) -> set[int]:
        """Return the files that are written."""
        written = {f"{EXAMPLES}/{name}" for name in self._out.names(EXAMPLES)}
        return {file for file, group in enumerate(self._groups) if table_file(EXAMPLES, group) in written}

    def write(self, file: int, found: Sequence[Compared]) -> None:
        """Write the tables of the tokens of a file's batches, sorted by example, and their examples; durably."""
        tables = [table for batch in found for table in batch.tables]
        ordered, group = sorted(tables, key=lambda table: table["example"][0].as_py()), self._groups[file]
        notes = {kind: note for batch in reversed(found) for kind, note in batch.notes.items()}
        facts = {"notes": notes, **_sum([batch.reach for batch in found])._asdict()}
        write_table(self._out, table_file(TOKENS, group), pa.concat_tables(ordered))
        examples = example_table(ordered).replace_schema_metadata({_FACTS: json.dumps(facts)})
        write_table(self._out, table_file(EXAMPLES, group), examples)

    def facts(self) -> tuple[dict[str, str], Reach | None]:
        """Return the first note of each kind of the finished files, and what edits reach in all of them.

        The second is None if a file does not say it, as those of earlier versions.
        """
        notes: dict[str, str] = {}
        reached: list[Reach] = []
        self._out.fetch(table_file(EXAMPLES, group) for group in self._groups)
        for group in self._groups:
            found = pq.read_schema(self._out.path / table_file(EXAMPLES, group)).metadata or {}
            facts = json.loads(found.get(_FACTS, b"{}"))
            notes = {**facts.get("notes", {}), **notes}
            if "n_changed" in facts:
                reached.append(Reach(facts["n_changed"], facts["n_lost"]))
        return notes, _sum(reached) if len(reached) == len(self) else None


def _sum(reached: Sequence[Reach]) -> Reach:
    return Reach(
        [sum(edit) for edit in zip(*(one.n_changed for one in reached), strict=True)], sum(r.n_lost for r in reached)
    )


class Notes(NamedTuple):
    """What a reader of the tables has to know, one sentence each: of the edits, and of the batches."""

    edits: tuple[str, ...]
    batches: tuple[str, ...]


class _Step(NamedTuple):
    """One batch of a file."""

    file: int
    batch: PlanBatch
    is_last: bool


def write_files(
    files: TableFiles, comparison: Comparison, shared: SharedWork, on_example: Callable[[int, int], None]
) -> Notes:
    """Write this process's share of the missing files; return when all are written.

    Returns:
        Notes on all files; on the batches one of each kind.

    Raises:
        CaptureError: Files are missing because a process is gone.
    """
    n_before, n_total = files.n_examples(files.finished()), files.n_examples(range(len(files)))
    n_done = 0
    of_file: list[Compared] = []  # and not the logits, which would not fit

    def compare(batch: PlanBatch) -> Compared:
        with shared.forward():
            return comparison.compare(batch, is_leader=shared.is_leader)

    def run_along() -> None:
        compare(next(comparison.batches([files.batches(0)[0][:1]])))

    for step in shared.steps(_steps(files, comparison, shared), along=run_along):
        of_file.append(compare(step.batch))
        return_freed_memory()
        n_done += len(step.batch.rows)
        if step.is_last:
            if shared.is_leader:
                files.write(step.file, of_file)
            of_file = []
        on_example(min(n_total, n_before + shared.so_far(n_done)), n_total)
    said = shared.finish({}, lambda _: _notes(files, comparison, shared)._asdict())
    on_example(n_total, n_total)
    return Notes(tuple(said["edits"]), tuple(said["batches"]))


def _steps(files: TableFiles, comparison: Comparison, shared: SharedWork) -> Iterator[_Step | None]:
    for file in shared.units(len(files), files.finished):
        if file is None:
            yield None
            continue
        batches = files.batches(file)
        for number, batch in enumerate(comparison.batches(batches), start=1):
            yield _Step(file, batch, number == len(batches))


def _notes(files: TableFiles, comparison: Comparison, shared: SharedWork) -> Notes:
    """Return the notes on all files, whichever process and run wrote them."""
    if n_missing := len(files) - len(files.finished()):
        raise shared.missing(f"{n_missing} of {len(files)} table files")
    notes, reach = files.facts()
    return Notes(
        edits=() if reach is None else tuple(comparison.reach_notes(reach)),
        batches=tuple(notes[kind] for kind in sorted(notes)),
    )
