"""What a replay changes: a batch runs with the edits and without, and every token of the two runs is compared.

The run without edits starts as high as exact stored rows allow: where the last residual stream is stored, it costs the
LM head alone. Results are tables, one line per token and one line per example; docs/replay.md lists their columns.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor, float32
from transformers import PreTrainedModel

from residua.capture.buffers.row_index import ExampleRows
from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.identity.prediction import no_loss, prediction_of
from residua.capture.replay.engine import Replayer
from residua.capture.replay.metrics import token_changes
from residua.capture.replay.notes import Reach
from residua.store.base.errors import PlanError
from residua.store.format.site_names import parse_site

_MEANS = ("kl", "loss", "unedited_loss", "loss_change", "top1_agrees")
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class Compared(NamedTuple):
    """The results of a batch: tables of its examples' tokens, notes for the reader by their kind, what edits reach."""

    tables: list[pa.Table]
    notes: dict[str, str]
    reach: Reach


class Comparison:
    """Runs batches of an archive with the edits and without.

    Args:
        model: The model inside wrappers.
        edited: The replayer with the edits.
        tokens: Token ids whose logits are reported.

    Raises:
        PlanError: The model has no such token, or has no logits of tokens.
    """

    def __init__(self, model: PreTrainedModel, edited: Replayer, tokens: Sequence[int]) -> None:
        self._edited = edited
        self._tokens = tokens
        if edited.gives_example_logits:
            raise PlanError(
                f"{type(model).__name__} gives logits of an example as a whole, and these results have one line for "
                "each token: replay its examples with residua.replay, which gives their logits"
            )
        if edited.lacks_logits:
            raise PlanError(edited.lacks_logits)
        self._has_loss = not no_loss(edited.model, prediction_of(edited.model))
        self._unedited = self._highest_start(model) or edited
        vocabulary = model.config.get_text_config().vocab_size
        if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
            raise PlanError(f"logits of the tokens {wrong[:3]} were asked for: the model has {vocabulary:,}, from 0")

    def _highest_start(self, model: PreTrainedModel) -> Replayer | None:
        """Return the replayer that starts at the highest stored residual stream; None if it would gain nothing."""
        archive = self._edited.archive
        stored = [name for name in archive.sites if parse_site(name).kind in ("resid_post", "final")]
        if not stored or self._edited.notes:
            return None
        highest = Replayer(model, archive, at=max(stored, key=_height), checked=self._edited.checked)
        is_exact_and_higher = not highest.notes and highest.start.n_blocks_below > self._edited.start.n_blocks_below
        return highest if is_exact_and_higher else None

    def batches(self, examples: Sequence[list[int]]) -> Iterator[PlanBatch]:
        """Yield the batch of each list of examples; the rows of the next one are read meanwhile."""
        return self._edited.prefetching(map(self._edited.batch, examples), lambda batch: batch)

    def compare(self, batch: PlanBatch, *, is_leader: bool) -> Compared:
        """Run a batch with the edits and without.

        Args:
            batch: The batch.
            is_leader: Whether this process of those that hold the model together makes the tables.

        Raises:
            CaptureError: The model gave no logits.
        """
        of_batch = self._edited.batch_notes(batch)
        unedited = self._edited if "other batch" in of_batch else self._unedited
        if unedited is not self._edited:
            unedited.prefetch(batch)  # while the edited run is under way
        after, before = self._edited.run(batch), unedited.run(batch, edited=False)
        if not is_leader:
            return Compared([], {}, Reach([], 0))
        pairs = zip(batch.rows, after.require_logits(), before.require_logits(), strict=True)
        tables = [
            _token_table(example, after_TV, before_TV, self._tokens, has_loss=self._has_loss)
            for example, after_TV, before_TV in pairs
        ]
        notes = {"in full": self._edited.skip(batch).problem, **of_batch}
        return Compared(tables, {kind: note for kind, note in notes.items() if note}, self._edited.reach(batch))

    def reach_notes(self, reach: Reach) -> list[str]:
        """Return one sentence for each edit that changes none of the tokens, and one if next tokens have no logit."""
        return self._edited.reach_notes(reach)

    def close(self) -> None:
        """End the threads that read ahead."""
        self._edited.rows.close()
        self._unedited.rows.close()


