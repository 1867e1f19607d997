"""The 4-bit weights of bitsandbytes, read without changing them.

Such a weight is a parameter of bytes, with its scales in the attribute ``quant_state``. On processors with bfloat16
instructions the first run packs both in another way, and rounds the scales to bfloat16. The state dict of the layer
unpacks them again: it quantises the scales anew, so that each state dict is of a slightly other model. What is read
here is the same before and after the first run, and leaves the weight as it is.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from residua.capture.runtime.compat import unpacked_codes

_PACKED = "packing_format_for_cpu"


def is_four_bit(tensor: Tensor) -> bool:
    """Return whether a weight is one of bitsandbytes with 4 bits."""
    return getattr(tensor, "quant_state", None) is not None and hasattr(tensor, "quant_type")


def four_bit_content(weight: Any) -> tuple[object, ...]:
    """Return what a 4-bit weight computes with: codes, scales in bfloat16, table, block size, kind and shape."""
    state, codes, scales = weight.quant_state, weight.detach().as_subclass(Tensor), weight.quant_state.absmax
    if getattr(state, _PACKED, False):
        codes, scales = unpacked_codes(codes, copy.copy(state)), scales.T
    elif state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    kind = (int(state.blocksize), str(state.quant_type), tuple(state.shape))
    return codes.reshape(-1).view(torch.uint8), scales.reshape(-1).to(torch.bfloat16), state.code, kind


@contextmanager
def keeping_packed(model: nn.Module) -> Iterator[None]:
    """Let the state dict of a model leave its 4-bit weights as they are."""
    weights: list[Any] = [tensor for tensor in model.parameters() if is_four_bit(tensor)]
    states = [weight.quant_state for weight in weights]
    packed = [state for state in states if getattr(state, _PACKED, False)]
    for state in packed:
        setattr(state, _PACKED, False)
    try:
        yield
    finally:
        for state in packed:
            setattr(state, _PACKED, True)
