"""From a model and a dataset to an archive: plan, create or resume, record, seal."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.identity.provenance import describe_model, environment, identify_model, identify_tokenizer
from residua.capture.identity.sidecars import Sidecars, save_tokenizer, sidecar_files, write_sidecars
from residua.capture.layout.process_layout import ProcessLayout, spans_processes
from residua.capture.recording.column_shards import column_shards
from residua.capture.recording.record import RecordStats, record, total
from residua.capture.runtime.collectives import Agreement
from residua.capture.runtime.pipeline_schedule import PIPELINES, as_model, runnable
from residua.capture.runtime.process_groups import split_by_hand
from residua.capture.runtime.sharded import is_sharded
from residua.capture.runtime.streams import writer_threads
from residua.capture.runtime.wrappers import replica_of, running_uncompiled
from residua.capture.sites.attention import eager_attention
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.sites.reference_model import whole_sites
from residua.capture.sites.shape_probe import evaluating
from residua.capture.sites.site import SiteInfo
from residua.pipelines.capture.plan import DatasetSource, make_plan, write_examples
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.capture.resume import compare_plans, sealed_archive
from residua.pipelines.data.dataset import DatasetReport, dataset_identity
from residua.pipelines.jobs.workers import Workers, workers_of
from residua.pipelines.setup.models import load_model, load_tokenizer
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.errors import PlanError
from residua.store.examples.index import ExampleIndex
from residua.store.examples.table import ExampleTable
from residua.store.format.archive_metadata import is_archive
from residua.store.format.commits import drop_broken
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan
from residua.store.read.archive import Archive
from residua.store.storage.files import sweep


def capture_dataset(
    model: str | PathLike[str] | PreTrainedModel | PipelineScheduleSingle,
    dataset: DatasetSource,
    *,
    out: str | PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: CaptureSettings | None = None,
    tensor_parallel: ProcessGroup | DeviceMesh | None = None,
    command: str | None = None,
    on_example: Callable[[int, int], None] = lambda *_: None,
    on_plan: Callable[[Plan, int], None] = lambda *_: None,
    on_batch: Callable[[RecordStats], None] = lambda _: None,
    **options: Any,
) -> CaptureResult:
    """Capture the activations of `model` over `dataset` into the archive `out`; go on where an earlier run stopped.

    Called by every process of a distributed launch, each with its own replica of the model, they share the work; the
    archive is the same as one process writes. docs/distributed.md has the details.

    Args:
        model: A transformers model, or a hub id or folder of one; or the schedule of a torch pipeline, GPipe or 1F1B,
            whose stages have its parts. They run its forward passes, as many microbatches a batch as the schedule has.
        dataset: A hub id or path, or an iterable of texts, token-id lists, mappings or chats.
        out: Folder of the archive. If it is one already, its missing rows are captured.
        tokenizer: Tokenizer of a model that is passed as an object; else it is loaded with the model.
        settings: All settings at once.
        tensor_parallel: The ranks over which the model's activations are split, or their mesh, where this cannot be
            told from the model, because it was split by hand.
        command: The command line, for the provenance.
        on_example: Called with the examples and tokens read so far, after each example.
        on_plan: Called with the plan, and the rows that are committed already, before the model runs.
        on_batch: Called with the figures so far after every batch; with those of all workers, on worker 0.
        **options: Single settings by name, as in `CaptureSettings`, for example ``sites="resid_post.*"``.

    Returns:
        The archive, and what was done.

    Raises:
        PlanError: The settings contradict each other, or differ from those of the archive that exists.
        UnknownSiteError: The model lacks a site.
        DatasetError: The dataset cannot be used as asked.
        CaptureError: The capture failed, here or in another process; what was committed is safe.
        ArchiveInUseError: Another run is at work on the archive, and is not to be joined.

    Example:
        >>> result = residua.capture_dataset("models/pydoc-1m", ["Hello world"], out="acts.zarr")  # doctest: +SKIP
    """
    chosen = _settings(settings, options)
    with ExitStack() as stack:
        workers = stack.enter_context(workers_of(Path(out), join=chosen.join))
        stack.enter_context(workers.replica_group(chosen))
        if isinstance(model, str | PathLike):
            if tensor_parallel is not None:
                raise PlanError(
                    "tensor_parallel says how a model that you pass is split; one that is loaded from a hub id or a "
                    "folder is split with tp=2 (--tp 2)"
                )
            name = fspath(model)
            tokenizer = tokenizer or load_tokenizer(name, chosen)
            model = load_model(name, chosen)
        elif isinstance(model, PIPELINES):
            model = stack.enter_context(as_model(model))
        else:
            model = _language_model(replica_of(model))
        job = _Job(model, tokenizer, dataset, Path(out), chosen, command)
        stack.enter_context(split_by_hand(model, tensor_parallel))
        return job.run(workers, on_example, on_plan, on_batch)


def _settings(settings: CaptureSettings | None, options: dict[str, Any]) -> CaptureSettings:
    if settings is None:
        return CaptureSettings.from_mapping(options)
    if options:
        raise PlanError(f"give settings or single options, not both: {', '.join(options)}")
    return settings


def _language_model(model: nn.Module) -> PreTrainedModel:
    """Return `model` as what it is, or say what to do with another one."""
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise PlanError(
            f"capture_dataset runs transformers models over token ids, and a {type(model).__name__} is none: call it "
            "in a loop of your own inside residua.Recorder, which records any torch module, or pass the transformers "
            "model that is in it"
        )
    return cast("PreTrainedModel", model)


class _Job:
    """One capture: what it was asked, and the steps in order."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        dataset: DatasetSource,
        out: Path,
        settings: CaptureSettings,
        command: str | None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._dataset = dataset
        self._out = out
        self._settings = settings
        self._command = command
        self._report = DatasetReport()
        self._notes: list[str] = []
        self._archive: Archive | None = None

    def run(
        self,
        workers: Workers,
        on_example: Callable[[int, int], None],
        on_plan: Callable[[Plan, int], None],
        on_batch: Callable[[RecordStats], None],
    ) -> CaptureResult:
        split = spans_processes(self._model)
        sites = (whole_sites if split else resolve_sites)(self._model, [self._settings.sites])
        needs_pattern = any(site.startswith("pattern.") for site in sites)
        eager = eager_attention(self._model) if needs_pattern else nullcontext(False)
        called = runnable(self._model)
        with running_uncompiled(called) as compiled, evaluating(called), eager as switched:
            if compiled:
                self._notes.append("hooks are no part of compiled code: the model ran uncompiled for this capture")
            if switched:
                self._notes.append("pattern sites need eager attention: the model was switched to it for this capture")
            # by every worker: of a model that is spread over workers these are collectives
            self._identity = identify_model(self._model)
            self._beside = self._sidecar_files(sites) if split or is_sharded(self._model) else None
            part = workers.part(self._model, sites)
            self._column_shards = self._cut_columns(part)
            said = workers.plan_once(partial(self._prepare, sites, on_example), partial(self._check, sites))
            self._report = DatasetReport(**said["dataset"])
            archive = self._opened()
            plan, n_shards = archive.plan, archive.plan.n_shards(archive.n_rows)
            on_plan(plan, archive.progress.rows)
            stats = record(
                self._model,
                self._out,
                plan,
                process_layout=part,
                work=partial(workers.work, self._out),
                agree=Agreement() if is_sharded(self._model) else None,
                threads=self._settings.threads or writer_threads(self._model),
                on_batch=lambda own: on_batch(workers.so_far(own)),
            )
        self._archive = None  # its records are those of before
        figures = workers.finish(stats, self._out, n_shards, self._seal)
        return CaptureResult(
            archive=self._opened(),
            dataset=self._report,
            stats=total([worker.stats for worker in figures]),
            workers=tuple(figures),
            resumed=bool(said["resumed"]),
            notes=(*self._notes, *self._report.notes()),
        )

    def _opened(self) -> Archive:
        """Return the archive, opened once for each time that its records may have changed."""
        if self._archive is None:
            self._archive = Archive(self._out)
        return self._archive

    def _seal(self) -> None:
        self._archive = sealed_archive(self._out)

    def _prepare(self, sites: Mapping[str, SiteInfo], on_example: Callable[[int, int], None]) -> Mapping[str, Any]:
        """Make the plan, and the archive unless it exists; an archive of another plan is refused."""
        resumed = is_archive(self._out)
        with workspace(self._out) as folder:
            index = write_examples(
                folder / "examples",
                self._model,
                self._tokenizer,
                self._dataset,
                settings=self._settings,
                report=self._report,
                on_example=on_example,
            )
            plan = self._plan(sites, index)
            if plan.rows_per_shard < min(plan.batch_tokens, index.total_rows):
                self._notes.append(
                    f"a shard holds {plan.rows_per_shard:,} rows, so batches are no larger: --host-memory allows no "
                    "taller one"
                )
            if resumed:
                self._compare(plan)
                dropped = drop_broken(self._out, plan, self._opened().commits)
                self._notes.extend(dropped)
                self._archive = None if dropped else self._archive
            else:
                write_sidecars(folder, self._beside or self._sidecar_files(sites))
                if self._tokenizer is not None:
                    save_tokenizer(self._tokenizer, folder / "tokenizer")
                create_archive(folder, self._out, plan, self._provenance(plan))
        sweep(self._out)
        return {"resumed": resumed, "dataset": asdict(self._report)}

    def _cut_columns(self, part: ProcessLayout | None) -> Mapping[str, int]:
        """Return into how many parts the rows of sites are cut that each process stores as it has them."""
        if self._settings.gather:
            return {}
        if part is None or part.group is None:
            raise PlanError("--no-gather is for models under tensor parallelism, and this one is not: leave it out")
        return column_shards(self._model, part)

    def _sidecar_files(self, sites: Mapping[str, SiteInfo]) -> Sidecars:
        return sidecar_files(self._model, sites, head=self._settings.head)

    def _check(self, sites: Mapping[str, SiteInfo]) -> None:
        """Refuse an archive that another worker made of another model or other settings than this one's."""
        self._compare(self._plan(sites, ExampleTable(self._out / "examples").index()))

    def _plan(self, sites: Mapping[str, SiteInfo], index: ExampleIndex) -> Plan:
        return make_plan(self._settings, sites, index, identity=self._identity, column_shards=self._column_shards)

    def _compare(self, plan: Plan) -> None:
        self._notes.extend(compare_plans(self._opened(), plan, self._model))

    def _provenance(self, plan: Plan) -> dict[str, Any]:
        return {
            "model": describe_model(self._model, plan.model),
            "tokenizer": None if self._tokenizer is None else identify_tokenizer(self._tokenizer),
            "dataset": dataset_identity(self._dataset, self._settings),
            "command": self._command,
            "seed": self._settings.seed,
            **environment(),
        }
