"""The results of one replay pass: logits and rows of each example, cut out of the tensors of a padded batch.

Legend: `B` examples in the batch, `T` padded positions, `H` heads, `K` keys, `V` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.identity.prediction import token_logits
from residua.capture.runtime.collectives import on_rank
from residua.store.base.errors import CaptureError
from residua.store.format.site_names import parse_site

_LOGITS_AXES = 3


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The results of one replay pass, by example and without padding.

    Attributes:
        logits: Per example, (tokens, vocabulary), or (1, classes) of a classifier of whole examples; None if the
            model's last stage is in another process.
        sites: From name to the rows of each example, (rows, *row), as the model continued with them. Sites of another
            process are missing.
        nodes: With gradients only: from name to the tensor that gradients can be taken with respect to, (B, T, *row):
            the injected rows before any edit, and the kept sites.
        lacks: Why there are no logits, if that is known.
        end: In a pipeline: further tensors that gradients have to be taken with respect to
            (`residua.capture.taps.pipeline_gradients.end_here`).
    """

    logits: list[Tensor] | None
    sites: dict[str, list[Tensor]]
    nodes: dict[str, Tensor]
    end: tuple[Tensor, ...]
    lacks: str = ""

    def require_logits(self) -> list[Tensor]:
        """Return the logits.

        Raises:
            CaptureError: The model gave none in this process, or none of the examples' tokens.
        """
        if self.logits is None:
            no_head = (
                f"the model gave no logits of its tokens or examples{on_rank()}: it has no head here. Its sites can "
                "be read; logits and metrics need a model with logits."
            )
            raise CaptureError(self.lacks or no_head)
        return self.logits


def joined(passes: Sequence[Pass]) -> Pass:
    """Return the results of several passes without gradients as those of one."""
    if len(passes) == 1:
        return passes[0]
    sites = {name: [rows for one in passes for rows in one.sites[name]] for name in passes[0].sites}
    logits = None if passes[0].logits is None else [rows for one in passes for rows in one.logits or ()]
    return Pass(logits=logits, sites=sites, nodes={}, end=(), lacks=passes[0].lacks)


def in_order(found: Pass, passes: Sequence[PlanBatch], batch: PlanBatch) -> Pass:
    """Return the results of passes in the order of the examples of the batch that they were cut from."""
    ran = [example.example for one in passes for example in one.rows]
    order = [ran.index(example.example) for example in batch.rows]
    if order == list(range(len(ran))):
        return found
    sites = {name: [rows[place] for place in order] for name, rows in found.sites.items()}
    return replace(
        found, sites=sites, logits=None if found.logits is None else [found.logits[place] for place in order]
    )


def kept_rows(batch: PlanBatch, tensor: Tensor, name: str) -> list[Tensor]:
    """Return the rows of each example at its kept positions; of a pattern, with the keys of the example."""
    site, found = parse_site(name), []
    for tensor_THK, example in zip(tensor, batch.rows, strict=True):
        rows = tensor_THK[torch.from_numpy(example.padded[example.positions]).to(tensor.device)]
        keys = example.padded if site.kind == "pattern" else example.source
        is_pattern = site.is_pattern and keys is not None
        found.append(rows[..., torch.from_numpy(keys).to(tensor.device)] if is_pattern else rows)
    return found


def logits_of_batch(batch: PlanBatch, output: object, *, of_examples: bool) -> list[Tensor] | None:
    """Return the logits of every token of each example, (tokens, V), or of each example, (1, V); None without any."""
    logits = token_logits(output)
    if logits is None:
        return None
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    if of_examples:
        return [row[None] for row in logits] if logits.ndim < _LOGITS_AXES and len(logits) == len(batch.rows) else None
    if tuple(logits.shape[:2]) != (len(batch.rows), batch.n_positions):
        return None
    logits_BTV = logits if logits.ndim == _LOGITS_AXES else logits[..., None]
    return [
        logits_TV[torch.from_numpy(example.padded).to(logits_TV.device)]
        for logits_TV, example in zip(logits_BTV, batch.rows, strict=True)
    ]
