"""Replaying a whole archive with edits, and telling per token and per example what they change.

Batches are those of the capture, as far as their examples are chosen. The run without edits starts as high as exact
stored rows allow, so that it costs the head alone where the last residual stream is stored.
"""

from collections.abc import Callable, Iterable, Sequence
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

from residua.capture.identity.provenance import running_as_captured
from residua.capture.recording.stats import RecordStats
from residua.capture.replay.engine import Replayer
from residua.pipelines.capture.captured_batches import schedule_of, whole_groups
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
    read_table,
    write_files,
)
from residua.pipelines.setup.models import replayed_model
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.errors import NotCapturedError
from residua.store.edits.parser import EditSource, is_reproducible, parse_edits
from residua.store.examples.schedule import Schedule
from residua.store.format.commits import content_hash
from residua.store.format.plan import Plan
from residua.store.read.archive import Archive
from residua.store.read.text import token_id
from residua.store.selection.examples import ExampleChoice


@dataclass(frozen=True, kw_only=True, repr=False)
class ReplayResult:
    """What a replay of an archive gave.

    Attributes:
        folder: Where the tables lie, and ``residua.json``, which says how they came about.
        n_examples: Examples in the tables.
        resumed: Whether an earlier run had begun.
        notes: What a reader of the tables has to know, one sentence each.
        archive: The archive of what follows, if it was asked for.
    """

    folder: Path
    n_examples: int
    resumed: bool
    notes: tuple[str, ...]
    archive: Archive | None = None

    def __repr__(self) -> str:
        return f"<ReplayResult {self.folder}: {self.n_examples:,} examples, {len(self.notes)} notes>"

    @property
    def examples(self) -> pa.Table:
        """One line an example."""
        return read_table(self.folder, EXAMPLES)

    @property
    def tokens(self) -> pa.Table:
        """One line a token."""
        return read_table(self.folder, TOKENS)


