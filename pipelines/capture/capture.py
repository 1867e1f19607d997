"""The story of ``residua capture``: load the model, plan, create or resume the archive, record, seal.

`capture_dataset` is the job as users call it. `CaptureJob.run` has its steps in order; a replay that captures takes
the same steps with examples and a plan of its own.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.forward.example_inputs import InputSource
from residua.capture.hooks.attention import eager_attention
from residua.capture.hooks.site import SiteInfo, plan_sites, site_notes
from residua.capture.identity.few_tokens import FewTokens
from residua.capture.identity.output import OutputSample, output_sample
from residua.capture.identity.padding import RAN_ALONE, padding_leaks
from residua.capture.identity.prediction import Prediction, no_loss, prediction_of
from residua.capture.identity.provenance import (
    adapter_differences,
    changed_conditions,
    compare_behaviour,
    config_differences,
    describe_model,
    environment,
    identify_model,
    identify_tokenizer,
)
from residua.capture.identity.sidecars import Sidecars, save_tokenizer, sidecar_files, write_sidecars
from residua.capture.layout.process_layout import ProcessLayout, spans_processes
from residua.capture.recording.column_shards import column_shards
from residua.capture.recording.record import record
from residua.capture.recording.stats import RecordStats, total
from residua.capture.replay.engine import CapturedReplay
from residua.capture.runtime.collectives import Agreement
from residua.capture.runtime.pipeline_schedule import PIPELINE_TYPES, as_model, runnable
from residua.capture.runtime.process_groups import declared_group
from residua.capture.runtime.sharded import is_sharded
from residua.capture.runtime.streams import writer_threads
from residua.capture.runtime.wrappers import evaluating, replica_of, running_uncompiled
from residua.capture.sites.anatomy import takes_pixels
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.sites.reference_model import unsharded_sites
from residua.capture.sites.shape_probe import measure_sites
from residua.pipelines.capture.images import image_dataset, load_processor, part_to_capture
from residua.pipelines.data.dataset import DatasetReport, dataset_identity, read_examples
from residua.pipelines.data.tokenizer import special_ids
from residua.pipelines.images.examples import ImageDataset
from residua.pipelines.jobs.workers import WorkerFigures, Workers, working_together
from residua.pipelines.setup.models import is_pair_model, load_model, load_tokenizer, token_limit
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.canonical import Json
from residua.store.base.errors import DatasetError, PlanError
from residua.store.base.naming import named
from residua.store.examples.index import ExampleIndex, dataset_entry
from residua.store.examples.table import ExampleTable
from residua.store.examples.writer import ExampleWriter
from residua.store.format.archive_metadata import is_archive, read_metadata
from residua.store.format.commits import committed_rows
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan, check_host_memory, choose_rows_per_shard
from residua.store.format.room import check_room
from residua.store.format.row_columns import HAS_IMAGES, IMAGE_ROW_BYTES
from residua.store.format.site_names import is_pattern
from residua.store.read.archive import Archive
from residua.store.sealing.losses import COMPUTED, cast_sites, loss_notes
from residua.store.sealing.lost_shards import drop_lost
from residua.store.sealing.seal import seal
from residua.store.storage.files import sweep
from residua.store.storage.place import try_place

DatasetSource = str | PathLike[str] | Iterable[Any]


@dataclass(frozen=True, kw_only=True, repr=False)
class CaptureResult:
    """What a capture did.

    Attributes:
        archive: The archive, open for reading.
        dataset: What was read of the dataset, and what was cut or left out.
        stats: Figures of this run, of all workers together, without those of an earlier, interrupted run.
        workers: What each worker did.
        resumed: Whether the archive had been begun by an earlier run.
        notes: What the user should know, one sentence each.
    """

    archive: Archive
    dataset: DatasetReport
    stats: RecordStats
    workers: tuple[WorkerFigures, ...]
    resumed: bool
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        captured = f"{self.stats.rows:,} rows captured in {self.stats.seconds:.1f} s"
        return f"<CaptureResult {self.archive.place}: {captured}, {len(self.notes)} notes>"


def capture_dataset(
    model: str | PathLike[str] | PreTrainedModel | PipelineScheduleSingle,
    dataset: DatasetSource,
    *,
    out: str | PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: object | None = None,
    settings: CaptureSettings | None = None,
    tensor_parallel: ProcessGroup | DeviceMesh | None = None,
    command: str | None = None,
    on_example: Callable[[int, int], None] = lambda *_: None,
    on_plan: Callable[[Plan, int], None] = lambda *_: None,
    on_batch: Callable[[RecordStats], None] = lambda _: None,
    **options: Any,
) -> CaptureResult:
    """Capture the activations of `model` over `dataset` into the archive `out`; resume where an earlier run stopped.

    In a distributed launch every process calls this, each with its own replica of the model, and they share the work.
    The archive is the same as one process writes. See docs/distributed.md.

    Args:
        model: A transformers model, or a hub id or folder of one; or the schedule of a torch pipeline (GPipe or 1F1B)
            whose stages hold the model. Such stages run as many microbatches a batch as the schedule has.
        dataset: A hub id or path, or an iterable of texts, token-id lists, mappings, chats or images.
        out: Folder of the archive. If the archive exists, its missing rows are captured.
        tokenizer: Tokenizer of a model that is passed as an object; by default it is loaded with the model.
        processor: Processor or image processor of a model over images that is passed as an object; by default it is
            loaded with the model. See docs/images.md.
        settings: All settings at once.
        tensor_parallel: The ranks that the model's activations are split over, or their mesh, for a model that was
            split by hand, which does not show it.
        command: The command line, for the provenance.
        on_example: Called with the examples and tokens read so far, after each example.
        on_plan: Called before the model runs, with the plan and the rows that are committed already.
        on_batch: Called after every batch with the figures so far; on worker 0 with those of all workers.
        **options: Single settings by name, as in `CaptureSettings`, for example ``sites="resid_post.*"``.

    Returns:
        The archive, and what was done.

    Raises:
        PlanError: The settings contradict each other, or differ from those of the archive that exists.
        UnknownSiteError: The model does not have a site.
        DatasetError: The dataset cannot be used as asked.
        CaptureError: The capture failed, here or in another process; committed rows are safe.
        ArchiveInUseError: Another run is writing the archive, and cannot be joined or is not to be joined.
        OSError: The place `out` cannot be written, has no hard links, or too little free space; this is found out
            before the capture runs.

    Example:
        >>> result = residua.capture_dataset("models/pydoc-1m", ["Hello world"], out="acts.zarr")  # doctest: +SKIP
    """
    chosen = _settings(settings, options)
    if is_pair_model(model, chosen):
        from residua.pipelines.capture.encoder_decoder import capture_pairs  # which is built on this module

        found = capture_pairs(
            model,
            dataset,
            Path(out),
            tokenizer,
            chosen,
            processor=processor,
            tensor_parallel=tensor_parallel,
            command=command,
            on_example=on_example,
            on_plan=on_plan,
            on_batch=on_batch,
        )
        return CaptureResult(
            archive=found.archive,
            dataset=found.dataset,
            stats=total([worker.stats for worker in found.workers]),
            workers=found.workers,
            resumed=found.resumed,
            notes=found.notes,
        )
    place = try_place(Path(out), locks=True, links=True)
    with ExitStack() as stack:
        membership = stack.enter_context(working_together(place.path, chosen))
        name = ""
        if isinstance(model, str | PathLike):
            name = _name(model, tensor_parallel)
            tokenizer = tokenizer or load_tokenizer(name, chosen)
            model = load_model(name, chosen)
        elif isinstance(model, PIPELINE_TYPES):
            model = stack.enter_context(as_model(model))
        else:
            model = _language_model(replica_of(model))
        model, of_part = part_to_capture(model, chosen.sites)
        if processor is None and name and (takes_pixels(model) or chosen.image_column is not None):
            processor = load_processor(name, chosen.revision)
        stack.enter_context(declared_group(model, tensor_parallel))
        images = image_dataset(model, place.path, chosen, processor)
        if images is not None:
            stack.enter_context(images)
            tokenizer = None if takes_pixels(model) else tokenizer or getattr(processor, "tokenizer", None)
        job = DatasetCapture(model, place.path, tokenizer, dataset, chosen, command, on_example, images)
        job.notes.extend(filter(None, [*place.notes, of_part]))
        called = runnable(model)
        if stack.enter_context(running_uncompiled(called)):
            job.notes.append("compiled code does not run hooks: the model ran uncompiled for this capture")
        stack.enter_context(evaluating(called))
        figures, shared = job.run(Workers(membership), on_plan, on_batch)
        report = DatasetReport(**shared["dataset"])
        return CaptureResult(
            archive=job.archive,
            dataset=report,
            stats=total([worker.stats for worker in figures]),
            workers=tuple(figures),
            resumed=shared["resumed"],
            notes=(*job.notes, *report.notes(), *loss_notes(job.archive.plan, job.archive.commits)),
        )


def _name(model: str | PathLike[str], tensor_parallel: object) -> str:
    if tensor_parallel is not None:
        raise PlanError(
            "tensor_parallel is for a model that you pass and split by hand; a model that is loaded from a hub id or a "
            f"folder is split with {named('tp', 2)}"
        )
    return fspath(model)


def _settings(settings: CaptureSettings | None, options: dict[str, Any]) -> CaptureSettings:
    if settings is None:
        return CaptureSettings.from_mapping(options)
    if options:
        raise PlanError(f"give either settings or single options, not both: {', '.join(options)}")
    return settings


def _language_model(model: nn.Module) -> PreTrainedModel:
    """Return `model` if it is a transformers model; raises PlanError otherwise."""
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise PlanError(
            f"capture_dataset runs transformers models over token ids, and was given a {type(model).__name__}: call it "
            "in your own loop inside residua.Recorder, which records any torch module, or pass the transformers model "
            "that it contains"
        )
    return cast("PreTrainedModel", model)


class CaptureJob(ABC):
    """A capture into an archive: its steps, in order. A subclass provides the examples, the plan and the provenance.

    Args:
        model: The model, on its device; every worker has it, or its share of it.
        sites: The sites to capture, as the unsharded model has them.
        out: Folder of the archive.
        head: Whether to store the final norm and the unembedding.
        threads: Threads that encode and write; None chooses by the model's device.
        replaying: Puts stored rows into the model and edits, batch by batch; None captures the model as it is.

    Attributes:
        notes: What the user should know, one sentence each; grows while the job runs. Those that are known before the
            archive is made are kept in its provenance.
        identity: What identifies the model in a plan; known before `plan` is called.
        output: What the model computes on a few tokens, or why that is not known; known before `plan` is called.
        column_shards: What `cut_columns` returned; known before `plan` is called.
        pads_leak: Whether padding changes the model's rows; known before `plan` is called.
        predicts: What the model's logits are of; known before `plan` is called.
        shared: What worker 0 found out while it prepared, for the other workers, as JSON values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Mapping[str, SiteInfo],
        out: Path,
        *,
        head: bool,
        threads: int | None = None,
        replaying: CapturedReplay | None = None,
    ) -> None:
        self.model = model
        self.sites = sites
        self.out = out
        self.notes: list[str] = []
        self.identity: Mapping[str, Json] = {}
        self.output: OutputSample | str = ""
        self.column_shards: Mapping[str, int] = {}
        self.pads_leak = False
        self.predicts: Prediction | None = None
        self.shared: dict[str, Json] = {}
        self._head = head
        self._threads = threads
        self._replaying = replaying
        self._archive: Archive | None = None
        self._few: FewTokens | None = None

    @abstractmethod
    def write_examples(self, folder: Path) -> ExampleIndex:
        """Write the example table to `folder`, which it makes."""

    @abstractmethod
    def plan(self, index: ExampleIndex) -> Plan:
        """Return the plan for the examples of `index`."""

    @abstractmethod
    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, if there is a tokenizer, to a subfolder of `folder`."""

    @abstractmethod
    def provenance(self, plan: Plan) -> dict[str, Any]:
        """Return how the archive is made, as JSON values."""

    def inputs(self, shared: Mapping[str, Any]) -> InputSource | None:  # noqa: ARG002  # tokens are all
        """Return what makes the inputs that examples have beside tokens, given what worker 0 shared."""
        return None

    def notes_of_archive(self) -> list[Json]:
        """Return what a reader of the archive should know, as far as it is known before the model runs."""
        return list(self.notes)

    def cut_columns(self, layout: ProcessLayout | None) -> Mapping[str, int]:  # noqa: ARG002  # this cuts none
        """Return into how many shards the columns of sites are cut, if each process stores its own columns."""
        return {}

    def batch_tokens(self, asked: int, index: ExampleIndex) -> int:
        """Return the most token positions of a batch: `asked`, or 1 if the examples have to run one by one."""
        if not self.pads_leak or bool((index.n_tokens == index.n_tokens[0]).all()):
            return asked
        if RAN_ALONE not in self.notes:
            self.notes.append(RAN_ALONE)
        return 1

    def check_room(self, sites: Sequence[SitePlan], n_rows: int) -> None:
        """Raise OSError if the rows that are missing cannot fit on the disk; note if they may not.

        Args:
            sites: What is stored of every row.
            n_rows: Rows of the archive, those that are written already included.
        """
        missing = n_rows - committed_rows(self.out, self.archive.plan) if is_archive(self.out) else n_rows
        self.notes.extend(note for note in check_room(self.out, sites, missing) if note not in self.notes)

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
            shared = workers.plan_once(partial(self._prepare, sidecars), self._check)
            self._few = None  # its logits may be large
            plan, n_shards = self.archive.plan, self.archive.plan.n_shards(self.archive.n_rows)
            with self._removing_what_was_not_begun(plan, is_ours=workers.is_alone and not shared["resumed"]):
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
                    threads=self._threads or writer_threads(self.model),
                    on_batch=lambda own: on_batch(workers.so_far(own)),
                )
        self._archive = None  # it knows the commits from before
        return workers.finish(stats, self.out, n_shards, self._seal), shared

    @contextmanager
    def _removing_what_was_not_begun(self, plan: Plan, *, is_ours: bool) -> Iterator[None]:
        """Remove an archive that this process alone made, if recording fails before any of its shards is safe.

        A run with other settings would otherwise be refused for the sake of an archive without rows.
        """
        try:
            yield
        except Exception:  # whatever the model or the caller's function raises
            if is_ours and not committed_rows(self.out, plan):
                shutil.rmtree(self.out, ignore_errors=True)
            raise

    @property
    def archive(self) -> Archive:
        """The archive; opened again only after its commits may have changed."""
        if self._archive is None:
            self._archive = Archive(self.out)
        return self._archive

    def _prepare(self, sidecars: Sidecars | None) -> Mapping[str, Any]:
        """Make the plan, and the archive unless it exists; refuse an archive of another plan."""
        resumed = is_archive(self.out)
        with workspace(self.out) as folder:
            plan = self.plan(self.write_examples(folder / "examples"))
            if resumed:
                self._compare(plan)
                self.check_room(plan.sites, plan.n_rows or 0)
                if dropped := drop_lost(self.out, self.archive.metadata):
                    self.notes.extend(dropped)
                    self._archive = None
            else:
                self.check_room(plan.sites, plan.n_rows or 0)
                write_sidecars(folder, sidecars or self._sidecars())
                self.write_tokenizer(folder)
                create_archive(folder, self.out, plan, {**self.provenance(plan), **self._of_rows(plan)})
        sweep(self.out)
        return {"resumed": resumed, **self.shared}

    def _of_rows(self, plan: Plan) -> dict[str, Json]:
        """Return what the provenance says about the rows: types that were cast, and notes."""
        computed = {name: info.dtype for name, info in self.sites.items()}
        return {COMPUTED: cast_sites(plan.sites, computed), "notes": self.notes_of_archive()}

    def _check(self) -> None:
        """Refuse an archive that worker 0 made with another model or other settings than this worker has."""
        self._compare(self.plan(self.written_examples()))

    def written_examples(self) -> ExampleIndex:
        """Return the examples that worker 0 wrote."""
        return ExampleTable(self.out / "examples").index()

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
            f"{archive.place} was begun with another plan:\n  {listed}\n"
            f"Run it with the settings of the archive to go on, or choose another {named('out')}."
        )

    def _compare_behaviour(self, archive: Archive) -> None:
        """Refuse a model of the same weights that computes something else: the archive would be made of two models."""
        found = compare_behaviour(archive.provenance, self.model, self.output)
        self.notes.extend(found.notes)
        if found.wrong:
            listed = "\n  ".join(found.wrong)
            raise PlanError(
                f"{archive.place} was begun with another model, although its weights are the same:\n  {listed}\n"
                "Switch adapters and hooks, and set attributes, as they were to go on, or choose another "
                f"{named('out')}."
            )

    def _sidecars(self) -> Sidecars:
        return sidecar_files(self.model, self.sites, head=self._head, notes=self.notes, few=self._few)

    def _seal(self) -> None:
        sweep(self.out)  # a worker may have died and left temporary files
        seal(self.out, read_metadata(self.out))


class DatasetCapture(CaptureJob):
    """The capture of a dataset's examples."""

    def __init__(
        self,
        model: PreTrainedModel,
        out: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        dataset: DatasetSource,
        settings: CaptureSettings,
        command: str | None,
        on_example: Callable[[int, int], None],
        images: ImageDataset | None = None,
        sites: Mapping[str, SiteInfo] | None = None,
    ) -> None:
        if sites is None:
            sites = (unsharded_sites if spans_processes(model) else resolve_sites)(model, [settings.sites])
        if takes_pixels(model):
            unmeasured = {name: info for name, info in sites.items() if info.row_shape is None}
            sites = {**sites, **measure_sites(model, unmeasured)}
        super().__init__(model, sites, out, head=settings.head, threads=settings.threads)
        self._tokenizer = tokenizer
        self._dataset = dataset
        self._settings = settings
        self._command = command
        self._on_example = on_example
        self._images = images
        self._report = DatasetReport()
        self.longest_source: int | None = None

    def write_examples(self, folder: Path) -> ExampleIndex:
        """Read the dataset once, and write its examples; raises DatasetError if it cannot be used as asked."""
        tokenizer, report = self._tokenizer, self._report
        if self._settings.drop_special and tokenizer is None and self._images is None:
            raise DatasetError(
                f"{named('drop_special', True)} needs a tokenizer, and the model has none: nothing says which tokens "
                "are special"
            )
        writer = ExampleWriter(folder)
        if self._images is not None:
            examples = self._images.examples(self._dataset, model_limit=token_limit(self.model), report=report)
        else:
            examples = read_examples(
                self._dataset,
                settings=self._settings,
                tokenizer=tokenizer,
                model_limit=token_limit(self.model),
                vocab_size=self.model.config.get_text_config().vocab_size,
                special_ids=special_ids(tokenizer),
                report=report,
            )
        for example in examples:
            writer.add(example)
            self._on_example(report.n_examples, report.n_tokens)
        self.shared["dataset"] = asdict(report)
        if self._images is not None:
            self.shared["images"] = str(self._images.folder)
        return writer.close()

    def plan(self, index: ExampleIndex) -> Plan:
        """Return the plan; raises PlanError if not even the smallest shard fits into host memory."""
        settings, most_rows = self._settings, int(index.n_rows.max())
        batch_tokens = self.batch_tokens(settings.batch_tokens, index)
        sites = plan_sites(
            self.sites,
            dtype=settings.dtype,
            codec=settings.codec,
            longest_example=int(index.n_tokens.max()),
            longest_source=self.longest_source,
            column_shards=self.column_shards,
        )
        row_bytes = [site.row_bytes for site in sites]
        row_bytes += [] if self._images is None else [IMAGE_ROW_BYTES]
        height = settings.rows_per_shard or choose_rows_per_shard(
            row_bytes,
            batch_rows=min(batch_tokens, index.total_rows),
            most_rows_per_example=most_rows,
            host_memory_bytes=settings.host_memory,
        )
        check_host_memory(row_bytes, most_rows, min(height, index.total_rows), settings.host_memory)
        if height < min(batch_tokens, index.total_rows):
            limit = named("host_memory") if settings.rows_per_shard is None else f"{named('rows_per_shard')}"
            self.notes.append(
                f"a shard holds {height:,} rows, and a batch no more than that, although "
                f"{named('batch_tokens', settings.batch_tokens)} allows more: raise {limit} for larger batches"
            )
        return Plan(
            model=self.identity,
            dataset=self.dataset_of_plan(index),
            rules=self.rules(),
            sites=sites,
            rows_per_shard=height,
            batch_tokens=batch_tokens,
            n_rows=index.total_rows,
        )

    def inputs(self, shared: Mapping[str, Any]) -> InputSource | None:
        """Return what makes the images of examples; None without images."""
        return None if self._images is None else self._images.inputs(Path(shared["images"]))

    def dataset_of_plan(self, index: ExampleIndex) -> dict[str, Json]:
        """Return what the plan records of the examples."""
        return {**dataset_entry(index), **({} if self._images is None else {HAS_IMAGES: True})}

    def rules(self) -> dict[str, Json]:
        """Return the settings that shape the examples, as the plan records them."""
        processor = {} if self._images is None else {"processor": self._images.identity["digest"]}
        return {**self._settings.rules(), **processor}

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, if there is a tokenizer, to a subfolder of `folder`."""
        if self._tokenizer is not None:
            save_tokenizer(self._tokenizer, folder / "tokenizer")

    def provenance(self, plan: Plan) -> dict[str, Any]:
        """Return how the archive is made, as JSON values."""
        return {
            "model": describe_model(self.model, plan.model, self.output, predicts=self.predicts),
            "tokenizer": None if self._tokenizer is None else identify_tokenizer(self._tokenizer),
            **({} if self._images is None else {"processor": dict(self._images.identity)}),
            "dataset": dataset_identity(self._dataset, self._settings),
            "command": self._command,
            "seed": self._settings.seed,
            **environment(),
        }

    def notes_of_archive(self) -> list[Json]:
        """Return what a reader of the archive should know, as far as it is known before the model runs."""
        return [*self.notes, *self._report.notes()]

    def cut_columns(self, layout: ProcessLayout | None) -> Mapping[str, int]:
        """Return into how many shards the columns of sites are cut; raises PlanError if there is nothing to cut."""
        if self._settings.gather:
            return {}
        if layout is None or layout.group is None:
            raise PlanError(
                f"{named('gather', False)} is for models under tensor parallelism, and this model is not: leave it out"
            )
        return column_shards(self.model, layout)
