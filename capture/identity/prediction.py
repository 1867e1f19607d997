"""What a model's logits predict: the next token, something about each token, or something about an example as a whole.

It is found out by running the model twice over a few tokens, of which the last one differs. If an earlier output
changes, the model sees later tokens: its logits say nothing of a next token that it has not seen, so there is no loss.
"""

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from residua.capture.hooks.forward_call import probing
from residua.capture.identity.few_tokens import few_tokens, refuse_without_memory, run_tokens
from residua.capture.runtime.collectives import all_gather_objects
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.capture.runtime.wrappers import core_of, evaluating
from residua.capture.sites.shape_probe import takes_tokens

Prediction = Literal["next token", "tokens", "examples"]

_LENGTHS = (3, 5)
_TOKENS_AXES = 3  # (examples, positions, classes)
# Root mean square of the change at a position, as a part of that of its values.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-4, 0.02

_known: WeakKeyDictionary[nn.Module, Prediction | None] = WeakKeyDictionary()


def prediction_of(model: nn.Module) -> Prediction | None:
    """Return what a language model's logits predict; None if it has none, or cannot be run on tokens alone.

    The model runs twice or three times over a few tokens, once for each model object. A collective of all processes
    that hold it. A torch pipeline is not tried.

    Args:
        model: The model, with its wrappers.

    Returns:
        ``next token``; ``tokens`` if there are logits of each token that are not those of the next one (a model that
        sees later tokens, or a classifier of tokens); ``examples`` if there are logits of each example alone.

    Raises:
        CaptureError: There is no memory to run the model.
    """
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or not takes_tokens(core) or stage_model_of(core) is not None:
        return None
    if core not in _known:
        _known[core] = _found(model, core)
    return _known[core]


def no_loss(model: nn.Module, prediction: Prediction | None) -> str:
    """Return why a model has no next-token loss, as a sentence without its end; empty if it has one or may have."""
    if prediction in (None, "next token"):
        return ""
    name = type(core_of(model)).__name__
    if prediction == "examples":
        return f"{name} gives logits of an example as a whole, so there is no next-token loss"
    return f"{name} sees later tokens or classifies tokens, so there is no next-token loss"


def token_logits(output: Any) -> Tensor | None:
    """Return what a model's output has in place of logits; of question answering, start and end of each token."""
    if isinstance(output, Tensor):
        return output  # the last stage of a torch pipeline
    for name in ("logits", "prediction_logits"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    ends = [getattr(output, name, None) for name in ("start_logits", "end_logits")]
    tensors = [each for each in ends if isinstance(each, Tensor)]
    return torch.stack(tensors, -1) if len(tensors) == len(ends) else None


def _found(model: nn.Module, core: PreTrainedModel) -> Prediction | None:
    prediction: Prediction | None = None
    try:
        with evaluating(core), probing():
            prediction = _tried(model, core)
    except Exception as error:  # noqa: BLE001 - the boundary to the user's model, which need not run on any tokens
        refuse_without_memory(error)
    ranks: list[Prediction | None] = all_gather_objects(tensor_parallel_group(core, None), prediction)
    stages: list[Prediction | None] = all_gather_objects(pipeline_group(core), ranks[0])
    return stages[-1]


def _tried(model: nn.Module, core: PreTrainedModel) -> Prediction | None:
    """Run the model twice, on every stage of a pipeline alike, and compare."""
    ids = few_tokens(model, _LENGTHS[0], first=5)[None]
    here: bool = core.get_output_embeddings() is not None  # type: ignore[no-untyped-call]  # transformers has no types
    has_head = any(all_gather_objects(pipeline_group(core), here))
    if has_head:
        changed = ids.clone()
        changed[0, -1] = few_tokens(model, 1, first=23)[0]
    else:
        changed = few_tokens(model, _LENGTHS[1], first=5)[None]
    logits, other = _logits(model, ids), _logits(model, changed)
    if logits is None:
        return None
    if not has_head:
        is_of_examples = other is not None and logits.ndim < _TOKENS_AXES and other.shape == logits.shape
        return "examples" if is_of_examples else "tokens"
    if other is None or logits.ndim != _TOKENS_AXES:
        return "tokens"
    change = (other - logits)[0, :-1].square().mean(-1).sqrt()
    size = logits[0, :-1].square().mean(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    is_low = core.dtype not in (torch.float32, torch.float64)
    largest = (change / size).median() if is_low else (change / size).max()
    return "tokens" if float(largest) > (_LOW_PRECISION_TOLERANCE if is_low else _TOLERANCE) else "next token"


def _logits(model: nn.Module, ids: Tensor) -> Tensor | None:
    found = token_logits(run_tokens(model, ids, torch.ones_like(ids)))
    if found is None:
        return None
    full = found.full_tensor() if isinstance(found, DTensor) else found
    return full.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0)  # some are minus infinity: never predicted