def _height(site: str) -> float:
    layer = parse_site(site).layer
    return float("inf") if layer is None else layer


def _token_table(
    example: ExampleRows, edited_TV: Tensor, unedited_TV: Tensor, tokens: Sequence[int], *, has_loss: bool
) -> pa.Table:
    """Return one line for each token of an example."""
    n_tokens = len(example.input_ids)
    row = np.full(n_tokens, -1, np.int64)
    row[example.positions] = example.first_row + np.arange(len(example.positions))
    divergences, losses, unedited_losses = map(_numbers, token_changes(unedited_TV, edited_TV, example))
    lacks = (example.input_ids[1:] >= edited_TV.shape[-1]) | (
        not has_loss
    )  # in an LM head that is smaller than the vocabulary
    columns = {
        "example": pa.array(np.full(n_tokens, example.example, np.int64)),
        "position": pa.array(np.arange(n_tokens, dtype=np.int32)),
        "row": pa.array(row, mask=row < 0),
        "token": pa.array(example.input_ids.astype(np.int32)),
        "kl": pa.array(divergences),
        "loss": _of_next_token(losses, lacks),
        "unedited_loss": _of_next_token(unedited_losses, lacks),
        "loss_change": _of_next_token(losses - unedited_losses, lacks),
        "top1_agrees": pa.array(_top1(edited_TV) == _top1(unedited_TV)),
    }
    for token in tokens:
        edited, unedited = (_numbers(logits_TV[:, token]) for logits_TV in (edited_TV, unedited_TV))
        columns[f"logit_{token}"] = pa.array(edited)
        columns[f"logit_{token}_change"] = pa.array(edited - unedited)
    return pa.table(columns)


def _top1(logits_TV: Tensor) -> npt.NDArray[np.int64]:
    if logits_TV.device.type == "cpu" and logits_TV.dtype == float32:
        found: npt.NDArray[np.int64] = logits_TV.numpy().argmax(-1)  # ten times as fast as torch's own
        return found
    return logits_TV.argmax(-1).cpu().numpy()


def _numbers(values: Tensor) -> Floats:
    return values.float().cpu().numpy()


def _of_next_token(losses: Floats, lacks: npt.NDArray[np.bool_]) -> pa.Array:
    """Return losses as a column; it is null where `lacks` says so, and at the last token, which has no next one."""
    return pa.array(np.append(losses, np.float32(0)), pa.float32(), mask=np.append(lacks, True))


def example_table(token_tables: Sequence[pa.Table]) -> pa.Table:
    """Return one line for each example: means over the tokens that have a value, and the largest KL.

    Args:
        token_tables: The table of the tokens of each example.
    """
    lines = [_example_line(tokens) for tokens in token_tables]
    types = {name: pa.int64() if name in ("example", "n_tokens") else pa.float64() for name in lines[0]}
    return pa.Table.from_pylist(lines, schema=pa.schema(list(types.items())))


def _example_line(tokens: pa.Table) -> dict[str, float | int | None]:
    changes = [name for name in tokens.column_names if name.endswith("_change") and name.startswith("logit_")]
    line: dict[str, float | int | None] = {"example": tokens["example"][0].as_py(), "n_tokens": tokens.num_rows}
    for name in (*_MEANS, *changes):
        values = tokens[name].drop_null().to_numpy().astype(np.float64)
        line["top1_agreement" if name == "top1_agrees" else name] = float(values.mean()) if len(values) else None
    line["kl_max"] = float(tokens["kl"].to_numpy().max())
    return line
