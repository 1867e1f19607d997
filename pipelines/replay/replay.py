"""Replaying a whole archive with edits, and telling per token and per example what they change.

Batches are those of the capture, as far as their examples are chosen. The run without edits starts as high as exact
stored rows allow, so that it costs the head alone where the last residual stream is stored.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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

from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.identity.provenance import running_as_captured
from residua.capture.recording.record import RecordStats
from residua.capture.replay.engine import Replayer
from residua.capture.replay.notes import batch_note
from residua.pipelines.capture.captured_batches import schedule_of, whole_groups
from residua.pipelines.jobs.sharing import SharedWork, sharing
from residua.pipelines.replay.capture import ARCHIVE, ReplayCapture
from residua.pipelines.replay.parts import Compared, ReplayParts, write_parts
from residua.pipelines.replay.record import begin_or_go_on, check_request
from residua.pipelines.replay.tables import EXAMPLES, TOKENS, Comparison, read_parts, token_table
from residua.pipelines.setup.models import replayed_model
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.errors import CaptureError, NotCapturedError, PlanError
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
        return read_parts(self.folder, EXAMPLES)

    @property
    def tokens(self) -> pa.Table:
        """One line a token."""
        return read_parts(self.folder, TOKENS)


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
    places = [] if at is None else [at] if isinstance(at, str) else list(at)
    schedule = schedule_of(opened)
    choice = ExampleChoice(examples=examples, rows=rows, where=where)
    chosen = choice.of(opened) & _captured(opened, schedule)
    ids = [token if isinstance(token, int) else token_id(opened.tokenizer, token) for token in tokens]
    if not chosen.any():
        raise NotCapturedError(f"{opened.path} has none of these examples whole yet: run the capture first")
    folder, settings = Path(out), CaptureSettings(device=device, tp=tp, pp=pp)
    parts = ReplayParts(folder, schedule, chosen)
    with ExitStack() as stack:
        membership = stack.enter_context(sharing(folder, settings))
        loaded = stack.enter_context(replayed_model(opened, model, settings))
        stack.enter_context(running_as_captured(opened, loaded))
        shared = SharedWork(membership, loaded, alike=True)
        runs = _Runs(loaded, Replayer(loaded, opened, at=places, edits=parsed, force=force), ids)
        stack.callback(runs.close)
        idle = runs.edited.check(
            runs.edited.batch(batch) for part in range(len(parts)) for batch in parts.batches(part)
        )
        replayed: dict[str, Any] = {
            "archive": opened.plan.digest,
            "at": list(runs.edited.start.sites),
            "edits": [edit.to_json() for edit in parsed],
            "contents": {str(path): content_hash(path) for edit in parsed for path in edit.folders},
        }
        request: dict[str, Any] = {
            **replayed,
            "model": {**opened.plan.model, **runs.edited.checked.identity},  # with force=True it may be another
            **choice.to_json(),
            "tokens": ids,
            "force": force,
        }
        said_of_edits = [*runs.edited.notes, *idle]
        facts: dict[str, Any] = {"reproducible": is_reproducible(parsed), "notes": said_of_edits, "command": command}
        following = (
            None
            if capture is None
            else ReplayCapture(runs.edited, capture, np.flatnonzero(chosen), replay=replayed, facts=facts)
        )
        said = shared.plan_once(
            lambda: {"resumed": begin_or_go_on(folder, request, facts)}, lambda: check_request(folder, request)
        )
        notes = write_parts(parts, runs, shared, on_example)
        found = None if following is None else following.run(folder / ARCHIVE, membership, on_plan, on_batch)
    return ReplayResult(
        folder=folder,
        n_examples=int(chosen.sum()),
        resumed=said["resumed"],
        notes=(*said_of_edits, *notes, *(() if found is None else found.notes)),
        archive=None if found is None else found.archive,
    )


def _captured(archive: Archive, schedule: Schedule) -> npt.NDArray[np.bool_]:
    """Say for each example whether its whole group is captured, so that the group's part can be written for good."""
    captured = np.zeros(len(archive.example_table), bool)
    for group in whole_groups(archive, schedule):
        captured[schedule.group(group)] = True
    return captured


class _Runs:
    """Runs the batches of an archive, edited and not."""

    def __init__(self, model: PreTrainedModel, edited: Replayer, tokens: Sequence[int]) -> None:
        self.edited = edited
        self._archive = edited.archive
        self._tokens = tokens
        self._top = self._highest(model)
        vocabulary = model.config.get_text_config().vocab_size
        if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
            raise PlanError(f"logits of the tokens {wrong[:3]} were asked for: the model has {vocabulary:,}, from 0")

    def _highest(self, model: PreTrainedModel) -> Replayer | None:
        """Return what starts the run without edits above the edits' own start; None where that would not be exact."""
        stored = [name for name in self._archive.sites if name.startswith(("resid_post.", "final"))]
        if not stored or self.edited.notes:
            return None
        highest = Replayer(model, self._archive, at=[max(stored, key=_depth)], checked=self.edited.checked)
        return None if highest.notes or highest.start.block <= self.edited.start.block else highest

    def batches(self, examples: Sequence[list[int]]) -> Iterator[PlanBatch]:
        """Yield each batch of some examples while the rows of the next one are read."""
        ahead = self.edited.batch(examples[0])
        for number in range(len(examples)):
            batch = ahead
            if number + 1 < len(examples):
                ahead = self.edited.batch(examples[number + 1])
                self.edited.prefetch(ahead)
            yield batch

    def compare(self, batch: PlanBatch, *, is_leader: bool) -> Compared:
        """Run a batch twice, edited and not.

        Args:
            batch: The batch.
            is_leader: Whether the tables are wanted here, and not in another process with the same replica.
        """
        other = batch_note(self._archive, [example.example for example in batch.rows])
        below = self.edited if self._top is None or other else self._top
        if below is not self.edited:
            below.prefetch(batch)  # while the edited run is at work
        edited, unedited = self.edited.run(batch).logits, below.run(batch, edited=False).logits
        if not is_leader:
            return Compared([], {})
        if edited is None or unedited is None:
            raise CaptureError("the model gave no logits: a replay of a whole archive needs all of it in this process")
        pairs = zip(batch.rows, edited, unedited, strict=True)
        lines = [token_table(Comparison(example=e, edited=new, unedited=old), self._tokens) for e, new, old in pairs]
        notes = {"in full": self.edited.skip(batch).problem, "other batch": other}
        return Compared(lines, {kind: note for kind, note in notes.items() if note})

    def close(self) -> None:
        """End the threads that read ahead."""
        for replayer in (self.edited, self._top):
            if replayer is not None:
                replayer.stored.close()


def _depth(site: str) -> float:
    return float("inf") if site == "final" else int(site.rpartition(".")[2])
