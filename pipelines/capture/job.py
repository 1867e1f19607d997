"""A capture into an archive: prepare or compare, record what is missing, seal. `CaptureJob.run` has the order.

A subclass says which examples there are and what is stored of them: `dataset_job` those of a dataset, and a replay that
captures those of the archive that it replays.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from residua.capture.forward.example_inputs import InputSource
from residua.capture.hooks.attention import eager_attention
from residua.capture.hooks.site import SiteInfo, site_notes
from residua.capture.identity.few_tokens import FewTokens
from residua.capture.identity.output import OutputSample, output_sample
from residua.capture.identity.padding import RAN_ALONE, padding_leaks
from residua.capture.identity.prediction import Prediction, no_loss, prediction_of
from residua.capture.identity.provenance import (
    adapter_differences,
    changed_conditions,
    compare_behaviour,
    config_differences,
    identify_model,
)
from residua.capture.identity.sidecars import Sidecars, sidecar_files, write_sidecars
from residua.capture.layout.process_layout import ProcessLayout, spans_processes
from residua.capture.recording.record import record
from residua.capture.recording.stats import RecordStats
from residua.capture.replay.captured import CapturedReplay
from residua.capture.runtime.collectives import Agreement
from residua.capture.runtime.sharded import is_sharded
from residua.capture.runtime.streams import writer_threads
from residua.pipelines.jobs.workers import WorkerFigures, Workers
from residua.store.base.canonical import Json
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.examples.index import ExampleIndex
from residua.store.examples.table import ExampleTable
from residua.store.format.archive_metadata import is_archive, read_metadata
from residua.store.format.commits import committed_rows
from residua.store.format.create import bring_archive, create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.room import check_room
from residua.store.format.site_names import is_pattern
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_written
from residua.store.sealing.losses import COMPUTED, cast_sites
from residua.store.sealing.lost_shards import drop_lost
from residua.store.sealing.seal import seal
from residua.store.storage.destination import BucketFolder, Destination, destination_of

RAN_UNCOMPILED = "compiled code does not run hooks: the model ran uncompiled for this capture"
"""Note of a capture of a compiled model."""


class CaptureJob(ABC):
    """A capture into an archive: its steps, in order. A subclass provides the examples, the plan and the provenance.

    Args:
        model: The model, on its device; every worker has it, or its share of it.
        sites: The sites to capture, as the unsharded model has them.
        out: Where the archive is written: a folder, here or in a bucket.
        head: Whether to store the final norm and the unembedding.
        threads: Threads that encode and write; None chooses by the model's device.
        keep_paths: Whether the provenance in a bucket keeps absolute paths of this machine.
        replaying: Puts stored rows into the model and edits, batch by batch; None captures the model as it is.

    Attributes:
        notes: What the user should know, one sentence each; grows while the job runs. Those that are known before the
            archive is made are kept in its provenance.
        identity: What identifies the model in a plan; known before `plan` is called.
        output: What the model computes on a few tokens, or why that is not known; known before `plan` is called.
        column_shards: What `cut_columns` returned; known before `plan` is called.
        pads_leak: Whether padding changes the model's rows; known before `plan` is called.
        predicts: What the model's logits are of; known before `plan` is called.
        most_rows: Most rows of an example, where that has to be known before the examples are.
        shared: What worker 0 found out while it prepared, for the other workers, as JSON values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Mapping[str, SiteInfo],
        out: Path | Destination,
        *,
        head: bool,
        threads: int | None = None,
        keep_paths: bool = False,
        replaying: CapturedReplay | None = None,
    ) -> None:
        self.model = model
        self.sites = sites
        self.out = destination_of(out)
        self.notes: list[str] = []
        self.identity: Mapping[str, Json] = {}
        self.output: OutputSample | str = ""
        self.column_shards: Mapping[str, int] = {}
        self.pads_leak = False
        self.predicts: Prediction | None = None
        self.most_rows: int | None = None
        self.shared: dict[str, Json] = {}
        self._head = head
        self._threads = threads
        self._keep_paths = keep_paths
        self._replaying = replaying
        self._archive: Archive | None = None
        self._few: FewTokens | None = None

    @abstractmethod
    def write_examples(self, folder: Path) -> ExampleIndex:
        """Write the example table to `folder`, which it makes."""

    def known_examples(self) -> ExampleIndex | None:
        """Return the examples of the archive that was begun, if `write_examples` would surely write the same ones."""
        return None

    @abstractmethod
    def plan(self, index: ExampleIndex) -> Plan:
        """Return the plan for the examples of `index`."""

    @abstractmethod
    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, if there is a tokenizer, to a subfolder of `folder`."""

    @abstractmethod
    def provenance(self, plan: Plan) -> dict[str, Any]:
        """Return how the archive is made, as JSON values."""

    def prepare(self, workers: Workers) -> None:  # noqa: B027  # most jobs have nothing to make
        """Make what the examples are made of, together with the other workers; nothing, unless overridden."""

    def inputs(self, shared: Mapping[str, Any]) -> InputSource | None:  # noqa: ARG002  # tokens are all
        """Return what makes the inputs that examples have beside tokens, given what worker 0 shared."""
        return None

    def notes_of_archive(self) -> list[Json]:
        """Return what a reader of the archive should know, as far as it is known before the model runs."""
        return list(self.notes)

    def cut_columns(self, layout: ProcessLayout | None) -> Mapping[str, int]:  # noqa: ARG002  # this cuts none
        """Return into how many shards the columns of sites are cut, if each process stores its own columns."""
        return {}

    def batch_tokens(self, asked: int, index: ExampleIndex | None) -> int:
        """Return the most token positions of a batch: `asked`, or 1 if the examples have to run one by one.

        Args:
            asked: Token positions.
            index: The examples; None while they are not all known.
        """
        if not self.pads_leak or (index is not None and bool((index.n_tokens == index.n_tokens[0]).all())):
            return asked
        if RAN_ALONE not in self.notes:
            self.notes.append(RAN_ALONE)
        return 1

    def check_room(self, sites: Sequence[SitePlan], n_rows: int) -> None:
        """Raise OSError if the rows that are missing cannot fit on the disk; note if they may not. Buckets have room.

        Args:
            sites: What is stored of every row.
            n_rows: Rows of the archive, those that are written already included.
        """
        if isinstance(self.out, BucketFolder):
            return
        path = self.out.path
        missing = n_rows - committed_rows(self.out, self.archive.plan) if is_archive(path) else n_rows
        self.notes.extend(note for note in check_room(path, sites, missing) if note not in self.notes)

    def run(
        self,
        workers: Workers,
        on_plan: Callable[[Plan, int], None],
        on_batch: Callable[[RecordStats], None],
    ) -> tuple[list[WorkerFigures], Mapping[str, Any]]:
        """Capture what is missing and seal the archive; every worker calls this.

        Args:
            workers: This worker and the others.
            on_plan: Called before the model runs, with the plan and the rows that are committed already.
            on_batch: Called after every batch with the figures so far; on worker 0 with those of all workers.

        Returns:
            What each worker did; and what worker 0 shared: whether the archive was begun before, and `shared`.

        Raises:
            PlanError: The archive was begun with another plan.
            CaptureError: The capture failed, here or in another process; committed rows are safe.
        """
        needs_pattern = any(is_pattern(site) for site in self.sites)
        with eager_attention(self.model) if needs_pattern else nullcontext(False) as switched:
            if switched:
                self.notes.append(f"pattern sites need eager attention: the model used it to capture {self.out.name}")
            # Collectives of the workers that hold a model together: every worker has to call them.
            self._few = FewTokens(self.model, head=self._head)
            self.output = output_sample(self.model, self._few)
            self.identity = identify_model(self.model, self.output)
            self.pads_leak = padding_leaks(self.model, few=self._few)
            self.predicts = prediction_of(self.model)
            self.notes.extend(site_notes(self.sites))
            if lacks := no_loss(self.model, self.predicts):
                self.notes.append(lacks)
            is_shared = spans_processes(self.model) or is_sharded(self.model)
            sidecars = self._sidecars() if is_shared else None
            layout = workers.process_layout(self.model, self.sites)
            self.column_shards = self.cut_columns(layout)
            self.prepare(workers)
            shared = workers.plan_once(partial(self._prepare, sidecars), self._check)
            self._few = None  # its logits may be large
            plan = self.archive.plan
            is_ours = workers.is_alone and not shared["resumed"]
            with self._removing_what_was_not_begun(plan, is_ours=is_ours), self.reading_on():
                on_plan(plan, committed_rows(self.out, plan))
                stats = record(
                    self.model,
                    self.out,
                    plan,
                    process_layout=layout,
                    replaying=self._replaying,
                    inputs=self.inputs(shared),
                    work=partial(workers.work, self.out),
                    agree=Agreement() if is_sharded(self.model) else None,
                    most_rows=self.most_rows,
                    threads=self._threads or writer_threads(self.model),
                    on_batch=lambda own: on_batch(workers.so_far(own)),
                )
        figures = workers.finish(stats, self.out, plan.n_shards(self.n_rows()), self._seal)
        self._archive = open_written(self.out)
        return figures, shared

    def reading_on(self) -> AbstractContextManager[None]:
        """Return the context in which the model runs: what is left of the dataset may be read meanwhile."""
        return nullcontext()

    def n_rows(self) -> int:
        """Return the rows of the archive; called when the model ran."""
        return self.archive.n_rows

    def sealed(self) -> dict[str, Json] | None:
        """Return what `seal` has to know of an archive whose size was open."""
        return None

    def finish(self) -> None:  # noqa: B027  # most jobs leave nothing
        """Remove what is not needed once the archive is complete; nothing, unless overridden. Worker 0 calls it."""

    @contextmanager
    def _removing_what_was_not_begun(self, plan: Plan, *, is_ours: bool) -> Iterator[None]:
        """Remove an archive that this process alone made, if recording fails before any of its shards is safe.

        A run with other settings would otherwise be refused for the sake of an archive without rows.
        """
        try:
            yield
        except Exception:  # whatever the model or the caller's function raises
            if is_ours and not committed_rows(self.out, plan):
                self.out.remove_all()
            raise

    @property
    def archive(self) -> Archive:
        """The archive; opened again only after its commits may have changed.

        Until an archive in a bucket is finished, this is its local copy, which has no rows.
        """
        if self._archive is None:
            bring_archive(self.out)
            self._archive = Archive(self.out.path)
        return self._archive

    def _prepare(self, sidecars: Sidecars | None) -> Mapping[str, Any]:
        """Make the plan, and the archive unless it exists; refuse an archive of another plan."""
        bring_archive(self.out)
        resumed = is_archive(self.out.path)
        if resumed and (known := self.known_examples()) is not None:
            self._continue(self.plan(known))
            self.out.sweep()
            return {"resumed": resumed, **self.shared}
        with workspace(self.out) as folder:
            plan = self.plan(self.write_examples(folder / "examples"))
            if resumed:
                self._continue(plan)
            else:
                self.check_room(plan.sites, plan.n_rows or 0)
                write_sidecars(folder, self._sidecars() if sidecars is None else sidecars)  # none is no collective here
                self.write_tokenizer(folder)
                provenance = {**self.provenance(plan), **self._of_rows(plan)}
                self.notes += create_archive(folder, self.out, plan, provenance, keep_paths=self._keep_paths)
        self.out.sweep()
        return {"resumed": resumed, **self.shared}

    def _continue(self, plan: Plan) -> None:
        """Refuse an archive of another plan, and forget its shards that are lost."""
        self._compare(plan)
        self.check_room(plan.sites, plan.n_rows or 0)
        if dropped := drop_lost(self.out, self.archive.metadata):
            self.notes.extend(dropped)
            self._archive = None

    def _of_rows(self, plan: Plan) -> dict[str, Json]:
        """Return what the provenance says about the rows: types that were cast, and notes."""
        computed = {name: info.dtype for name, info in self.sites.items()}
        return {COMPUTED: cast_sites(plan.sites, computed), "notes": self.notes_of_archive()}

    def _check(self) -> None:
        """Refuse an archive that worker 0 made with another model or other settings than this worker has."""
        self._compare(self.plan(self.written_examples()))

    def written_examples(self) -> ExampleIndex:
        """Return the examples that worker 0 wrote."""
        bring_archive(self.out)
        return ExampleTable(self.out.path / "examples").index()

    def _compare(self, plan: Plan) -> None:
        """Compare the archive with the plan that this worker would make; note conditions that differ."""
        archive = self.archive
        self.notes.extend(changed_conditions(archive.provenance, self.model))
        if archive.plan.digest == plan.digest:
            self._compare_behaviour(archive)
            return
        lines = archive.plan.differences(plan)
        if of_config := config_differences(archive.provenance, self.model):  # more helpful than digests that differ
            lines = [line for line in lines if not line.startswith("model.config:")] + of_config
        if any(line.startswith("model.weights:") for line in lines):
            lines += adapter_differences(archive.provenance, self.model)
        listed = "\n  ".join(lines)
        raise PlanError(
            f"{self.out} was begun with another plan:\n  {listed}\n"
            f"Run it with the settings of the archive to go on, or choose another {named('out')}."
        )

    def _compare_behaviour(self, archive: Archive) -> None:
        """Refuse a model of the same weights that computes something else: the archive would be made of two models."""
        found = compare_behaviour(archive.provenance, self.model, self.output)
        self.notes.extend(found.notes)
        if found.wrong:
            listed = "\n  ".join(found.wrong)
            raise PlanError(
                f"{self.out} was begun with another model, although its weights are the same:\n  {listed}\n"
                "Switch adapters and hooks, and set attributes, as they were to go on, or choose another "
                f"{named('out')}."
            )

    def _sidecars(self) -> Sidecars:
        return sidecar_files(self.model, self.sites, head=self._head, notes=self.notes, few=self._few)

    def _seal(self) -> None:
        self.out.sweep()  # a worker may have died and left temporary files
        seal(self.out, read_metadata(self.out.path), self.sealed())
        self.finish()
