"""Calls of a user's loop that are padded on the left and give no positions: padding is not to be counted.

A row's position counts tokens only. A model that is given no ``position_ids`` may count padding too, and with learned
positions (GPT-2, BERT) its rows are then those of other positions than the archive says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residua.capture.forward.inputs import first_position_given, positions_of
from residua.capture.identity.padding import padding_leaks
from residua.capture.recording.call import Call
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.sharded import is_sharded
from residua.capture.runtime.wrappers import core_of
from residua.store.base.errors import CaptureError

COUNTED = (
    "examples were padded on the left and the model got no position_ids: it ran with position_ids that count tokens "
    "only, from the attention mask"
)
NOT_KNOWN = (
    "examples were padded on the left and the model got no position_ids, so it may have counted padding: the position "
    "of a row counts tokens only, from 0"
)


def pads_source_left(kwargs: Mapping[str, object]) -> bool:
    """Return whether the source that a call of a decoder attends to is padded on the left."""
    mask = kwargs.get("encoder_attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask.bool().any(-1) & ~mask[:, 0].bool()).any())


def counting_tokens(
    model: nn.Module,
    parameters: Sequence[str],
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    n_new: int | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any], str]:
    """Return the arguments of a call that is padded on the left, with positions that count tokens only.

    A model that does not take them may run over a few tokens to find out whether it counts padding; that is a
    collective of all processes that hold it, and is left out where its weights are sharded over other workers too.

    Args:
        model: The model.
        parameters: Parameter names of its forward.
        call: The call; of one that goes on, the mask of all positions.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        n_new: Positions of a call that goes on; None for all.

    Returns:
        The arguments, and a note for the archive; empty if there is nothing to say.

    Raises:
        CaptureError: The model counts padding, and takes no positions.
    """
    if not set(call.others) <= set(call.inputs):  # with images, positions are the model's own
        return args, kwargs, NOT_KNOWN
    core = core_of(model)
    first = first_position_given(core)
    if first is None:
        refuse_if_counted(model)
        return args, kwargs, ""
    mask = torch.from_numpy(call.mask).to(input_device(core))
    at, positions = list(parameters).index("position_ids"), (positions_of(mask) + first)[:, -(n_new or mask.shape[1]) :]
    if at < len(args):
        return (*args[:at], positions, *args[at + 1 :]), kwargs, COUNTED
    return args, {**kwargs, "position_ids": positions}, COUNTED


def refuse_if_counted(model: nn.Module) -> None:
    """Raise CaptureError if a model that is given no positions counts padding on the left.

    The model may run over a few tokens to find out; that is a collective of all processes that hold it, and is left out
    where its weights are sharded over other workers too.
    """
    if is_sharded(model) or not padding_leaks(model, side="left") or padding_leaks(model):
        return
    raise CaptureError(
        f"the call is padded on the left, and {type(core_of(model)).__name__}, which takes no position_ids, counts "
        "padding: its rows would be those of other positions. Pad on the right, or give examples of one length"
    )
