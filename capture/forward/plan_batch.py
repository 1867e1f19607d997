"""Examples of an archive as one padded batch, as its plan says: their tokens, the padding, and where rows lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from residua.capture.buffers.row_index import ExampleRows
from residua.capture.forward.example_inputs import ExampleInputs, InputSource, joined
from residua.capture.forward.inputs import PaddedBatch, padded_batch
from residua.store.base.errors import CaptureError
from residua.store.examples.index import SOURCE_IDS
from residua.store.examples.memory import Examples


@dataclass(frozen=True, kw_only=True)
class PlanBatch:
    """Examples that run together.

    Attributes:
        padded: Their tokens, padded to one length.
        rows: Per example, in batch order, its tokens, its kept positions, and where these lie in the batch.
        inputs: What goes into the model beside tokens and mask, by name: a tensor with an entry for each example, for
            each position of each, or for each image or patch (those are not cut into microbatches).
        source: In a decoder, the batch of each example's source, with the positions of the encoder.
    """

    padded: PaddedBatch
    rows: list[ExampleRows]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    source: "PlanBatch | None" = None

    @property
    def n_positions(self) -> int:
        """Length of the batch, padding included."""
        return int(self.padded.input_ids.shape[1])

    def of_stack(self, stack: str) -> "PlanBatch":
        """Return the batch that has the positions of a stack: of a decoder's, the sources for the encoder."""
        return self.source if stack == "encoder" and self.source is not None else self


def microbatches(batch: PlanBatch, n: int) -> list[PlanBatch]:
    """Cut a batch into at most `n` microbatches of full examples, as torch's schedules do."""
    cuts = np.array_split(np.arange(len(batch.rows)), min(n, len(batch.rows)))
    return [_cut(batch, slice(int(examples[0]), int(examples[-1]) + 1)) for examples in cuts]


def _cut(batch: PlanBatch, examples: slice) -> PlanBatch:
    padded = batch.padded
    return PlanBatch(
        padded=PaddedBatch(input_ids=padded.input_ids[examples], attention_mask=padded.attention_mask[examples]),
        rows=batch.rows[examples],
        inputs={name: tensor[examples] for name, tensor in batch.inputs.items()},
        source=None if batch.source is None else _cut(batch.source, examples),
    )


def one_by_one(batch: PlanBatch) -> list[PlanBatch]:
    """Return each example of a batch as a batch of its own, without padding."""
    return [some_of(batch, [number]) for number in range(len(batch.rows))]


def some_of(batch: PlanBatch, places: Sequence[int]) -> PlanBatch:
    """Return some examples of a batch, by their places in it, as a batch that is padded to the longest of them."""
    chosen = [batch.rows[place] for place in places]
    span = slice(
        min(int(example.padded[0]) for example in chosen), max(int(example.padded[-1]) for example in chosen) + 1
    )
    index = torch.tensor(list(places), device=batch.padded.input_ids.device)
    padded = PaddedBatch(
        input_ids=batch.padded.input_ids[index, span], attention_mask=batch.padded.attention_mask[index, span]
    )
    inputs = {name: tensor[index] for name, tensor in batch.inputs.items()}
    return PlanBatch(
        padded=padded,
        rows=[replace(example, padded=example.padded - span.start) for example in chosen],
        inputs={name: tensor if tensor.ndim == 1 else tensor[:, span] for name, tensor in inputs.items()},
        source=None if batch.source is None else some_of(batch.source, places),
    )


def plan_batch(
    table: Examples, examples: Sequence[int], *, side: Literal["left", "right"], device: torch.device
) -> PlanBatch:
    """Return the batch of `examples` in the order given, padded on `side`, as tensors on `device`.

    Sources are padded on the right, and have no rows: these are in an archive of their own.
    """
    contents = table.batch(examples)
    padded = padded_batch([input_ids for input_ids, _ in contents], side=side, device=device)
    sources = table.lists(SOURCE_IDS, examples) if SOURCE_IDS in table.column_types() else None
    n_positions = padded.input_ids.shape[1]
    first_row = table.index().first_row
    rows = [
        ExampleRows(
            example=number,
            first_row=int(first_row[number]),
            input_ids=input_ids,
            positions=positions,
            padded=np.arange(len(input_ids), dtype=np.int64) + (n_positions - len(input_ids) if side == "left" else 0),
            source=None if sources is None else np.arange(len(sources[place]), dtype=np.int64),
        )
        for place, (number, (input_ids, positions)) in enumerate(zip(examples, contents, strict=True))
    ]
    source = None if sources is None else _of_sources(examples, sources, device)
    return PlanBatch(padded=padded, rows=rows, source=source)


def _of_sources(
    examples: Sequence[int], sources: Sequence[npt.NDArray[np.signedinteger[Any]]], device: torch.device
) -> PlanBatch:
    rows = [
        ExampleRows(
            example=number,
            first_row=0,
            input_ids=ids.astype(np.int32),
            positions=np.zeros(0, np.int32),
            padded=np.arange(len(ids), dtype=np.int64),
        )
        for number, ids in zip(examples, sources, strict=True)
    ]
    return PlanBatch(padded=padded_batch(sources, device=device), rows=rows)


def batches_with_inputs(
    table: Examples,
    examples: Sequence[int],
    source: InputSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    alone: bool = False,
) -> list[PlanBatch]:
    """Return the examples of a batch as one batch for each kind of inputs beside tokens, padded on the right.

    Args:
        table: The examples.
        examples: Their numbers, in batch order.
        source: Makes what they have beside tokens.
        device: Device of the tensors.
        dtype: The model's.
        alone: Whether each example is a batch of its own.

    Raises:
        CaptureError: An example has other tokens now than when the capture was planned.
    """
    kinds: dict[object, list[tuple[int, ExampleInputs]]] = {}
    for number in examples:
        found = source.of(number)
        if not np.array_equal(found.input_ids, table.tokens(number)):
            raise CaptureError(
                f"example {number} has {len(found.input_ids)} positions or other tokens now, and "
                f"{len(table.tokens(number))} when the capture was planned: was the processor changed meanwhile?"
            )
        kinds.setdefault(number if alone else found.signature, []).append((number, found))
    batches = []
    for alike in kinds.values():
        batch = plan_batch(table, [number for number, _ in alike], side="right", device=device)
        inputs = joined([found for _, found in alike], batch.n_positions, device=device, dtype=dtype)
        rows = [replace(row, columns=found.columns) for row, (_, found) in zip(batch.rows, alike, strict=True)]
        batches.append(replace(batch, rows=rows, inputs=inputs))
    return batches