def replay_dataset(
    model: str | PathLike[str] | PreTrainedModel | PipelineScheduleSingle,
    archive: Archive | str | PathLike[str],
    *,
    out: str | PathLike[str],
    edits: EditSource = (),
    at: str | Iterable[str] | None = None,
    capture: str | Iterable[str] | None = None,
    examples: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    where: str | None = None,
    tokens: Sequence[int | str] = (),
    force: bool = False,
    device: str = "auto",
    tp: int = 1,
    pp: int = 1,
    command: str | None = None,
    on_example: Callable[[int, int], None] = lambda *_: None,
    on_plan: Callable[[Plan, int], None] = lambda *_: None,
    on_batch: Callable[[RecordStats], None] = lambda _: None,
) -> ReplayResult:
    """Replay the examples of an archive with edits and without, and write what the edits change.

    A run that was killed goes on: finished parts stay, and the tables are the same as if nothing had happened. Called
    by every process of a distributed launch, each with its own replica of the model, they share the parts; see
    docs/distributed.md.

    Args:
        model: The model that was captured: a transformers model, or a hub id or folder of one; or the schedule of a
            torch pipeline, as `residua.replay` takes it.
        archive: The archive, or its folder. Of one that is not sealed, the captured examples are taken.
        out: Folder of the result; if it is one of the same request, what is missing is computed.
        edits: Edits in order, as `residua.replay` takes them.
        at: Where stored rows go in; None runs the model in full.
        capture: Sites whose activations in the edited run are captured too, into the archive ``acts.zarr`` in `out`,
            for the chosen examples.
        examples: Numbers of the examples; all unless given.
        rows: Rows of the archive; the examples that own them are taken.
        where: A condition such as ``label == "code"``; examples with a row that meets it are taken.
        tokens: Tokens whose logits are told: ids, or texts that are one token of the archive's tokenizer.
        force: Go on with a model that is not the one that was captured, and note it.
        device: Device of the model, if it is loaded here.
        tp: Over how many processes it is then split by tensor parallelism.
        pp: Over how many it is split as a pipeline.
        command: The command line, for the provenance.
        on_example: Called with the examples done and in all; with those of all processes, on the first.
        on_plan: Called with the plan of the archive that is captured, and the rows that are committed already.
        on_batch: Called with the figures of that capture after every batch.

    Returns:
        The tables, what has to be said of them, and the archive.

    Raises:
        PlanError: An edit does not fit, examples or rows do not exist, a text is no single token, the model is another,
            `out` holds another request.
        NotCapturedError: Nothing of what was asked for is captured yet.
        ArchiveInUseError: Another run is at work on `out`.
        CaptureError: The model gave no logits, or another process that shares the work is gone.

    Example:
        >>> found = residua.replay_dataset(  # doctest: +SKIP
        ...     "models/pydoc-1m", "acts.zarr", out="ablated", at="resid_post.1", edits="ablate.yaml"
        ... )
        >>> found.examples["loss_change"]  # doctest: +SKIP
    """
    opened = archive if isinstance(archive, Archive) else Archive(archive)
    parsed = parse_edits(edits)
    schedule = schedule_of(opened)
    choice = ExampleChoice(examples=examples, rows=rows, where=where)
    chosen = choice.of(opened) & _captured(opened, schedule)
    ids = [token if isinstance(token, int) else token_id(opened.tokenizer, token) for token in tokens]
    if not chosen.any():
        raise NotCapturedError(f"{opened.path} has none of these examples whole yet: run the capture first")
    folder, settings = Path(out), CaptureSettings(device=device, tp=tp, pp=pp)
    files = TableFiles(folder, schedule, chosen)
    with ExitStack() as stack:
        membership = stack.enter_context(working_together(folder, settings))
        loaded = stack.enter_context(replayed_model(opened, model, settings))
        stack.enter_context(running_as_captured(opened, loaded))
        shared = SharedWork(membership, loaded, alike=True)
        replayer = Replayer(loaded, opened, at=at, edits=parsed, force=force)
        comparison = Comparison(loaded, replayer, ids)
        stack.callback(comparison.close)
        idle = replayer.check(replayer.batch(examples) for batches in files.batches for examples in batches)
        replayed: dict[str, Any] = {
            "archive": opened.plan.digest,
            "at": list(replayer.start.sites),
            "edits": [edit.to_json() for edit in parsed],
            "contents": {str(path): content_hash(path) for edit in parsed for path in edit.folders},
        }
        request: dict[str, Any] = {
            **replayed,
            "model": {**opened.plan.model, **replayer.checked.identity},  # with force=True it may be another
            **choice.to_json(),
            "tokens": ids,
            "force": force,
        }
        edit_notes = [*replayer.notes, *idle]
        facts: dict[str, Any] = {"reproducible": is_reproducible(parsed), "notes": edit_notes, "command": command}
        taken = np.flatnonzero(chosen)
        following = (
            None
            if capture is None
            else ReplayCapture(replayer, capture, taken, folder / ARCHIVE, replay=replayed, facts=facts)
        )
        planned = shared.plan_once(
            lambda: {"resumed": begin_or_resume(folder, request, facts)}, lambda: check_request(folder, request)
        )
        notes = write_files(files, comparison, shared, on_example)
        found = None if following is None else following.capture(membership, on_plan, on_batch)
    return ReplayResult(
        folder=folder,
        n_examples=int(chosen.sum()),
        resumed=planned["resumed"],
        notes=(*edit_notes, *notes, *(() if following is None else following.notes)),
        archive=found,
    )


def _captured(archive: Archive, schedule: Schedule) -> npt.NDArray[np.bool_]:
    """Say for each example whether its whole group is captured, so that the group's part can be written for good."""
    captured = np.zeros(len(archive.example_table), bool)
    for group in whole_groups(archive, schedule):
        captured[schedule.group(group)] = True
    return captured
