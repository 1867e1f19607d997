"""More sites of an archive that is finished: captured beside it, over the same rows, and then put into it."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.capture.dataset_job import DatasetSource
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.copies.join_sites import join_sites, recover, refuse_other_rows
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.base.naming import named
from residua.store.format.archive_metadata import is_archive, read_metadata
from residua.store.format.commits import FOLDER
from residua.store.format.plan import Plan
from residua.store.read.archive import Archive, refuse_replay
from residua.store.read.stacks import open_archive
from residua.store.storage.address import is_remote


def add_sites(
    model: str | PathLike[str] | PreTrainedModel,
    dataset: DatasetSource,
    *,
    out: str | PathLike[str],
    settings: CaptureSettings,
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
        out: Folder of the archive, which is finished.
        settings: Settings of the archive's capture, with the new sites as `sites`; their data type and codec may
            differ. Heights of shards and sizes of batches are those of the archive.
        on_plan: As for `residua.capture_dataset`.
        more: Further arguments of `residua.capture_dataset`.

    Raises:
        PlanError: Model, data or settings differ from those of the archive, a site is in it already, or several
            processes were started.
        NotCapturedError: The archive is not finished.
        FileNotFoundError: There is no archive.
        As `residua.capture_dataset` otherwise.
    """
    out = Path(_checked_place(out))
    recover(out)
    archive = _finished(open_archive(out))
    adding = out.with_name(f".{out.name}.adding")
    chosen = replace(
        settings, rows_per_shard=archive.plan.rows_per_shard, batch_tokens=archive.plan.batch_tokens, head=False
    )

    def check(plan: Plan, rows: int) -> None:
        refuse_other_rows(archive, plan, "this run")
        on_plan(plan, rows)

    try:
        found = capture_dataset(model, dataset, out=adding, settings=chosen, on_plan=check, **more)
    except PlanError:
        if is_archive(adding) and read_metadata(adding).sealed is None and not any((adding / FOLDER).iterdir()):
            shutil.rmtree(adding)
        raise
    joined = join_sites(archive, found.archive)
    shutil.rmtree(adding)
    return replace(found, archive=joined)


def _checked_place(out: str | PathLike[str]) -> str | PathLike[str]:
    if is_remote(out):
        raise PlanError(
            f"{out} is an address, and sites are added to an archive in a folder: pull it, add, and push it"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PlanError(f"{named('add_sites')} runs in one process, and several were started: start one")
    return out


def _finished(archive: Archive) -> Archive:
    """Return the archive if its capture is finished and can be done again."""
    if archive.stacks:
        raise PlanError(
            f"{archive.path} holds the archives of several stacks, to which no sites can be added yet: capture all "
            "sites into a new archive"
        )
    refuse_replay(archive, "an addition of sites")
    if not archive.is_sealed:
        raise NotCapturedError(
            f"{archive.path} is not finished: run the same capture again without {named('add_sites')}, and add sites "
            "then"
        )
    if archive.plan.n_rows is None or not archive.plan.batch_tokens:
        raise PlanError(
            f"{archive.path} was recorded in a loop of its own, or taken from other archives, so its batches are not "
            "known: record the new sites in a loop like that"
        )
    return archive
