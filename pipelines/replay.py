"""Replaying a whole archive with edits, and telling per token and per example what they change.

Batches are those of the capture, as far as their examples are chosen. The run without edits starts as high as exact
stored rows allow, so that it costs the head alone where the last residual stream is stored.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedModel

from residua.capture.planbatch import PlanBatch
from residua.capture.replayer import Replayer
from residua.capture.replaynotes import unlike_the_plan
from residua.capture.rows import batch_rows
from residua.capture.samemodel import identity_here, running_as_captured
from residua.pipelines.captured_batches import schedule_of, whole_groups
from residua.pipelines.chosen_examples import ExampleChoice
from residua.pipelines.models import captured_model
from residua.pipelines.replay_record import begin_or_go_on
from residua.pipelines.replay_tables import EXAMPLES, TOKENS, Comparison, part_path, read_parts, token_table, write_part
from residua.store.archive import Archive
from residua.store.contentmark import content_mark
from residua.store.editparse import EditSource, is_reproducible, parse_edits
from residua.store.errors import CaptureError, NotCapturedError, PlanError
from residua.store.lock import locked
from residua.store.schedule import Schedule
from residua.store.texts import token_id


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """What a replay of an archive gave.

    Attributes:
        folder: Where the tables lie, and ``residua.json``, which says how they came about.
        n_examples: Examples in the tables.
        resumed: Whether an earlier run had begun.
        notes: What a reader of the tables has to know, one sentence each.
    """

    folder: Path
    n_examples: int
    resumed: bool
    notes: tuple[str, ...]

    @property
    def examples(self) -> pa.Table:
        """One line an example."""
        return read_parts(self.folder, EXAMPLES)

    @property
    def tokens(self) -> pa.Table:
        """One line a token."""
        return read_parts(self.folder, TOKENS)


def replay_dataset(
    model: str | PathLike[str] | PreTrainedModel,
    archive: Archive | str | PathLike[str],
    *,
    out: str | PathLike[str],
    edits: EditSource,
    at: str | Iterable[str] | None = None,
    examples: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    where: str | None = None,
    tokens: Sequence[int | str] = (),
    force: bool = False,
    device: str = "auto",
    command: str | None = None,
    on_example: Callable[[int, int], None] = lambda *_: None,
) -> ReplayResult:
    """Replay the examples of an archive with edits and without, and write what the edits change.

    A run that was killed goes on: finished parts stay, and the tables are the same as if nothing had happened.

    Args:
        model: The model that was captured: a transformers model, or a hub id or folder of one.
        archive: The archive, or its folder. Of one that is not sealed, the captured examples are taken.
        out: Folder of the result; if it is one of the same request, what is missing is computed.
        edits: Edits in order, as `residua.replay` takes them.
        at: Where stored rows go in; None runs the model in full.
        examples: Numbers of the examples; all unless given.
        rows: Rows of the archive; the examples that own them are taken.
        where: A condition such as ``label == "code"``; examples with a row that meets it are taken.
        tokens: Tokens whose logits are told: ids, or texts that are one token of the archive's tokenizer.
        force: Go on with a model that is not the one that was captured, and note it.
        device: Device of the model, if it is loaded here.
        command: The command line, for the provenance.
        on_example: Called with the examples done and in all.

    Returns:
        The tables, and what has to be said of them.

    Raises:
        PlanError: An edit does not fit, examples or rows do not exist, a text is no single token, the model is another,
            `out` holds another request.
        NotCapturedError: Nothing of what was asked for is captured yet.
        ArchiveInUseError: Another run is at work on `out`.

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
    loaded = captured_model(opened, model, device=device)
    with locked(Path(out)), running_as_captured(opened, loaded):
        runs = _Runs(schedule, loaded, Replayer(loaded, opened, at=places, edits=parsed, force=force), ids)
        idle = runs.check(chosen)
        request: dict[str, Any] = {
            "archive": opened.plan.digest,
            "model": {**opened.plan.model, **identity_here(loaded)[0]},  # with force=True it may be another
            "at": list(runs.edited.start.sites),
            "edits": [edit.to_json() for edit in parsed],
            "contents": {str(path): content_mark(path) for edit in parsed for path in edit.folders},
            **choice.to_json(),
            "tokens": ids,
            "force": force,
        }
        facts = {"reproducible": is_reproducible(parsed), "notes": [*runs.edited.notes, *idle], "command": command}
        resumed = begin_or_go_on(Path(out), request, facts)
        notes = (*idle, *runs.write(Path(out), chosen, on_example))
        runs.close()
    return ReplayResult(
        folder=Path(out), n_examples=int(chosen.sum()), resumed=resumed, notes=(*runs.edited.notes, *notes)
    )


