"""`residua.replay_dataset`: the examples of an archive replayed with edits, and tables of what the edits change.

Batches are those of the capture, without the examples that are not chosen. `comparison` runs a batch with the edits and
without, `result_folder` holds the tables, and `capture` makes the archive of what follows, if it is asked for.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers import PreTrainedModel

from residua.capture.identity.padding import runs_alike
from residua.capture.identity.provenance import running_as_captured
from residua.capture.recording.stats import RecordStats
from residua.capture.replay.engine import Replayer
from residua.pipelines.capture.captured_batches import captured_groups, schedule_of
from residua.pipelines.jobs.sharing import SharedWork
from residua.pipelines.jobs.workers import working_together
from residua.pipelines.replay.capture import ARCHIVE, ReplayCapture
from residua.pipelines.replay.comparison import Comparison
from residua.pipelines.replay.result_folder import (
    EXAMPLES,
    TOKENS,
    TableFiles,
    begin_or_resume,
    check_request,
    note,
    read_table,
    write_files,
)
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import replayed_model
from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.base.naming import named
from residua.store.edits.contents import contents_of
from residua.store.edits.parser import EditSource, is_reproducible, parse_edits
from residua.store.examples.schedule import Schedule
from residua.store.format.plan import Plan
from residua.store.read.archive import Archive
from residua.store.read.stacks import archives_of, main_archive, open_archive
from residua.store.read.text import token_id
from residua.store.selection.examples import ExampleChoice
from residua.store.storage.destination import Destination, DiskFolder
from residua.store.storage.place import try_result_place


@dataclass(frozen=True, kw_only=True, repr=False)
class ReplayResult:
    """The results of a replay of an archive.

    Attributes:
        folder: The folder of the tables and of ``residua.json``, which says how they were made, or its address.
        n_examples: Number of examples in the tables.
        resumed: Whether this run resumed an earlier one.
        notes: What a reader of the tables has to know, one sentence each.
        archive: The archive of what follows, if it was asked for.
    """

    folder: Path | str
    n_examples: int
    resumed: bool
    notes: tuple[str, ...]
    archive: Archive | None = None
    _out: Destination

    def __repr__(self) -> str:
        return f"<ReplayResult {self.folder}: {self.n_examples:,} examples, {len(self.notes)} notes>"

    @property
    def examples(self) -> pa.Table:
        """One line per example."""
        return read_table(self._out, EXAMPLES)

    @property
    def tokens(self) -> pa.Table:
        """One line per token."""
        return read_table(self._out, TOKENS)


def replay_dataset(
    model: str | PathLike[str] | PreTrainedModel | PipelineScheduleSingle,
    archive: Archive | str | PathLike[str],
    *,
    out: str | PathLike[str],
    edits: EditSource = (),
    at: str | Iterable[str] | None = None,
    capture: str | Iterable[str] | None = None,
    dtype: str | None = None,
    codec: str | None = None,
    examples: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    where: str | None = None,
    tokens: Sequence[int | str] = (),
    force: bool = False,
    device: str = "auto",
    tp: int = 1,
    pp: int = 1,
    command: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_example: Callable[[int, int], None] = lambda *_: None,
    on_plan: Callable[[Plan, int], None] = lambda *_: None,
    on_batch: Callable[[RecordStats], None] = lambda _: None,
) -> ReplayResult:
    """Replay the examples of an archive with edits and without, and write what the edits change.

    The same call resumes a run that was killed: finished files stay, and the tables are the same as those of one run.
    If every process of a distributed launch calls it, each with its own replica of the model, they share the files;
    see docs/distributed.md.

    Args:
        model: The model that was captured: a transformers model, or a hub id or folder of one; or the schedule of a
            torch pipeline, as `residua.replay` takes it.
        archive: The archive, or its path or address. If it is not sealed, the captured examples are replayed.
        out: Folder of the results, or its address in a bucket; if it holds results of the same request, the missing
            ones are computed.
        edits: Edits in order, as `residua.replay` takes them.
        at: Where stored rows go in; None runs the model in full.
        capture: Sites whose activations in the edited run are captured, for the chosen examples, into the archive
            ``acts.zarr`` in `out`.
        dtype: Data type in which they are stored; that of the replayed archive unless given.
        codec: Their codec preset; that of the replayed archive unless given.
        examples: Numbers of the examples to replay; all unless given.
        rows: Rows of the archive; the examples that own them are replayed.
        where: A condition such as ``label == "code"``; the examples with a row that meets it are replayed.
        tokens: Tokens whose logits the tables report: ids, or texts that are one token of the archive's tokenizer.
        force: Accept a model that is not the captured one, and note it.
        device: Device of the model, if it is loaded here.
        tp: Number of processes of tensor parallelism, if it is loaded here.
        pp: Number of pipeline stages, if it is loaded here.
        command: The command line, for the provenance.
        storage_options: For addresses, as for `residua.open`.
        on_example: Called with the numbers of finished examples and of all; on the first process those of all
            processes.
        on_plan: Called with the plan of the new archive, and the number of rows that are committed already.
        on_batch: Called after every batch with the figures of the capture.

    Returns:
        The tables, notes on them, and the archive.

    Raises:
        PlanError: An edit does not fit, examples or rows do not exist, a text is not one token, the model is another
            one, or `out` holds the results of another request.
        NotCapturedError: None of the chosen examples is captured yet.
        ArchiveInUseError: Another run works on `out`.
        CaptureError: The model gave no logits, or another process that shares the work is gone.
        OSError: The place `out` cannot be written; with `capture` also if it has no hard links, or too little free
            space. This is found out before anything is computed.

    Example:
        >>> found = residua.replay_dataset(  # doctest: +SKIP
        ...     "models/pydoc-1m", "acts.zarr", out="ablated", at="resid_post.1", edits="ablate.yaml"
        ... )
        >>> found.examples["loss_change"]  # doctest: +SKIP
    """
    stored = open_archive(archive, storage_options=storage_options)
    opened = main_archive(stored)
    parsed = parse_edits(edits)
    schedule = schedule_of(opened)
    choice = ExampleChoice(examples=examples, rows=rows, where=where)
    chosen = choice.of(opened) & _captured(opened, schedule)
    ids = [token if isinstance(token, int) else token_id(opened.tokenizer, token) for token in tokens]
    if not chosen.any():
        raise NotCapturedError(f"{opened.place} has none of these examples completely yet: run the capture first")
    if capture is None and (dtype or codec):
        raise PlanError(
            f"{named('dtype' if dtype else 'codec')} says how captured sites are stored, and none are: give "
            f"{named('capture')}, or leave it out"
        )
    place = try_result_place(out, storage_options, locks=True, links=capture is not None)
    settings = CaptureSettings(device=device, tp=tp, pp=pp)
    files = TableFiles(place.out, schedule, chosen)
    with ExitStack() as stack:
        membership = stack.enter_context(working_together(place.out, settings, job="replay"))
        loaded = stack.enter_context(replayed_model(opened, model, settings))
        for one in archives_of(stored):
            stack.enter_context(running_as_captured(one, loaded))
        shared = SharedWork(membership, loaded, alike=runs_alike(loaded))
        replayer = Replayer(loaded, stored, at=at, edits=parsed, force=force)
        comparison = Comparison(loaded, replayer, ids)
        stack.callback(comparison.close)
        taken = np.flatnonzero(chosen)
        if replayer.recorded.has_others:
            replayer.recorded.require(taken.tolist())
        replayer.check(replayer.batch(files.batches(0)[0]))  # before anything runs; later batches when it is their turn
        replayed: dict[str, Any] = {
            "archive": opened.plan.digest,
            **_other_stacks(stored, opened),
            "at": list(replayer.start.sites),
            "edits": [edit.to_json() for edit in parsed],
            "contents": contents_of(parsed),
        }
        request: dict[str, Any] = {
            **replayed,
            "model": {**opened.plan.model, **replayer.checked.identity},  # with force=True it may be another
            **choice.to_json(),
            "tokens": ids,
            "force": force,
        }
        facts: dict[str, Any] = {"reproducible": is_reproducible(parsed), "command": command}
        following = (
            None
            if capture is None
            else ReplayCapture(
                replayer,
                capture,
                taken,
                place.out.inside(ARCHIVE),
                replay=replayed,
                facts=facts,
                dtype=dtype,
                codec=codec,
            )
        )
        planned = shared.plan_once(
            lambda: {"resumed": begin_or_resume(place.out, request, {**facts, "notes": [*replayer.notes]})},
            lambda: check_request(place.out, request),
        )
        notes = write_files(files, comparison, shared, on_example)
        edit_notes = [*replayer.notes, *notes.edits]
        if membership is None or not membership.number:
            note(place.out, [*edit_notes, *notes.batches])
        found = None if following is None else following.capture(membership, edit_notes, on_plan, on_batch)
    return ReplayResult(
        folder=place.out.path if isinstance(place.out, DiskFolder) else str(place.out),
        n_examples=int(chosen.sum()),
        resumed=planned["resumed"],
        notes=(*place.notes, *edit_notes, *notes.batches, *(() if following is None else following.notes)),
        archive=found,
        _out=place.out,
    )


def _other_stacks(archive: Archive, main: Archive) -> dict[str, dict[str, str]]:
    """Return the plans of the stacks beside the main one, whose rows a replay may put in."""
    others = {name: one.plan.digest for name, one in archive.stacks.items() if one is not main}
    return {"stacks": others} if others else {}


def _captured(archive: Archive, schedule: Schedule) -> npt.NDArray[np.bool_]:
    """Return for each example whether its group is captured completely, so that the group's file is final."""
    captured = np.zeros(len(archive.example_table), bool)
    for group in captured_groups(archive, schedule):
        captured[schedule.group(group)] = True
    return captured
