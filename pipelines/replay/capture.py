"""Capture what follows a replay: an archive of the chosen examples' activations in the edited run.

The plan is that of the archive which is replayed, for the chosen examples and the new sites. Rows, batches, shards and
resuming are those of any capture. If all examples are chosen, the batches are those of the archive.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from residua.capture.hooks.site import FLOATS, check_storage, plan_sites
from residua.capture.identity.provenance import describe_model, environment
from residua.capture.recording.stats import RecordStats
from residua.capture.replay.captured import CapturedReplay
from residua.capture.replay.engine import Replayer
from residua.capture.runtime.sharded import is_zero3
from residua.capture.scheduling.membership import Membership
from residua.capture.sites.reference_model import unsharded_sites
from residua.pipelines.capture.captured_batches import schedule_of
from residua.pipelines.capture.job import CaptureJob
from residua.pipelines.jobs.workers import workers_of_step
from residua.store.base.canonical import Json, digest_of
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.encoding.codecs import DEFAULT_PRESET
from residua.store.examples.index import Example, ExampleIndex, dataset_entry
from residua.store.examples.writer import ExampleWriter
from residua.store.format.plan import HOST_MEMORY_BYTES, REPLAY_RULE, Plan, host_buffer_bytes
from residua.store.format.sidecars import PARAMETERS_FILE
from residua.store.read.archive import Archive
from residua.store.storage.destination import Destination
from residua.store.storage.files import write_file

ARCHIVE = "acts.zarr"
"""The archive's name in the folder of a replay."""
REPLAYED_EXAMPLE = "replayed_example"
"""Column of the example table: the number of each example in the replayed archive."""


