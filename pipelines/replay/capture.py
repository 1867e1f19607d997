"""Capturing what follows a replay: an archive of the chosen examples' activations in the edited run.

Its plan is that of the archive which is replayed, for the chosen examples and the new sites; rows, batches, shards and
resuming then follow as for any capture. Where all examples are taken, the batches are those of the archive.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from residua.capture.identity.provenance import describe_model, environment, identify_model
from residua.capture.identity.sidecars import Sidecars, sidecar_files, write_sidecars
from residua.capture.layout.process_layout import spans_processes
from residua.capture.recording.record import RecordStats, record
from residua.capture.replay.engine import CapturedReplay, Replayer
from residua.capture.runtime.collectives import Agreement
from residua.capture.runtime.sharded import is_sharded, is_zero3
from residua.capture.runtime.streams import writer_threads
from residua.capture.scheduling.membership import Membership
from residua.capture.sites.attention import eager_attention
from residua.capture.sites.reference_model import whole_sites
from residua.capture.sites.site import plan_sites
from residua.pipelines.capture.captured_batches import schedule_of
from residua.pipelines.capture.plan import dataset_entry
from residua.pipelines.capture.resume import compare_plans, sealed_archive
from residua.pipelines.jobs.workers import Workers, workers_of_launch
from residua.pipelines.replay.examples import write_replayed_examples
from residua.store.base.canonical import Json, digest_of
from residua.store.base.errors import PlanError
from residua.store.encoding.codecs import DEFAULT_PRESET
from residua.store.examples.index import ExampleIndex
from residua.store.examples.table import ExampleTable
from residua.store.format.archive_metadata import is_archive
from residua.store.format.commits import drop_broken
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import HOST_MEMORY_BYTES, Plan, host_buffer_bytes
from residua.store.format.sidecars import PARAMETERS_FILE
from residua.store.read.archive import REPLAY_RULE, Archive
from residua.store.storage.files import sweep, write_file

ARCHIVE = "acts.zarr"
"""The archive's name in the folder of a replay."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What a capture of a replay gave.

    Attributes:
        archive: The archive, sealed.
        notes: What a reader of it has to know, one sentence each.
    """

    archive: Archive
    notes: tuple[str, ...]


class ReplayCapture:
    """The capture of what follows a replay; made, and so checked, before anything runs.

    Args:
        replayer: Knows the rows that go in, and the edits.
        patterns: The sites to capture.
        examples: Numbers of the chosen examples, ascending.
        replay: What is replayed, as JSON values: archive, `at`, edits.
        facts: What else is to be known of it, for the provenance: whether it can be repeated, notes, command line.

    Raises:
        UnknownSiteError: The model has no such site.
        PlanError: A site lies below the stored rows, or its rows are too large to be staged.
        CaptureError: A site has no entry a token.
    """

    def __init__(
        self,
        replayer: Replayer,
        patterns: str | Iterable[str],
        examples: npt.NDArray[np.int64],
        *,
        replay: Mapping[str, Json],
        facts: Mapping[str, Json],
    ) -> None:
        self._replayer = replayer
        self._source = replayer.archive
        self._model = replayer.core
        self._examples = examples
        self._facts = {**replay, **facts}
        self._rule = digest_of(dict(replay))
        self._notes: list[str] = []
        self._infos = whole_sites(self._model, [patterns] if isinstance(patterns, str) else list(patterns))
        for name in self._infos:
            replayer.refuse_below(name, f"--capture {name}")
        if is_zero3(self._model):
            self._refuse_changed_inputs()
        index = self._source.example_table.index()
        self._most_rows = int(index.n_rows[examples].max())
        self._n_rows = int(index.n_rows[examples].sum())
        longest = int(index.n_tokens[examples].max())
        self._sites = plan_sites(self._infos, dtype=None, codec=DEFAULT_PRESET, longest_example=longest)
        self._height = self._rows_per_shard()

    def run(
        self,
        out: Path,
        membership: Membership | None,
        on_plan: Callable[[Plan, int], None] = lambda *_: None,
        on_batch: Callable[[RecordStats], None] = lambda _: None,
    ) -> Captured:
        """Capture what is missing, and return the archive, sealed.

        Args:
            out: Folder of the archive; one that was begun goes on. Nobody else is at work there.
            membership: Those that were launched together with this process; None if it is alone.
            on_plan: As for `residua.capture_dataset`.
            on_batch: Likewise.

        Raises:
            PlanError: The archive at `out` is one of another replay.
            CaptureError: The capture failed, here or in another process; what was committed is safe.
        """
        needs_pattern = any(name.startswith("pattern.") for name in self._infos)
        with (
            workers_of_launch(membership, out.name) as workers,
            eager_attention(self._model) if needs_pattern else nullcontext(False) as switched,
        ):
            if switched:
                self._notes.append(f"pattern sites need eager attention: {out.name} was computed with it")
            return self._run(workers, out, on_plan, on_batch)

    def _run(
        self,
        workers: Workers,
        out: Path,
        on_plan: Callable[[Plan, int], None],
        on_batch: Callable[[RecordStats], None],
    ) -> Captured:
        # by every worker: of a model that is spread over workers these are collectives
        self._identity = identify_model(self._model)
        needs_all = spans_processes(self._model) or is_sharded(self._model)
        beside = self._sidecar_files() if needs_all else None
        part = workers.part(self._model, self._infos)
        workers.plan_once(partial(self._prepare, out, beside), partial(self._check, out))
        archive = Archive(out)
        on_plan(archive.plan, archive.progress.rows)

        def close() -> None:
            sealed_archive(out)

        stats = record(
            self._model,
            out,
            archive.plan,
            process_layout=part,
            replaying=CapturedReplay(self._replayer, self._examples),
            work=partial(workers.work, out),
            agree=Agreement() if is_sharded(self._model) else None,
            threads=writer_threads(self._model),
            on_batch=lambda own: on_batch(workers.so_far(own)),
        )
        workers.finish(stats, out, archive.plan.n_shards(archive.n_rows), close)
        return Captured(archive=Archive(out), notes=tuple(self._notes))

    def _prepare(self, out: Path, beside: Sidecars | None) -> Mapping[str, Any]:
        """Make the archive unless it exists; one of another plan is refused."""
        with workspace(out) as folder:
            index = write_replayed_examples(folder / "examples", self._source, self._examples)
            plan = self._plan(index)
            if is_archive(out):
                archive = Archive(out)
                self._notes.extend(compare_plans(archive, plan, self._model))
                self._notes.extend(drop_broken(out, plan, archive.commits))
            else:
                write_sidecars(folder, beside or self._sidecar_files())
                for name in self._source.metadata.files:
                    if name.startswith("tokenizer/"):
                        write_file(folder / name, [self._source.side_file(name) or b""])
                create_archive(folder, out, plan, self._whole_provenance(plan))
        sweep(out)
        return {}

    def _check(self, out: Path) -> None:
        """Refuse an archive that another worker made of another model or another replay than this one's."""
        archive = Archive(out)
        compare_plans(archive, self._plan(ExampleTable(out / "examples").index()), self._model)

    def _sidecar_files(self) -> Sidecars:
        has_head = f"head/{PARAMETERS_FILE}" in self._source.metadata.files
        return sidecar_files(self._model, self._infos, head=has_head)

    def _plan(self, index: ExampleIndex) -> Plan:
        source = self._source.plan
        return Plan(
            model=self._identity,
            dataset=dataset_entry(index),
            rules={**source.rules, REPLAY_RULE: self._rule},
            sites=self._sites,
            rows_per_shard=self._height,
            batch_tokens=schedule_of(self._source).batch_tokens,
            padding=source.padding,
            n_rows=index.total_rows,
        )

    def _refuse_changed_inputs(self) -> None:
        """Raise PlanError for what a module takes if that is changed; ZeRO-3 shows it as it was before."""
        changed = self._replayer.infos(self._replayer.changed_sites).values()
        modules = {info.module for info in changed if info.via in ("input", "stream")}
        for name, info in self._infos.items():
            if info.via in ("input", "stream") and info.module in modules:
                raise PlanError(
                    f"--capture {name}: under ZeRO-3 what is put in or edited there cannot be read again; capture a "
                    "later site, or replay on a model without ZeRO-3"
                )

    def _rows_per_shard(self) -> int:
        """Return the height of the archive that is replayed, on which batches depend, or what of it can be staged."""
        row_bytes, asked = sum(site.row_bytes for site in self._sites), self._source.plan.rows_per_shard
        height = asked
        while host_buffer_bytes(row_bytes, self._most_rows, min(height, self._n_rows)) > HOST_MEMORY_BYTES:
            height //= 2
            if not height:
                raise PlanError(
                    f"--capture: the longest example has {self._most_rows:,} rows of {row_bytes:,} bytes, and "
                    f"{HOST_MEMORY_BYTES:,} bytes may be staged: capture fewer sites, or replay shorter examples"
                )
        if height < asked:
            self._notes.append(
                f"a shard of {ARCHIVE} holds {height:,} rows and not {asked:,}, since rows are wider: examples ran in "
                "other batches than when they were captured, so that the last bits may differ"
            )
        return height

    def _whole_provenance(self, plan: Plan) -> dict[str, Any]:
        source = self._source.provenance
        return {
            "model": describe_model(self._model, plan.model),
            **{name: source.get(name) for name in ("tokenizer", "dataset", "seed")},
            "command": self._facts["command"],
            REPLAY_RULE: {name: value for name, value in self._facts.items() if name != "command"},
            **environment(),
        }
