"""The story of ``residua capture``: load the model, read the dataset, run the job that captures it."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, Unpack

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.recording.stats import RecordStats, total
from residua.capture.runtime.pipeline_schedule import PIPELINE_TYPES, as_model, runnable
from residua.capture.runtime.process_groups import declared_group
from residua.capture.runtime.wrappers import evaluating, running_uncompiled
from residua.capture.sites.anatomy import takes_pixels
from residua.pipelines.capture.dataset_job import CaptureRequest, DatasetCapture, DatasetSource
from residua.pipelines.capture.encoder_decoder import capture_pairs
from residua.pipelines.capture.generated import GeneratedCapture
from residua.pipelines.capture.growing import GrowingCapture
from residua.pipelines.capture.images import image_dataset, part_to_capture
from residua.pipelines.capture.job import RAN_UNCOMPILED
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.capture.stacks import refuse_split
from residua.pipelines.capture.towers import capture_both, sites_of_both
from residua.pipelines.data.dataset import DatasetReport
from residua.pipelines.jobs.workers import Workers, working_together
from residua.pipelines.setup.capture_settings import CaptureOptions, CaptureSettings
from residua.pipelines.setup.models import is_pair_model
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.format.plan import Plan
from residua.store.sealing.losses import loss_notes
from residua.store.storage.place import try_archive_place


def capture_dataset(
    model: str | PathLike[str] | PreTrainedModel | PipelineScheduleSingle,
    dataset: DatasetSource,
    *,
    out: str | PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: object | None = None,
    settings: CaptureSettings | None = None,
    tensor_parallel: ProcessGroup | DeviceMesh | None = None,
    command: str | None = None,
    on_example: Callable[[int, int], None] = lambda *_: None,
    on_generated: Callable[[int, int], None] = lambda *_: None,
    on_plan: Callable[[Plan, int], None] = lambda *_: None,
    on_batch: Callable[[RecordStats], None] = lambda _: None,
    **options: Unpack[CaptureOptions],
) -> CaptureResult:
    """Capture the activations of `model` over `dataset` into the archive `out`; resume where an earlier run stopped.

    In a distributed launch every process calls this, each with its own replica of the model, and they share the work.
    The archive is the same as one process writes. See docs/distributed.md.

    Args:
        model: A transformers model, or a hub id or folder of one; or the schedule of a torch pipeline (GPipe or 1F1B)
            whose stages hold the model. Such stages run as many microbatches a batch as the schedule has.
        dataset: A hub id or path, or an iterable of texts, token-id lists, mappings, chats or images.
        out: Folder of the archive, or its address in a bucket (``s3://``, ``gs://``, ``az://``). If the archive exists,
            its missing rows are captured.
        storage_options: For an address, as for `residua.open`.
        tokenizer: Tokenizer of a model that is passed as an object; by default it is loaded with the model.
        processor: Processor or image processor of a model over images that is passed as an object; by default it is
            loaded with the model. See docs/images.md.
        settings: All settings at once.
        tensor_parallel: The ranks that the model's activations are split over, or their mesh, for a model that was
            split by hand, which does not show it.
        command: The command line, for the provenance.
        on_example: Called with the examples and tokens read so far, after each example.
        on_generated: With `generate`: called with the batches of prompts that are continued, and their number, after
            each.
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
            before the capture runs. A `StorageError` if it is a bucket that may not be written, or is not there.

    Example:
        >>> result = residua.capture_dataset("models/pydoc-1m", ["Hello world"], out="acts.zarr")  # doctest: +SKIP
    """
    chosen = _settings(settings, options)
    request = CaptureRequest(
        dataset=dataset,
        settings=chosen,
        tokenizer=tokenizer,
        processor=processor,
        command=command,
        on_example=on_example,
        on_generated=on_generated,
        on_plan=on_plan,
        on_batch=on_batch,
    )
    return capture_request(model, out, request, storage_options=storage_options, tensor_parallel=tensor_parallel)


def capture_request(
    model: str | PathLike[str] | PreTrainedModel | PipelineScheduleSingle,
    out: str | PathLike[str],
    request: CaptureRequest,
    *,
    storage_options: Mapping[str, Any] | None = None,
    tensor_parallel: ProcessGroup | DeviceMesh | None = None,
) -> CaptureResult:
    """Do what `capture_dataset` says, as one request."""
    chosen = request.settings
    is_pairs = is_pair_model(model, chosen)
    if is_pairs or sites_of_both(chosen.site_patterns):
        _refuse_for_two_archives(chosen, tensor_parallel, is_pairs=is_pairs)
        place = try_archive_place(out, storage_options)
        return (capture_pairs if is_pairs else capture_both)(model, place, request)
    place = try_archive_place(out, storage_options)
    with ExitStack() as stack:
        membership = stack.enter_context(working_together(place.out, chosen))
        if isinstance(model, PIPELINE_TYPES):
            model = stack.enter_context(as_model(model))
        else:
            _refuse_group(model, tensor_parallel)
            model, request = request.loaded(model, partial(_takes_images, settings=chosen))
        model, of_part = part_to_capture(model, chosen.site_patterns)
        stack.enter_context(declared_group(model, tensor_parallel))
        images = image_dataset(model, place.out.path, chosen, request.processor)
        if images is not None:
            stack.enter_context(images)
            of_processor = getattr(request.processor, "tokenizer", None)
            request = replace(request, tokenizer=None if takes_pixels(model) else request.tokenizer or of_processor)
        if chosen.generate is not None:
            job: DatasetCapture = GeneratedCapture(model, place.out, request)
        else:
            job = (GrowingCapture if chosen.grow else DatasetCapture)(model, place.out, request, images=images)
        job.notes.extend(filter(None, [*place.notes, of_part]))
        called = runnable(model)
        if stack.enter_context(running_uncompiled(called)):
            job.notes.append(RAN_UNCOMPILED)
        stack.enter_context(evaluating(called))
        figures, shared = job.run(Workers(membership), request.on_plan, request.on_batch)
        report = DatasetReport(**shared["dataset"])
        return CaptureResult(
            archive=job.archive,
            dataset=report,
            stats=total([worker.stats for worker in figures]),
            workers=tuple(figures),
            resumed=shared["resumed"],
            notes=(*job.notes, *report.notes(), *loss_notes(job.archive.plan, job.archive.commits)),
        )


def _takes_images(model: PreTrainedModel, settings: CaptureSettings) -> bool:
    part, _ = part_to_capture(model, settings.site_patterns)
    return takes_pixels(part) or settings.image_column is not None


def _refuse_group(model: object, tensor_parallel: object) -> None:
    if tensor_parallel is not None and isinstance(model, str | PathLike):
        raise PlanError(
            "tensor_parallel is for a model that you pass and split by hand; a model that is loaded from a hub id or a "
            f"folder is split with {named('tp', 2)}"
        )


def _refuse_for_two_archives(settings: CaptureSettings, tensor_parallel: object, *, is_pairs: bool) -> None:
    refuse_split(settings, tensor_parallel, "encoder-decoders" if is_pairs else "models over images")
    if is_pairs and settings.generate is not None:
        raise PlanError(
            f"{named('generate', settings.generate)} continues prompts, and an encoder-decoder makes a target of a "
            "source: generate the targets first, and give a dataset of pairs"
        )
    if settings.grow:
        raise PlanError(
            f"{named('grow', True)} is for one archive, and this capture makes two, whose plans belong together: "
            "leave it out"
        )


def _settings(settings: CaptureSettings | None, options: CaptureOptions) -> CaptureSettings:
    if settings is None:
        return CaptureSettings.from_mapping(options)
    if options:
        raise PlanError(f"give either settings or single options, not both: {', '.join(options)}")
    return settings