class ReplayCapture(CaptureJob):
    """The capture of what follows a replay. Making it checks the request before anything runs.

    Args:
        replayer: Knows the rows that go in, and the edits.
        patterns: The sites to capture.
        examples: Numbers of the chosen examples, ascending.
        out: Where the archive is written; an unfinished one is resumed. No other run may write it meanwhile.
        replay: What is replayed, as JSON values: archive, `at`, edits.
        facts: More about it for the provenance: whether it can be repeated, command line.
        dtype: Data type to store; that of the replayed archive unless given.
        codec: Codec preset; that of the replayed archive unless given.
        host_memory: Bytes of host memory for buffered rows.

    Raises:
        UnknownSiteError: The model has no such site.
        PlanError: A site lies below the stored rows, or its rows do not fit into host memory.
        OSError: The rows do not fit on the disk.
        CaptureError: A site does not have one entry per token.
    """

    def __init__(
        self,
        replayer: Replayer,
        patterns: str | Iterable[str],
        examples: npt.NDArray[np.int64],
        out: Destination,
        *,
        replay: Mapping[str, Json],
        facts: Mapping[str, Json],
        dtype: str | None = None,
        codec: str | None = None,
        host_memory: int = HOST_MEMORY_BYTES,
    ) -> None:
        if replayer.rows.main.stack:
            raise PlanError(
                f"{named('capture')}: {type(replayer.core).__name__} is an encoder-decoder, and what follows a replay "
                "is captured of models of one stack: read its sites with residua.replay(..., keep=...)"
            )
        self._replayer = replayer
        self._source = replayer.archive
        self._examples = examples
        self._facts: dict[str, Json] = {**replay, **facts}
        self._rule = digest_of(dict(replay))
        sites = unsharded_sites(replayer.core, [patterns] if isinstance(patterns, str) else list(patterns))
        for name in sites:
            replayer.refuse_below(name, named("capture", name))
        super().__init__(
            replayer.core,
            sites,
            out,
            head=f"head/{PARAMETERS_FILE}" in self._source.metadata.files,
            replaying=CapturedReplay(replayer, examples),
        )
        if is_zero3(self.model):
            self._refuse_changed_inputs()
        index = self._source.example_table.index()
        longest = int(index.n_tokens[examples].max())
        own_dtype, own_codec = _storage_of(self._source.plan)
        dtype, codec = dtype or own_dtype, codec or own_codec
        check_storage(codec=codec, dtype=dtype, rows_per_shard=None, threads=None)
        self._site_plans = plan_sites(sites, dtype=dtype, codec=codec, longest_example=longest)
        self._height = self._rows_per_shard(index.n_rows[examples], host_memory)
        self.check_room(self._site_plans, int(index.n_rows[examples].sum()))

    def capture(
        self,
        membership: Membership | None,
        notes: Sequence[str] = (),
        on_plan: Callable[[Plan, int], None] = lambda *_: None,
        on_batch: Callable[[RecordStats], None] = lambda _: None,
    ) -> Archive:
        """Capture what is missing, and return the archive, sealed.

        Args:
            membership: The workers that were launched together; None if this process is alone.
            notes: What a reader of the results has to know of the edits, for the provenance.
            on_plan: As for `residua.capture_dataset`.
            on_batch: As for `residua.capture_dataset`.

        Raises:
            PlanError: The archive in that folder is one of another replay.
            CaptureError: The capture failed, here or in another process; committed rows are safe.
        """
        self._facts["notes"] = list(notes)
        with workers_of_step(membership, self.out.name) as workers:
            self.run(workers, on_plan, on_batch)
        return self.archive

    def write_examples(self, folder: Path) -> ExampleIndex:
        """Write the chosen examples with all columns of the dataset and their numbers in the replayed archive.

        Raises:
            PlanError: The dataset has a column of its own with the name of the column of these numbers.
        """
        table = self._source.example_table
        if REPLAYED_EXAMPLE in table.column_types() and not self._source.plan.is_replay:
            raise PlanError(
                f"the examples of {self._source.place} have a column {REPLAYED_EXAMPLE!r} of their own, and the "
                "archive of a replay keeps the number of each replayed example there: replay without capturing"
            )
        writer = ExampleWriter(folder)
        for number, columns in table.own_columns(self._examples):
            [(input_ids, positions)] = table.batch([number])
            columns[REPLAYED_EXAMPLE] = number  # that of an earlier replay goes
            writer.add(Example(input_ids=input_ids, positions=positions, columns=columns))
        return writer.close()

    def write_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files from the archive that is replayed."""
        for name in self._source.metadata.files:
            if name.startswith("tokenizer/"):
                write_file(folder / name, [self._source.side_file(name) or b""])

    def plan(self, index: ExampleIndex) -> Plan:
        """Return the plan of the archive that is replayed, for the chosen examples and the new sites."""
        source = self._source.plan
        return Plan(
            model=self.identity,
            dataset=dataset_entry(index),
            rules={**source.rules, REPLAY_RULE: self._rule},
            sites=self._site_plans,
            rows_per_shard=self._height,
            batch_tokens=self.batch_tokens(schedule_of(self._source).batch_tokens, index),
            padding=source.padding,
            n_rows=index.total_rows,
        )

    def provenance(self, plan: Plan) -> dict[str, Any]:
        """Return the provenance of the archive that is replayed, with this model and what is replayed."""
        source = self._source.provenance
        return {
            "model": describe_model(self.model, plan.model, self.output, predicts=self.predicts),
            **{name: source.get(name) for name in ("tokenizer", "dataset", "seed")},
            "command": self._facts["command"],
            REPLAY_RULE: {name: value for name, value in self._facts.items() if name != "command"},
            **environment(),
        }

    def _refuse_changed_inputs(self) -> None:
        """Raise PlanError for the input of a module if it is changed; ZeRO-3 shows the input before the change."""
        changed = self._replayer.infos(self._replayer.changed_sites).values()
        modules = {info.module for info in changed if info.via in ("input", "stream")}
        for name, info in self.sites.items():
            if info.via in ("input", "stream") and info.module in modules:
                raise PlanError(
                    f"{named('capture', name)}: under ZeRO-3, rows that are put in or edited at this site cannot be "
                    "read back; capture a later site, or replay on a model without ZeRO-3"
                )

    def _rows_per_shard(self, n_rows: npt.NDArray[np.int32], host_memory: int) -> int:
        """Return the shard height of the archive that is replayed, halved until its rows fit into host memory.

        Batches depend on the height.
        """
        row_bytes, asked = sum(site.row_bytes for site in self._site_plans), self._source.plan.group_rows
        most_rows, total_rows, height = int(n_rows.max()), int(n_rows.sum()), asked
        while host_buffer_bytes(row_bytes, most_rows, min(height, total_rows)) > host_memory:
            height //= 2
            if not height:
                raise PlanError(
                    f"{named('capture')}: the longest example has {most_rows:,} rows of {row_bytes:,} bytes, and host "
                    f"memory for rows is limited to {host_memory:,} bytes: capture fewer sites, or replay shorter "
                    "examples"
                )
        if height < asked:
            self.notes.append(
                f"a shard of {ARCHIVE} holds {height:,} rows and not {asked:,}, because its rows are wider: examples "
                "ran in other batches than when they were captured, so the last bits may differ"
            )
        return height


def _storage_of(plan: Plan) -> tuple[str | None, str]:
    """Return the data type and the codec of an archive's floating-point sites; where they differ, the defaults."""
    dtypes = {site.dtype for site in plan.sites if site.dtype in FLOATS}
    codecs = {site.codec for site in plan.sites if site.dtype in FLOATS}
    return dtypes.pop() if len(dtypes) == 1 else None, codecs.pop() if len(codecs) == 1 else DEFAULT_PRESET
