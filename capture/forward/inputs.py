"""Token sequences as a padded batch, and as the arguments of a model's forward.

Padding must not change a row: the same tokens give the same activations, whichever examples are in the batch. So the
model gets the attention mask and, where it takes them, position ids that count tokens only. Without them, left padding
shifts every learned position (an error of 0.29 in GPT-2's residuals).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from residua.capture.runtime.devices import uploaded


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """Sequences of different lengths as one batch, each tensor int64 of shape (batch, longest length).

    Attributes:
        input_ids: Token ids.
        attention_mask: 1 for a token, 0 for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor


def padded_batch(
    sequences: Sequence[npt.ArrayLike],
    *,
    pad_id: int = 0,
    side: Literal["left", "right"] = "right",
    device: torch.device | str | None = None,
) -> PaddedBatch:
    """Pad token sequences to the longest of them.

    Args:
        sequences: Token ids, one sequence per example; none may be empty.
        pad_id: Token id of the padding; it is masked, so any id of the vocabulary will do.
        side: Side of the padding.
        device: Device of the tensors.

    Returns:
        The batch.

    Raises:
        ValueError: There are no sequences, or one of them is empty.
    """
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    lengths = [len(array) for array in arrays]
    if not lengths or min(lengths) == 0:
        raise ValueError(
            f"A batch needs at least one sequence, and each sequence at least one token; the lengths are {lengths}. "
            "Leave empty examples out."
        )
    ids = np.full((len(arrays), max(lengths)), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, array in enumerate(arrays):
        start = ids.shape[1] - len(array) if side == "left" else 0
        ids[row, start : start + len(array)] = array
        mask[row, start : start + len(array)] = 1
    ids_BT, mask_BT = (uploaded(torch.from_numpy(array), device) for array in (ids, mask))
    return PaddedBatch(input_ids=ids_BT, attention_mask=mask_BT)


def positions_of(attention_mask: Tensor) -> Tensor:
    """Count the tokens of each sequence from 0, with padding on either side.

    Args:
        attention_mask: 1 for a token, 0 for padding; (batch, positions).

    Returns:
        int64 of the same shape; padding has a position that a token has too.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


class ForwardArguments:
    """Makes the arguments for forward calls of one language model, which is inspected once.

    Position ids are passed where the model's forward takes them. The cache is switched off where possible, since it
    only costs memory. Token types are left to the model, whose default is one segment.

    Args:
        model: A transformers model; it is called as ``model(**arguments(input_ids, attention_mask))``.
        needs_logits: Compute the logits of all positions. Otherwise a model that can leaves them out, which saves
            (batch x positions x vocabulary) numbers and changes nothing else.
    """

    def __init__(self, model: nn.Module, *, needs_logits: bool = True) -> None:
        takes = inspect.signature(model.forward).parameters
        self._first_position = first_position(model) if "position_ids" in takes else None
        self._fixed: dict[str, Tensor | bool | int] = {}
        if "use_cache" in takes:
            self._fixed["use_cache"] = False
        if not needs_logits and "logits_to_keep" in takes:
            self._fixed["logits_to_keep"] = 1

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor | bool | int]:
        """Return the arguments for one batch, on the device of the tensors given.

        Args:
            input_ids: int64, (batch, positions).
            attention_mask: 1 for a token, 0 for padding, of the same shape.
        """
        kwargs = {"input_ids": input_ids, "attention_mask": attention_mask, **self._fixed}
        if self._first_position is not None:
            kwargs["position_ids"] = positions_of(attention_mask) + self._first_position
        return kwargs


def forward_kwargs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, needs_logits: bool = True
) -> dict[str, Tensor | bool | int]:
    """Return the arguments for a single forward call of `model`; see `ForwardArguments`."""
    return ForwardArguments(model, needs_logits=needs_logits)(input_ids, attention_mask)


def first_position(model: nn.Module) -> int:
    """Return the model's number for the first position: 0, except in RoBERTa, which reserves one for padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
