"""One call of the user's model: its tokens, mask and examples, and whether all processes make the same call."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from residua.capture.buffers.row_index import ExampleRows
from residua.capture.runtime.collectives import device_of, on_rank
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.store.base.errors import CaptureError
from residua.store.examples.index import Example
from residua.store.storage.crc import crc32c

Column: TypeAlias = "Sequence[object] | torch.Tensor | npt.NDArray[np.generic]"
"""One value per example."""
NO_TOKEN = 0  # token id of rows that are full examples, such as images


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the model.

    Attributes:
        input_ids: Token ids, (examples, positions); None for a model without tokens.
        mask: Which positions are tokens and not padding, (examples, positions).
    """

    input_ids: npt.NDArray[np.int32] | None
    mask: npt.NDArray[np.bool_]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of examples and of padded positions; one position per example where there are no tokens."""
        return (int(self.mask.shape[0]), int(self.mask.shape[1]))

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
            columns: One value per example, by name; the values of tensors and arrays lie along the first axis.
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
        plain = {
            name: values.tolist() if isinstance(values, torch.Tensor | np.ndarray) else values
            for name, values in columns.items()
        }
        for name, values in plain.items():
            if len(values) != len(self.mask):
                raise CaptureError(
                    f"column {name!r} has {len(values)} values for {len(self.mask)} examples: give one per example"
                )
        examples, rows = list[Example](), list[ExampleRows]()
        for b, mask in enumerate(self.mask):
            at = np.flatnonzero(mask)
            ids = np.full(len(at), NO_TOKEN, np.int32) if self.input_ids is None else self.input_ids[b, at]
            positions = np.flatnonzero(kept[b, at]).astype(np.int32)
            number, padded = first_example + b, at.astype(np.int64)
            examples.append(
                Example(input_ids=ids, positions=positions, columns={name: values[b] for name, values in plain.items()})
            )
            rows.append(
                ExampleRows(example=number, first_row=first_row, input_ids=ids, positions=positions, padded=padded)
            )
            first_row += len(positions)
        return examples, rows


def read_call(names: Iterable[str], args: Sequence[object], kwargs: Mapping[str, object]) -> Call:
    """Read tokens and mask from the arguments of a model's call.

    Args:
        names: Parameter names of the model's forward, in order; they identify a mask that is passed by position.
        args: The positional arguments.
        kwargs: The keyword arguments.

    Raises:
        CaptureError: There is no tensor among them, or the mask does not fit the tokens.
    """
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = named.pop("attention_mask", None)
    candidates = (named.get("input_ids"), *args, *named.values())
    first = next((value for value in candidates if isinstance(value, torch.Tensor) and value.ndim), None)
    if first is None:
        raise CaptureError(
            "the model was called without a tensor, so its examples cannot be counted: pass a tensor with one entry "
            "per example"
        )
    if first.is_floating_point() or first.ndim != 2:
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape == first.shape[:2]:
            return Call(input_ids=None, mask=mask.cpu().numpy() > 0)
        return Call(input_ids=None, mask=np.ones((first.shape[0], 1), bool))
    if mask is None:
        mask = torch.ones_like(first)
    if not isinstance(mask, torch.Tensor) or mask.shape != first.shape:
        found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise CaptureError(
            f"attention_mask is {found} for input_ids of shape {tuple(first.shape)}: a recorded call needs one mask "
            "entry per token. To record generated text, generate first, then call the model on the full sequences."
        )
    return Call(input_ids=first.cpu().numpy().astype(np.int32), mask=mask.cpu().numpy() > 0)


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
        for array in (np.array(call.shape), call.input_ids, call.mask, keep):
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
