"""Whether a model keeps padding out of its rows: found out by running it, since a mask that it ignores shows nowhere.

Some models mix positions past the attention mask (the Fourier transforms of FNet, the convolutions of ConvBERT) or
scale by what a batch holds, so that a row depends on the padding and on the companions of its example. Such a model
runs its examples one by one. A short example runs alone and beside a longer one, and its rows are compared.

Rounding differs between the two as well. In float32 and float64 it is far smaller than what padding changes. In half
precision it is not, and may route a token to another expert. So a model in half precision is compared twice: its first
two blocks in float32, where all that padding changes shows, and all of it as it is, where the median over the positions
counts. What is missed is a leak that begins above the second block and changes less than rounding does, and so does one
of this size in a model whose blocks do not run in float32 (see `first_blocks_in_float32`).
"""

from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from residua.capture.forward.inputs import PaddedBatch, padded_batch
from residua.capture.identity.few_tokens import (
    N_EXAMPLES,
    N_POSITIONS,
    FewTokens,
    few_tokens,
    logits_of,
    refuse_without_memory,
    run_tokens,
)
from residua.capture.identity.first_blocks import HALF, first_blocks_in_float32
from residua.capture.runtime.collectives import all_gather_objects
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.capture.runtime.sharded import is_sharded
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.shape_probe import takes_tokens
from residua.capture.sites.stacks import takes_pairs

Side = Literal["left", "right"]

RAN_ALONE = (
    "padding changes the rows of this model, which does not keep to the attention mask: examples ran one by one, "
    "without padding"
)

_SHORT, _LONG = N_POSITIONS, N_POSITIONS + 8
_FIRST_TOKENS = (0, 3)  # of the first try, and of the second, which has to confirm what the first one found
# Root mean square of the change at a position, as a part of that of its values.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 3e-4, 0.1

_known: WeakKeyDictionary[nn.Module, dict[tuple[Side, torch.dtype], bool]] = WeakKeyDictionary()
"""What was found out about each model, by the side of the padding and the dtype of its weights."""


def padding_leaks(model: nn.Module, *, side: Side = "right", few: FewTokens | None = None) -> bool:
    """Return whether padding on `side`, or longer companions, change the rows of a language model.

    The model runs twice over a few tokens, once for each model object, and twice more to confirm what it found; in half
    precision its first blocks run as often in float32. A collective of all processes that hold it; every one of them
    gets the same. A model that cannot run on tokens alone, and a torch pipeline, are not tried.

    Args:
        model: The model, with its wrappers.
        side: Side of the padding.
        few: Its run over a few tokens, if there was one: then one more is enough.

    Raises:
        CaptureError: There is no memory to run the model.
    """
    core = core_of(model)
    if stage_model_of(core) is not None or not (takes_tokens(model) or takes_pairs(model)):
        return False
    known = _known.setdefault(core, {})
    case = (side, _dtype(core))
    if case not in known:
        known[case] = all(_changes(model, side, first, few) for first in _FIRST_TOKENS)
    return known[case]


def runs_alike(model: nn.Module) -> bool:
    """Return whether every batch of a model takes one forward pass, if its weights are sharded; true for other models.

    Forward passes of sharded weights are collectives of all workers, whatever their batches: all of them call this.
    """
    return not (is_sharded(model) and padding_leaks(model))


def _dtype(core: nn.Module) -> torch.dtype:
    return next((each.dtype for each in core.parameters() if each.is_floating_point()), torch.float32)


def _changes(model: nn.Module, side: Side, first: int, few: FewTokens | None) -> bool:
    core = core_of(model)
    try:
        found = _change(model, side, first, few)
    except Exception as error:  # noqa: BLE001 - the boundary to the user's model, which need not run on any tokens
        refuse_without_memory(error)
        found = False
    of_first_rank = all_gather_objects(tensor_parallel_group(core, None), found)[0]
    return all_gather_objects(pipeline_group(core), of_first_rank)[-1]


def _change(model: nn.Module, side: Side, first: int, few: FewTokens | None) -> bool:
    """Return whether the output for a short example changes beside a longer one by more than rounding."""
    core = core_of(model)
    ids, device = few_tokens(model, _SHORT + _LONG, first=first).tolist(), input_device(core)
    short, long = ids[:_SHORT], ids[_SHORT:]
    alone, beside = (padded_batch(each, side=side, device=device) for each in ([short], [short, long]))
    if _dtype(core) in HALF:
        rows = first_blocks_in_float32(model, [alone, beside])
        changes = None if rows is None else _changes_of_rows(_first_of(rows[0], 1), _first_of(rows[1], 2), side)
        if changes is not None and float(changes.max()) > _TOLERANCE:
            return True
    if few is not None and not few.problem and not first:  # it had the short one, beside one of the same length
        alone_TV = _first_of(few.output, N_EXAMPLES)
    else:
        alone_TV = _output_of_first(model, alone)
    changes = _changes_of_rows(alone_TV, _output_of_first(model, beside), side)
    if changes is None:
        return False
    if _is_low_precision(core):
        return float(changes.median()) > _LOW_PRECISION_TOLERANCE
    return float(changes.max()) > _TOLERANCE


def _changes_of_rows(alone_TV: Tensor | None, beside_TV: Tensor | None, side: Side) -> Tensor | None:
    """Return by which part of its values each row of an example changes beside a longer one; None without such rows."""
    if alone_TV is None or beside_TV is None:
        return None
    if len(beside_TV) == _LONG:
        beside_TV = beside_TV[-_SHORT:] if side == "left" else beside_TV[:_SHORT]
    if alone_TV.shape != beside_TV.shape:
        return None
    sizes = _root_mean_squares(alone_TV).clamp_min(torch.finfo(torch.float32).tiny)
    return _root_mean_squares(beside_TV - alone_TV) / sizes


def _output_of_first(model: nn.Module, batch: PaddedBatch) -> Tensor | None:
    return _first_of(run_tokens(model, batch.input_ids, batch.attention_mask), len(batch.input_ids))


def _first_of(output: object, n_examples: int) -> Tensor | None:
    """Return logits or hidden states of the first example on the CPU, float64; its positions come first, if any."""
    found = logits_of(output)
    if found is None:
        return None
    full = found.full_tensor() if isinstance(found, DTensor) else found
    if full.ndim < 2 or len(full) != n_examples:
        return None
    # Some models give minus infinity to tokens that are never predicted.
    return full[0].detach().cpu().to(torch.float64).nan_to_num(0.0, 0.0, 0.0)


def _root_mean_squares(tensor: Tensor) -> Tensor:
    return tensor.square().mean(-1).sqrt().reshape(-1)


def _is_low_precision(core: nn.Module) -> bool:
    """Return whether a model computes in half precision, or multiplies float32 with fewer bits."""
    dtype = _dtype(core)
    has_fewer_bits = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return dtype not in (torch.float32, torch.float64) or has_fewer_bits
