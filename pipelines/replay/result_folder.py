"""The folder of a replay's results: what was asked for, and tables in files that are complete one by one.

``residua.json`` holds the request and the conditions of the run. ``tokens/part-00003.parquet`` and
``examples/part-00003.parquet`` hold the examples whose first row lies in shard 3 of the archive: one group of the
schedule, which one model replica runs batch by batch. The file of examples is written last; when it exists, the group
is finished. The files of one table, in the order of their names, are one table.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.identity.provenance import environment
from residua.pipelines.jobs.sharing import SharedWork
from residua.pipelines.replay.comparison import Compared, Comparison, example_table
from residua.store.base.canonical import differences, flatten
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.examples.schedule import Schedule
from residua.store.storage.files import sweep, write_file

RECORD = "residua.json"
TOKENS, EXAMPLES = "tokens", "examples"


def begin_or_resume(folder: Path, request: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Write the record of a request, or compare the request with the record of an earlier run.

    Args:
        folder: The folder.
        request: What is asked for, as JSON values; an earlier run is resumed only if its request was the same.
        facts: What else the record says, as the first run had it.

    Returns:
        Whether there is an earlier run to resume.

    Raises:
        PlanError: The folder holds the results of another request, or other files.
    """
    path = folder / RECORD
    if path.exists():
        check_request(folder, request)
        sweep(folder)
        return True
    if folder.exists() and any(folder.iterdir()):
        raise PlanError(f"{folder} is not empty and has no {RECORD}: choose another folder for the results")
    record = {"request": request, **facts, "conditions": environment()}
    write_file(path, [json.dumps(record, indent=2, ensure_ascii=False).encode()])
    return False


def check_request(folder: Path, request: Mapping[str, Any]) -> None:
    """Compare a request with the one whose results a folder holds.

    Raises:
        PlanError: They differ; the message says in what.
    """
    path = folder / RECORD
    request = json.loads(json.dumps(request))
    try:
        before = json.loads(path.read_text())["request"]
        lines = differences(flatten(before), flatten(request), ("that request", "this one"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path} is no record of a replay: choose another folder for the results") from error
    if before != request:
        listed = "\n  ".join(lines)
        raise PlanError(f"{folder} holds the results of another request:\n  {listed}\nChoose another {named('out')}.")


def table_file(folder: Path, table: str, group: int) -> Path:
    """Return the file of a table that holds the examples of a group."""
    return folder / table / f"part-{group:05d}.parquet"


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as a Parquet file, durably, completely or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_file(path, [sink.getvalue().to_pybytes()])


def read_table(folder: Path, table: str) -> pa.Table:
    """Return a table of the finished groups."""
    names = (path.name for path in (folder / EXAMPLES).glob("part-*.parquet"))
    finished = sorted(names, key=lambda name: (len(name), name))  # in the order of groups, however many there are
    return pa.concat_tables([pq.read_table(folder / table / name) for name in finished])


class TableFiles:
    """The files of the chosen examples, numbered from 0: one for each group of the schedule that has any.

    Args:
        folder: The folder.
        schedule: The schedule of the archive, which says which examples run together.
        chosen: For each example, whether it is in the tables.
    """

    def __init__(self, folder: Path, schedule: Schedule, chosen: npt.NDArray[np.bool_]) -> None:
        self._folder = folder
        self._groups: list[int] = []
        self.batches: list[list[list[int]]] = []
        """The examples of each batch of each file."""
        for group in range(schedule.n_shards):
            members = [batch.examples[chosen[batch.examples]].tolist() for batch in schedule.batches(group)]
            if any(members):
                self._groups.append(group)
                self.batches.append([examples for examples in members if examples])

    def __len__(self) -> int:
        return len(self._groups)

    def n_examples(self, files: Iterator[int] | set[int] | range) -> int:
        """Return how many examples some files hold."""
        return sum(len(examples) for file in files for examples in self.batches[file])

    def finished(self) -> set[int]:
        """Return the files that are written."""
        written = {path.name for path in (self._folder / EXAMPLES).glob("part-*")}
        return {
            file for file, group in enumerate(self._groups) if table_file(self._folder, EXAMPLES, group).name in written
        }

    def write(self, file: int, tables: Sequence[pa.Table]) -> None:
        """Write the tables of the tokens of a file's examples, sorted by example, and their examples; durably."""
        ordered, group = sorted(tables, key=lambda table: table["example"][0].as_py()), self._groups[file]
        write_table(table_file(self._folder, TOKENS, group), pa.concat_tables(ordered))
        write_table(table_file(self._folder, EXAMPLES, group), example_table(ordered))


class _Step(NamedTuple):
    """One batch of a file."""

    file: int
    batch: PlanBatch
    is_last: bool


def write_files(
    files: TableFiles, comparison: Comparison, shared: SharedWork, on_example: Callable[[int, int], None]
) -> tuple[str, ...]:
    """Write this process's share of the missing files; return when all are written.

    Returns:
        Notes on the batches of all processes, one of each kind.

    Raises:
        CaptureError: Files are missing because a process is gone.
    """
    n_before, n_total = files.n_examples(files.finished()), files.n_examples(range(len(files)))
    n_done = 0
    tables: list[pa.Table] = []  # and not the logits, which would not fit
    notes: dict[str, tuple[int, str]] = {}

    def compare(batch: PlanBatch) -> Compared:
        with shared.forward():
            return comparison.compare(batch, is_leader=shared.is_leader)

    def run_along() -> None:
        compare(next(comparison.batches([files.batches[0][0][:1]])))

    for step in shared.steps(_steps(files, comparison, shared), along=run_along):
        found = compare(step.batch)
        tables += found.tables
        n_done += len(step.batch.rows)
        for kind, note in found.notes.items():
            notes.setdefault(kind, (step.file, note))
        if step.is_last and shared.is_leader:
            files.write(step.file, tables)
            tables = []
        on_example(min(n_total, n_before + shared.so_far(n_done)), n_total)
    of_all: Mapping[str, Any] = shared.finish({"notes": notes}, lambda reports: _joined_notes(files, shared, reports))
    on_example(n_total, n_total)
    return tuple(of_all["notes"])


def _steps(files: TableFiles, comparison: Comparison, shared: SharedWork) -> Iterator[_Step | None]:
    for file in shared.units(len(files), files.finished):
        if file is None:
            yield None
            continue
        batches = files.batches[file]
        for number, batch in enumerate(comparison.batches(batches), start=1):
            yield _Step(file, batch, number == len(batches))


def _joined_notes(
    files: TableFiles, shared: SharedWork, reports: Sequence[Mapping[str, Any]]
) -> Mapping[str, list[str]]:
    """Return the notes of all processes: of each kind, that of the first file."""
    if n_missing := len(files) - len(files.finished()):
        raise shared.missing(f"{n_missing} of {len(files)} table files")
    found: dict[str, tuple[int, str]] = {}
    for kind, (file, note) in (item for report in reports for item in report["notes"].items()):
        found[kind] = min(found.get(kind, (file, note)), (file, note))
    return {"notes": [found[kind][1] for kind in sorted(found)]}
