"""More sites of an archive that is finished: captured beside it, over the same rows, and then put into it."""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from typing import Any

from transformers import PreTrainedModel

from residua.pipelines.capture.capture import capture_request
from residua.pipelines.capture.captured_batches import refuse_replay
from residua.pipelines.capture.dataset_job import CaptureRequest, DatasetSource
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.copies.join_sites import join_sites, place_beside, recover, refuse_other_rows
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.base.naming import named
from residua.store.format.archive_metadata import ROOT
from residua.store.format.commits import FOLDER
from residua.store.format.plan import GROW_RULE, Plan
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_written
from residua.store.storage.destination import BucketFolder, Destination, DiskFolder
from residua.store.storage.place import try_result_place


def add_sites(
    model: str | PathLike[str] | PreTrainedModel,
    dataset: DatasetSource,
    *,
    out: str | PathLike[str],
    settings: CaptureSettings,
    storage_options: Mapping[str, Any] | None = None,
    on_plan: Callable[[Plan, int], None] = lambda *_: None,
    **more: Any,
) -> CaptureResult:
    """Capture sites of an archive's rows that it lacks, and put them into it.

    The new sites are captured into a hidden folder next to the archive, in its shards and batches. If that is stopped,
    the same call goes on. At the end their shards are linked into the archive, and its index is made again; no shard
    of the sites that were there is touched, so a later `residua.push` sends only those of the new ones.

    Args:
        model: As for `residua.capture_dataset`; the model of the archive.
        dataset: As for `residua.capture_dataset`; the data of the archive.
        out: Folder of the archive, which is finished, or its address in a bucket.
        settings: Settings of the archive's capture, with the new sites as `sites`; their data type and codec may
            differ. Heights of shards, sizes of batches and `grow` are those of the archive.
        storage_options: For an address, as for `residua.open`.
        on_plan: As for `residua.capture_dataset`.
        more: Further arguments of `residua.capture_dataset`, but for `tensor_parallel`.

    Raises:
        PlanError: Model, data or settings differ from those of the archive, a site is in it already, or several
            processes were started.
        NotCapturedError: The archive is not finished.
        FileNotFoundError: There is no archive.
        As `residua.capture_dataset` otherwise.
    """
    _refuse_launch()
    place = try_result_place(out, storage_options, links=True).out
    with place.locked() if isinstance(place, BucketFolder) else nullcontext():
        return _add(place, model, dataset, settings, on_plan, more)


def _add(
    place: Destination,
    model: str | PathLike[str] | PreTrainedModel,
    dataset: DatasetSource,
    settings: CaptureSettings,
    on_plan: Callable[[Plan, int], None],
    more: Mapping[str, Any],
) -> CaptureResult:
    recover(place)
    archive = _finished(open_written(place))
    adding, options = place_beside(place), archive.storage_options
    plan, grows = archive.plan, GROW_RULE in archive.plan.rules
    chosen = replace(
        settings, rows_per_shard=plan.rows_per_shard, batch_tokens=plan.batch_tokens, head=False, grow=grows
    )

    def check(plan: Plan, rows: int) -> None:
        refuse_other_rows(archive, plan, "this run")
        on_plan(plan, rows)

    try:
        request = CaptureRequest(dataset=dataset, settings=chosen, known=archive, on_plan=check, **more)
        found = capture_request(model, adding, request, storage_options=options)
    except PlanError:
        begun = try_result_place(adding, options).out
        if begun.n_bytes(ROOT) is not None and not begun.names(FOLDER):
            begun.remove_all()
        raise
    joined = join_sites(archive, found.archive)
    if isinstance(place, DiskFolder):
        shutil.rmtree(adding)
    return replace(found, archive=joined)


def _refuse_launch() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PlanError(f"{named('add_sites')} runs in one process, and several were started: start one")


def _finished(archive: Archive) -> Archive:
    """Return the archive if its capture is finished and can be done again."""
    if archive.stacks:
        raise PlanError(
            f"{archive.place} holds the archives of several stacks, to which no sites can be added yet: capture all "
            "sites into a new archive"
        )
    refuse_replay(archive, "an addition of sites")
    if not archive.is_sealed:
        raise NotCapturedError(
            f"{archive.place} is not finished: run the same capture again without {named('add_sites')}, and add sites "
            "then"
        )
    if not archive.plan.batch_tokens:
        raise PlanError(
            f"{archive.place} was recorded in a loop of its own, or taken from other archives, so its batches are not "
            "known: record the new sites in a loop like that"
        )
    return archive
