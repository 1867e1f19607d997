"""One call of the user's model: its tokens, mask and examples, and whether all processes make the same call."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from residua.capture.buffers.row_index import ExampleRows
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.collectives import device_of, on_rank
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.store.base.errors import CaptureError, PlanError
from residua.store.examples.index import INPUT_PREFIX, NO_TOKEN, OTHER_INPUTS, Example
from residua.store.storage.crc import crc32c

Column: TypeAlias = "Sequence[object] | torch.Tensor | npt.NDArray[np.generic]"
"""One value per example."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the model.

    A sequence of the call is one example, or several packed documents, each of which is an example.

    Attributes:
        input_ids: Token ids, (sequences, positions); None for a call without tokens.
        mask: Which positions are tokens and not padding, (sequences, positions).
        starts: At which tokens a document begins, (sequences, positions); None if each sequence is one.
        others: Names of what the call had beside tokens and mask.
        inputs: Those of them that are small, whole numbers: int64 of shape (sequences,), (sequences, positions) or
            (sequences, positions, few).
        pads_left: Whether sequences are padded on the left, and the model is given no positions.
        notes: What a reader of the rows should know, one sentence each.
    """

    input_ids: npt.NDArray[np.int32] | None
    mask: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.bool_] | None = None
    others: tuple[str, ...] = ()
    inputs: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    pads_left: bool = False
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Number of sequences and of padded positions; one position per example where there are neither."""
        return (int(self.mask.shape[0]), int(self.mask.shape[1]))

    def by_example(self) -> "Call":
        """Return the call with one row for each sequence as a whole, whatever tokens it has."""
        whole = np.ones((len(self.mask), 1), np.bool_)
        note = "a row is a whole example: the sites are not computed from tokens alone, and say nothing of one token"
        return replace(self, input_ids=None, mask=whole, starts=None, inputs={}, notes=(*self.notes, note))

    def by_position(self, n_positions: int) -> "Call":
        """Return the call with `n_positions` rows for each example, which have no tokens."""
        return replace(self, input_ids=None, mask=np.ones((len(self.mask), n_positions), np.bool_), starts=None)

    def documents(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield the sequence of each example, and the padded positions of its tokens."""
        for sequence, mask in enumerate(self.mask):
            at = np.flatnonzero(mask).astype(np.int64)
            if self.starts is None:
                yield sequence, at
            else:
                yield from ((sequence, part) for part in np.split(at, np.flatnonzero(self.starts[sequence, at])[1:]))

    def examples(
        self,
        keep: npt.NDArray[np.bool_] | None,
        columns: Mapping[str, Column],
        *,
        first_example: int = 0,
        first_row: int = 0,
    ) -> tuple[list[Example], list[ExampleRows]]:
        """Return the call's examples, and their rows; examples without rows are numbered too.

        Args:
            keep: Which positions become rows, (examples, positions); None keeps every token.
            columns: One value per example, or per sequence, by name; the first axis of tensors and arrays has them.
            first_example: Number of the first example.
            first_row: Number of its first row.

        Raises:
            CaptureError: `keep` or a column does not fit the call.
        """
        if keep is not None and keep.shape != self.mask.shape:
            raise CaptureError(
                f"keep has shape {keep.shape}, but the call has {self.shape[0]} examples of {self.shape[1]} positions: "
                "give one entry per position"
            )
        kept = self.mask if keep is None else keep & self.mask
        documents = list(self.documents())
        values = self._per_document(columns, [sequence for sequence, _ in documents])
        examples, rows = list[Example](), list[ExampleRows]()
        for number, (sequence, padded) in enumerate(documents, start=first_example):
            ids = np.full(len(padded), NO_TOKEN, np.int32)
            if self.input_ids is not None:
                ids = self.input_ids[sequence, padded]
            positions = np.flatnonzero(kept[sequence, padded]).astype(np.int32)
            own = {name: column[number - first_example] for name, column in values.items()}
            if self.others:
                own[OTHER_INPUTS] = list(self.others)
            for name, numbers in self.inputs.items():
                of_sequence = numbers[sequence]
                own[INPUT_PREFIX + name] = (of_sequence[padded] if of_sequence.ndim else of_sequence).tolist()
            examples.append(Example(input_ids=ids, positions=positions, columns=own))
            rows.append(
                ExampleRows(example=number, first_row=first_row, input_ids=ids, positions=positions, padded=padded)
            )
            first_row += len(positions)
        return examples, rows

    def _per_document(self, columns: Mapping[str, Column], sequence_of: Sequence[int]) -> dict[str, Sequence[object]]:
        """Return the columns with one plain value per example, given one per example or one per sequence."""
        found = dict[str, Sequence[object]]()
        for name, given in columns.items():
            if name == OTHER_INPUTS or name.startswith(INPUT_PREFIX):
                raise CaptureError(f"column {name!r} is written by the recorder itself: choose another name")
            values = given.tolist() if isinstance(given, torch.Tensor | np.ndarray) else given
            if len(values) == len(sequence_of):
                found[name] = values
            elif len(values) == len(self.mask):
                found[name] = [values[sequence] for sequence in sequence_of]
            else:
                packed = "" if len(sequence_of) == len(self.mask) else f" in {len(self.mask)} sequences"
                raise CaptureError(
                    f"column {name!r} has {len(values)} values for {len(sequence_of)} examples{packed}: give one per "
                    "example"
                )
        return found


def are_of_examples(sites: Mapping[str, SiteInfo]) -> bool:
    """Return whether sites have rows for whole examples: a run on tokens alone did not meet them (a vision tower).

    Raises:
        PlanError: Some sites are of whole examples and some of tokens.
    """
    whole = [name for name, info in sites.items() if info.n_met == 0 and not info.per_token]
    others = [name for name in sites if name not in whole]
    if whole and others:
        raise PlanError(
            f"{whole[0]} is not computed from tokens alone, so a row of it is a whole example, and {others[0]} has a "
            "row for each token: one archive cannot have both. Record them with two recorders, into two archives."
        )
    return bool(whole)


class SameCalls:
    """Checks that all processes that hold a replica call it with the same batch.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        groups = (tensor_parallel_group(model, None), pipeline_group(model))
        self._groups = [group for group in groups if group is not None]

    def check(self, call: Call, keep: npt.NDArray[np.bool_] | None) -> None:
        """Compare a call with those of the other processes; a collective of all that hold the replica.

        Raises:
            CaptureError: Tokens, mask or kept positions differ; every process raises it.
        """
        if not self._groups:
            return
        content_hash = 0
        inputs = (call.inputs[name] for name in sorted(call.inputs))
        for array in (np.array(call.shape), call.input_ids, call.mask, call.starts, keep, *inputs):
            if array is not None:
                content_hash = crc32c(np.ascontiguousarray(array).view(np.uint8).reshape(-1), content_hash)
        ends = torch.tensor([content_hash, -content_hash])
        for group in self._groups:
            ends = ends.to(device_of(group))
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
        largest, smallest = ends.tolist()
        if largest != -smallest:
            raise CaptureError(
                f"the model was called{on_rank()} with another batch than on other ranks that hold it together: give "
                "all of them the same tokens, mask and keep. Only data-parallel replicas have batches of their own."
            )
