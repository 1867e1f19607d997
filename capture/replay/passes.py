"""What one pass of a replay gives, example by example and without padding.

Legend: `B` examples in the batch, `T` padded positions, `H` heads, `K` keys, `V` vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from residua.capture.forward.plan_batch import PlanBatch


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one pass gave.

    Attributes:
        logits: Per example, (tokens, vocabulary); None where the model's last part is in another process.
        sites: From name to the rows of each example, (rows, *row), as the model went on with them. Sites that fired in
            another process are not there.
        nodes: With gradients only: from name to what they can be taken with respect to, (B, T, *row): the injected
            rows before any edit, and the sites that were kept.
        end: What gradients have to be taken by besides, in a pipeline
        (`residua.capture.taps.pipeline_gradients.end_here`).
    """

    logits: list[Tensor] | None
    sites: dict[str, list[Tensor]]
    nodes: dict[str, Tensor]
    end: tuple[Tensor, ...]


def kept_rows(batch: PlanBatch, tensor: Tensor, name: str) -> list[Tensor]:
    """Return the rows of each example at its kept positions; of a pattern, with the example's own keys."""
    is_pattern = name.startswith("pattern.")
    found = []
    for tensor_THK, example in zip(tensor, batch.rows, strict=True):
        rows = tensor_THK[torch.from_numpy(example.padded[example.positions]).to(tensor.device)]
        found.append(rows[..., torch.from_numpy(example.padded).to(tensor.device)] if is_pattern else rows)
    return found


def token_logits(batch: PlanBatch, output: object) -> list[Tensor] | None:
    """Return the logits of every token of each example, (tokens, V)."""
    logits_BTV = getattr(output, "logits", output)  # the last stage of a torch pipeline may give nothing else
    if not isinstance(logits_BTV, Tensor):
        return None
    if isinstance(logits_BTV, DTensor):
        logits_BTV = logits_BTV.full_tensor()
    return [
        logits_TV[torch.from_numpy(example.padded).to(logits_TV.device)]
        for logits_TV, example in zip(logits_BTV, batch.rows, strict=True)
    ]
