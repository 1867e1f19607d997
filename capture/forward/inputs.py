"""Token sequences as a padded batch, and as the arguments of a model's forward.

Padding must not change a row: the same tokens give the same activations, whichever examples are in the batch. So the
model gets the attention mask and, where it takes them, position ids that count tokens only. Without them, left padding
shifts every learned position (an error of 0.29 in GPT-2's residuals). Models number positions in their own ways: one
whose architecture is not in the table runs once with position ids and once without, and gets none if they differ.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residua.capture.layout.process_layout import spans_processes
from residua.capture.runtime.devices import input_device, uploaded
from residua.capture.runtime.sharded import is_sharded
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.architectures import family_of
from residua.capture.sites.shape_probe import run_on_tokens, takes_tokens
from residua.capture.sites.stacks import is_encoder_decoder
from residua.store.base.errors import CaptureError


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
    side: Literal["left", "right"] = "right",
    device: torch.device | str | None = None,
) -> PaddedBatch:
    """Pad token sequences with 0, which is masked, to the longest of them.

    Args:
        sequences: Token ids, one sequence per example; none may be empty.
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
    ids = np.zeros((len(arrays), max(lengths)), dtype=np.int64)
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


def forward_arguments(
    model: nn.Module, *, needs_logits: bool = True
) -> Callable[[Tensor, Tensor], dict[str, Tensor | bool | int]]:
    """Inspect a language model once, and return the function that makes the arguments of its forward calls.

    Position ids are passed where the model's forward takes them, and numbers them as they are numbered here. The cache
    is switched off where possible, since it only costs memory. Token types are left to the model, whose default is one
    segment.

    Args:
        model: A transformers model; it is called as ``model(**arguments(input_ids, attention_mask))``.
        needs_logits: Compute the logits of all positions. Otherwise a model that can computes those of the last
            position only, which saves (batch x positions x vocabulary) numbers and changes nothing else.

    Returns:
        A function of token ids, int64 of shape (batch, positions), and attention mask of the same shape, 1 for a token
        and 0 for padding.
    """
    takes = inspect.signature(model.forward).parameters
    if is_encoder_decoder(model):
        both = pair_arguments(model)
        return lambda ids, mask: both(PaddedBatch(input_ids=ids, attention_mask=mask), None, "decoder")
    first = first_position_given(model)
    fixed: dict[str, bool] = {"use_cache": False} if "use_cache" in takes else {}
    leaves_out_logits = not needs_logits and "logits_to_keep" in takes

    def arguments(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor | bool | int]:
        kwargs: dict[str, Tensor | bool | int] = {"input_ids": input_ids, "attention_mask": attention_mask, **fixed}
        if first is not None:
            kwargs["position_ids"] = positions_of(attention_mask) + first
        if leaves_out_logits:
            # A number would let Gemma 4 run its upper blocks on the last token alone; indices choose among the logits.
            kwargs["logits_to_keep"] = torch.full((1,), input_ids.shape[1] - 1, device=input_ids.device)
        return kwargs

    return arguments


def pair_arguments(
    model: nn.Module,
) -> Callable[[PaddedBatch, PaddedBatch | None, str], dict[str, Tensor | bool | int]]:
    """Inspect an encoder-decoder once, and return the function that makes the arguments of its forward calls.

    Returns:
        A function of the batch whose positions are rows, the batch of sources, and the stack that has the rows. The
        encoder's rows need no sources beside them, and the decoder gets one token. A decoder without sources gets its
        own tokens as such.
    """
    takes = inspect.signature(model.forward).parameters
    config = cast("PreTrainedModel", core_of(model)).config
    start = getattr(config, "decoder_start_token_id", None) or getattr(config, "pad_token_id", None) or 0

    def arguments(batch: PaddedBatch, source: PaddedBatch | None, stack: str) -> dict[str, Tensor | bool | int]:
        encoded = source or batch
        takes_ids = "input_ids" in takes  # else the encoder takes features of a fixed length, without padding
        one = torch.full((len(batch.input_ids), 1), start, device=batch.input_ids.device)
        decoded = PaddedBatch(input_ids=one, attention_mask=torch.ones_like(one)) if stack == "encoder" else batch
        every: dict[str, Tensor | bool | int] = {
            "input_ids": encoded.input_ids,
            **({"attention_mask": encoded.attention_mask} if takes_ids else {}),
            "decoder_input_ids": decoded.input_ids,
            "decoder_attention_mask": decoded.attention_mask,
            "use_cache": False,
        }
        return {name: value for name, value in every.items() if name in takes}

    return arguments


def forward_kwargs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, needs_logits: bool = True
) -> dict[str, Tensor | bool | int]:
    """Return the arguments for a single forward call of `model`; see `forward_arguments`."""
    return forward_arguments(model, needs_logits=needs_logits)(input_ids, attention_mask)


def first_position_given(model: nn.Module) -> int | None:
    """Return the first of the position ids that are passed to a model; None if it takes none, or numbers otherwise."""
    takes = inspect.signature(model.forward).parameters
    return first_position(model) if "position_ids" in takes and _takes_positions(model) else None


def first_position(model: nn.Module) -> int:
    """Return the model's number for the first position: 0, except where some numbers are reserved (RoBERTa, MRA)."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            if module.padding_idx is not None:
                return module.padding_idx + 1
            numbers = getattr(model.get_submodule(name.rpartition(".")[0]), "position_ids", None)
            if isinstance(numbers, Tensor) and numbers.numel() and not numbers.is_meta:
                return int(numbers.flatten()[0])
            return 0
    return 0


_takes_ours: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model that was tried numbers positions from `first_position`."""


def _takes_positions(model: nn.Module) -> bool:
    """Return whether position ids from `first_position` are those that a model takes by itself.

    A model that is spread over processes is not tried: its processes may not all come here.
    """
    is_known = isinstance(model, PreTrainedModel) and family_of(model.config) is not None
    if is_known or not takes_tokens(model) or spans_processes(model) or is_sharded(model):
        return True
    if any(parameter.is_meta for parameter in model.parameters()):
        return True
    if model not in _takes_ours:
        _takes_ours[model] = _try_positions(model)
    return _takes_ours[model]


def _try_positions(model: nn.Module) -> bool:
    shape = (1, 5 + _longest_chunk(model))  # Reformer pads what is longer than a chunk, and loses the position ids
    ours = torch.arange(shape[1], device=input_device(model)).view(shape) + first_position(model)
    try:
        without = run_on_tokens(model, shape)
    except CaptureError:
        return True  # it needs more than tokens, and the caller has that
    try:
        given = run_on_tokens(model, shape, position_ids=ours)
    except CaptureError:
        return False
    return without is None or given is None or torch.allclose(without, given, rtol=1e-3, atol=1e-3)


def _longest_chunk(model: nn.Module) -> int:
    """Return the number of positions that a model computes at a time, if it has one; else 0."""
    chunks = [n for name, n in vars(model.config).items() if name.endswith("attn_chunk_length") and isinstance(n, int)]
    return max(chunks, default=0)