def _captured(archive: Archive, schedule: Schedule) -> npt.NDArray[np.bool_]:
    """Say for each example whether its whole group is captured, so that the group's part can be written for good."""
    captured = np.zeros(len(archive.example_table), bool)
    for group in whole_groups(archive, schedule):
        captured[schedule.group(group)] = True
    return captured


class _Runs:
    """Runs the batches of an archive, edited and not."""

    def __init__(self, schedule: Schedule, model: PreTrainedModel, edited: Replayer, tokens: Sequence[int]) -> None:
        self.edited = edited
        self._archive = edited.archive
        self._schedule = schedule
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
        highest = Replayer(model, self._archive, at=[max(stored, key=_depth)])
        return None if highest.notes or highest.start.block <= self.edited.start.block else highest

    def check(self, chosen: npt.NDArray[np.bool_]) -> tuple[str, ...]:
        """Look at what all batches need before the first one runs; returns what has to be said of the edits."""
        groups = (self._batches(group, chosen) for group in range(self._schedule.n_shards))
        return self.edited.check(self.edited.batch(examples) for batches in groups for examples in batches)

    def _batches(self, group: int, chosen: npt.NDArray[np.bool_]) -> list[list[int]]:
        members = (batch.examples[chosen[batch.examples]] for batch in self._schedule.batches(group))
        return [found.tolist() for found in members if len(found)]

    def write(
        self, folder: Path, chosen: npt.NDArray[np.bool_], on_example: Callable[[int, int], None]
    ) -> tuple[str, ...]:
        """Write the parts that are not there yet; returns what has to be said of the batches."""
        done, total = 0, int(chosen.sum())
        notes: dict[str, str] = {}
        for group in range(self._schedule.n_shards):
            batches = self._batches(group, chosen)
            n_examples = sum(map(len, batches))
            if batches and not part_path(folder, EXAMPLES, group).exists():
                found: list[pa.Table] = []  # and not the logits, which would not fit
                for batch, examples in self._with_rows_ahead(batches):
                    found += self._compare(batch, examples, notes)
                    on_example(done + len(found), total)
                write_part(folder, group, found)
            done += n_examples
            on_example(done, total)
        return tuple(notes.values())

    def _with_rows_ahead(self, batches: Sequence[list[int]]) -> Iterator[tuple[PlanBatch, list[int]]]:
        """Yield each batch while the rows of the next one are read."""
        ahead = self.edited.batch(batches[0])
        for number, examples in enumerate(batches):
            batch = ahead
            if number + 1 < len(batches):
                ahead = self.edited.batch(batches[number + 1])
                for site in self.edited.start.sites:
                    self.edited.stored.prefetch(site, batch_rows(ahead.rows, ahead.n_positions).row)
            yield batch, examples

    def _compare(self, batch: PlanBatch, examples: Sequence[int], notes: dict[str, str]) -> Iterator[pa.Table]:
        other = unlike_the_plan(self._archive, examples)
        for kind, note in (("in full", self.edited.starts_at(batch)[1]), ("other batch", other)):
            if note:
                notes.setdefault(kind, note)  # the first of its kind speaks for all
        below = self.edited if self._top is None or other else self._top
        edited, unedited = self.edited.run(batch).logits, below.run(batch, edited=False).logits
        if edited is None or unedited is None:
            raise CaptureError("the model gave no logits: a replay of a whole archive needs all of it in this process")
        for example, logits, before in zip(batch.rows, edited, unedited, strict=True):
            yield token_table(Comparison(example=example, edited=logits, unedited=before), self._tokens)

    def close(self) -> None:
        """End the threads that read ahead."""
        for replayer in (self.edited, self._top):
            if replayer is not None:
                replayer.stored.close()


def _depth(site: str) -> float:
    return float("inf") if site == "final" else int(site.rpartition(".")[2])
