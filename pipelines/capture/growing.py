"""The capture that begins before its dataset is read to the end: parts of the examples appear while the model runs.

Worker 0 reads in a thread of its own. The first part is read before anything is made, so that what can be wrong with a
dataset is found where it is found without `grow`, as far as the first rows show it. Then the model runs over the shards
whose examples are there. Growing is an order of work: the plan depends on the settings and on the first part alone, and
so do the shards, records and examples on when which part was read. See decision 27.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, Lock, Thread
from time import time_ns
from typing import Any

from residua.capture.layout.process_layout import spans_processes
from residua.capture.recording.stats import RecordStats
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.sharded import is_sharded
from residua.pipelines.capture.dataset_job import DatasetCapture
from residua.pipelines.data.dataset import DatasetReport
from residua.pipelines.data.reading import Reading
from residua.pipelines.jobs.workers import WorkerFigures, Workers
from residua.pipelines.setup.models import token_limit
from residua.store.base.canonical import Json
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.examples.growing import bring_examples
from residua.store.examples.index import EXAMPLES, Example, ExampleIndex
from residua.store.examples.table import ExampleTable
from residua.store.examples.writer import ExampleWriter
from residua.store.format.archive_metadata import (
    ROOT,
    metadata_bytes,
    read_metadata,
    said_of,
    sidecar_digests,
    was_read,
)
from residua.store.format.create import bring_archive
from residua.store.format.plan import GROW_RULE, Plan
from residua.store.read.archive import Archive
from residua.store.storage.destination import Destination

FIRST_PART_BYTES = 2**21  # half a million tokens, or half as many rows: less than a second; plans depend on it
SHARD_TOKENS = 2**20  # that a shard waits for: two or three parts, where few positions are kept; plans depend on it
_STOP_SECONDS = 5.0  # for a dataset that gives its next row late


class ExamplesAhead:
    """Examples that a thread of its own reads and writes while the model runs.

    Args:
        examples: Opens the dataset; called in the thread, as all that reads is.
        writer: Writes the parts.
        on_example: Called after each example of the first part.
        at_end: Called in the thread when the dataset was read to its end, with the index of all examples.
    """

    def __init__(
        self,
        examples: Callable[[], Iterator[Example]],
        writer: ExampleWriter,
        on_example: Callable[[], None],
        at_end: Callable[[ExampleIndex], None],
    ) -> None:
        self._examples = examples
        self._writer = writer
        self._on_example = on_example
        self._at_end = at_end
        self._failure: BaseException | None = None
        self._begun, self._may_go_on, self._stopped = Event(), Event(), Event()
        self._writing = Lock()
        self._thread = Thread(target=self._run, name="residua-examples", daemon=True)

    def read_first_part(self) -> None:
        """Read until the first part is written; raises what reading it raises."""
        self._thread.start()
        self._begun.wait()
        self.check()

    def go_on(self, archive: Destination, *, may_add: bool) -> None:
        """Let the thread go on, with the parts of the archive; see `ExampleWriter.go_on_in`."""
        self._writer.go_on_in(archive, may_add=may_add)
        self._may_go_on.set()

    def check(self) -> None:
        """Raise the error that ended the reading, if one did."""
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Wait until the dataset is read; raises what reading it raises."""
        self._thread.join()
        self.check()

    def stop(self) -> None:
        """End the reading at the next example; nothing is written from then on."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._may_go_on.set()
            self._thread.join(_STOP_SECONDS)
            with self._writing:  # what was begun is written; a dataset that is late with its next row is not waited for
                pass

    def _run(self) -> None:
        try:
            for example in self._examples():
                with self._writing:
                    if self._stopped.is_set():
                        return
                    self._writer.add(example)
                self._pause()
                if not self._begun.is_set():
                    self._on_example()
            if not self._begun.is_set():
                self._writer.flush()
                self._pause()
            with self._writing:
                if not self._stopped.is_set():
                    self._at_end(self._writer.close())
        except BaseException as error:  # noqa: BLE001  # thread boundary: the job's thread raises it
            self._failure = error
        finally:
            self._begun.set()

    def _pause(self) -> None:
        """Wait, once, between the first part and those that follow it into the archive."""
        if self._writer.n_parts and not self._begun.is_set():
            self._begun.set()
            self._may_go_on.wait()


class GrowingCapture(DatasetCapture):
    """The capture of a dataset's examples that begins with the first of them.

    Raises:
        PlanError: The model is of a kind that this is not done for, or nothing limits the length of
            examples.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._ahead: ExamplesAhead | None = None
        self._refuse(self._images is not None, "images are all read before the model captures")
        is_whole = stage_model_of(self.model) is None and not spans_processes(self.model) and not is_sharded(self.model)
        self._refuse(not is_whole, "the processes that hold a model together run the same batches at the same time")
        limit = self._settings.length_limit(token_limit(self.model))
        if limit is None:
            raise PlanError(
                f"{named('grow', True)} needs to know the longest example before the dataset is read, and "
                f"{type(self.model).__name__} takes any length: give {named('max_length')}"
            )
        self._longest = limit
        self.most_rows = self._settings.rule.most_rows(limit)

    def _refuse(self, is_so: bool, why: str) -> None:
        if is_so:
            raise PlanError(f"{named('grow', True)} cannot be used here, since {why}: leave it out")

    def plan(self, index: ExampleIndex) -> Plan:
        """Return the plan, which follows from the first part; `index` has its digest."""
        return self.plan_of(
            {"begins": index.digest, "longest_example": self._longest},
            batch_tokens=self.batch_tokens(self._settings.batch_tokens, None),
            longest_example=self._longest,
            most_rows=self.most_rows or self._longest,
            n_rows=None,
            tokens_per_row=max(1.0, index.total_tokens / max(1, index.total_rows)),
            most_shard_tokens=SHARD_TOKENS,
        )

    def rules(self) -> dict[str, Json]:
        """Return the settings that shape examples and shards, as the plan records them."""
        return {**super().rules(), GROW_RULE: True}

    def write_examples(self, folder: Path) -> ExampleIndex:
        """Read and write the first part; raises DatasetError if its rows cannot be used as asked."""
        report, began, reading = self._report, time_ns(), self._reading()
        known = self._request.known
        if known is not None and reading is not None and _read_from(known).get("reading") == reading.digest:
            self._take(known, folder)
            return _first_part(folder)
        writer = ExampleWriter(folder, first_bytes=FIRST_PART_BYTES)
        self._ahead = ExamplesAhead(
            self.examples,
            writer,
            lambda: self._request.on_example(report.n_examples, report.n_tokens),
            lambda index: self._end(index, reading, began),
        )
        self._ahead.read_first_part()
        first = _first_part(folder)
        if known is not None and known.plan.dataset.get("begins") == first.digest:
            self._take(known, folder)
        return first

    def _take(self, known: Archive, folder: Path) -> None:
        """Copy the examples of an archive: all shards can be run at once, and what is read is compared."""
        folder.mkdir(exist_ok=True)
        for name in known.metadata.files:
            if name.startswith(f"{EXAMPLES}/"):
                known.side_file(name)  # compares its digest
                shutil.copyfile(known.path / name, folder.parent / name)
        self._read = {key: value for key, value in _read_from(known).items() if key in ("report", "reading")}

    def written_examples(self) -> ExampleIndex:
        """Return the first part of the examples that worker 0 wrote."""
        bring_archive(self.out)
        return _first_part(self.out.path / "examples")

    def _reading(self) -> Reading | None:
        return self._reading_of_rows()

    def run(
        self,
        workers: Workers,
        on_plan: Callable[[Plan, int], None],
        on_batch: Callable[[RecordStats], None],
    ) -> tuple[list[WorkerFigures], Mapping[str, Any]]:
        """Capture what is missing and seal the archive; see `CaptureJob.run`.

        Raises:
            DatasetError: A row cannot be used; what was captured before it was read is safe.
        """

        def after_batch(stats: RecordStats) -> None:
            if self._ahead is not None:
                self._ahead.check()
            on_batch(stats)

        try:
            figures, shared = super().run(workers, on_plan, after_batch)
        finally:
            if self._ahead is not None:
                self._ahead.stop()
        of_archive: Any = self.archive.provenance["dataset"]
        report = DatasetReport.of(of_archive["report"]) or self._report
        return figures, {**shared, "dataset": asdict(report)}

    @contextmanager
    def reading_on(self) -> Iterator[None]:
        """Let the rest of the dataset be read while the model runs; at the end, wait for it."""
        bring_examples(self.out)
        if self._ahead is None:  # another worker, or a dataset that is known
            yield
            return
        self._ahead.go_on(self.out, may_add=not was_read(self.archive.metadata))
        try:
            yield
            self._ahead.finish()
        finally:
            self._ahead.stop()

    def _end(self, index: ExampleIndex, reading: Reading | None, began_ns: int) -> None:
        """Say in the archive that the dataset was read to its end, and what became of it."""
        metadata = read_metadata(self.out.path)
        if was_read(metadata):
            return
        known = len(self.notes)
        self.check_room(metadata.plan.sites, index.total_rows)
        provenance: dict[str, Any] = dict(metadata.provenance)
        provenance["dataset"] = {**provenance["dataset"], "report": asdict(self._report)}
        if reading is not None and reading.held(self._dataset, self._settings, began_ns):
            provenance["dataset"]["reading"] = reading.digest
        provenance["notes"] = [*provenance["notes"], *self.notes[known:], *self._report.notes()]
        files = sidecar_digests(self.out.path, metadata.files)
        at_end = replace(metadata, provenance=provenance, files=files)
        self.out.keep(ROOT, metadata_bytes(self.out.path, at_end))

    def notes_of_archive(self) -> list[Json]:
        """Return what a reader of the archive should know, as far as it is known before the model runs."""
        return list(self.notes)

    def n_rows(self) -> int:
        """Return the rows of all examples."""
        return ExampleTable(self.out.path / "examples").index().total_rows

    def sealed(self) -> dict[str, Json]:
        """Return what became known at the end."""
        index = ExampleTable(self.out.path / "examples").index()
        return {"n_rows": index.total_rows, "n_examples": index.n_examples, "examples": index.digest}


def _read_from(known: Archive) -> Mapping[str, Any]:
    return said_of("dataset", known.provenance)


def _first_part(folder: Path) -> ExampleIndex:
    """Return the index of the first part of a folder's examples: what follows may still be read."""
    table = ExampleTable(folder)
    index, stop = table.index(), int(table.index().first_example[1])
    return ExampleIndex(
        n_tokens=index.n_tokens[:stop],
        n_rows=index.n_rows[:stop],
        first_row=index.first_row[: stop + 1],
        first_example=index.first_example[:2],
        digest=table.part_digests[0],
    )
