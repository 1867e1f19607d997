"""What examples have beside tokens, such as pixels: made example by example when their batch runs, and joined there.

A processor of transformers gives tensors whose first axis counts images or patches, in the order in which the tokens
stand for them, and some with one number a token. Those of several examples are joined along the first axis. Examples
whose tensors differ in another axis run in passes of their own, so nothing is padded but tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from residua.capture.runtime.devices import uploaded

OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
"""Inputs with one number a token, (1, tokens)."""


@dataclass(frozen=True, kw_only=True)
class ExampleInputs:
    """What one example has beside its tokens.

    Attributes:
        input_ids: Its tokens, int32, (tokens,): -1 for each position of a model that takes images alone.
        tensors: Other arguments of the model's forward, as a processor gives them for this example alone.
        columns: Other columns of its rows, by name, each (tokens,).
    """

    input_ids: npt.NDArray[np.int32]
    tensors: Mapping[str, Tensor]
    columns: Mapping[str, npt.NDArray[np.signedinteger[Any]]] = field(default_factory=dict)

    @property
    def signature(self) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
        """What examples of one pass have in common: names, types, and all axes but the first."""
        return tuple(
            (name, () if name in OF_TOKENS else tuple(tensor.shape[1:]), tensor.dtype)
            for name, tensor in sorted(self.tensors.items())
        )


class InputSource(Protocol):
    """Makes what examples have beside tokens."""

    def of(self, example: int) -> ExampleInputs:
        """Return the inputs of one example, by its number in the archive."""
        ...


def joined(
    examples: Sequence[ExampleInputs], n_positions: int, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of examples of one signature as those of one batch, padded on the right with 0.

    Args:
        examples: The examples, in batch order.
        n_positions: Length of the batch.
        device: Device of the tensors.
        dtype: Type of those that hold floating-point numbers: the model's.
    """
    found = {}
    for name in examples[0].tensors:
        tensors = [example.tensors[name] for example in examples]
        if name in OF_TOKENS:
            tensors = [torch.nn.functional.pad(tensor, (0, n_positions - tensor.shape[1])) for tensor in tensors]
        whole = torch.cat(tensors)
        found[name] = uploaded(whole.to(dtype) if whole.is_floating_point() else whole, device)
    return found
