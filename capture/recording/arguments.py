"""What the arguments of a model's call say about its rows: tokens, mask, positions, documents, and what else there was.

A row is filed under a token, and under the position of that token in its example. Each argument that decides about
them is understood here, or refused by name before the model runs:

- tokens are ``input_ids``. A model that has no parameter of that name takes them as its first one. A call without them
  (``inputs_embeds``, images) has rows without a token.
- ``attention_mask`` has an entry of 0 or 1 for each token.
- ``position_ids`` count the tokens of an example. Where they begin again, the next document of a packed sequence
  begins, which is an example of its own; ``cu_seq_lens_*`` and ``seq_idx`` have to agree with them.
- a cache that holds positions makes the call one that goes on (`residua.capture.recording.running`): its rows follow
  those positions. Its examples are known if the loop began with a cache; else the call is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from residua.capture.recording.call import Call
from residua.store.base.errors import CaptureError, few

_CACHES = ("past_key_values", "past_key_value", "past_buckets_states", "cache_params", "layer_past", "mems", "state")
_OTHER_STACK = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "encoder_outputs")
_LENGTHS = re.compile(r"cu_?seq_?lens(_[qk])?")
_SEGMENTS = ("token_type_ids", "mm_token_type_ids")  # zeros are what a model takes without them
_WITHOUT_EFFECT = {  # on activations: targets of a loss, and what is read above
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
    "seq_idx",
    "labels",
    "shift_labels",
    "next_sentence_label",
    "start_positions",
    "end_positions",
    "num_items_in_batch",
    "max_length_q",
    "max_length_k",
    "logits_to_keep",
    *_CACHES,
}
_TOKEN_TYPES = (torch.int64, torch.int32, torch.int16)
_POSITION_AXES = 2
_FEW_NUMBERS = 8  # of a token, such as the corners of its box
_TEXT_PLANE_FIRST = 4  # position_ids of (4, examples, positions): those of the text, then those of three axes
_GENERATED = "To record a loop that goes on with a cache, pass use_cache=True or a cache from its first call on."

Ids = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


def read_call(
    names: Iterable[str],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    *,
    first_position: int = 0,
    caches: bool = True,
) -> Call:
    """Read what the rows of a call are.

    Args:
        names: Parameter names of the model's forward, in order; they identify what is passed by position.
        args: The positional arguments.
        kwargs: The keyword arguments.
        first_position: The model's number for the first position.
        caches: Whether a model that has a cache makes one unless the call says otherwise.

    Raises:
        CaptureError: An argument cannot be understood; the message names it.
    """
    parameters = list(names)
    unnamed = [f"argument {number}" for number in range(len(parameters), len(args))]
    given = given_arguments([*parameters, *unnamed], args, kwargs)
    _refuse_past(given)
    if "adapter_names" in given:
        raise CaptureError(
            "the call has adapter_names, with which its examples run under different adapters, and an archive is of "
            "one model: switch with set_adapter, and record each adapter into an archive of its own"
        )
    for name in _OTHER_STACK:
        if name in given:
            raise CaptureError(
                f"the call has {name}, and the recorded model is no encoder-decoder of transformers: which tokens its "
                "rows belong to is not clear. Record the encoder and the decoder as models of their own."
            )
    tokens = _tokens(parameters, given)
    shape = tuple(tokens.shape) if tokens is not None else _shape_of_embeddings(given)
    others = _other_inputs(given, tokens)
    if shape is None:
        return Call(input_ids=None, mask=_mask_without_tokens(given), others=others)
    mask = _mask(given, shape)
    positions = _positions(given, shape)
    _check_holes(parameters, mask, positions)
    starts = None if positions is None else _starts(positions, mask, first_position)
    _check_lengths(given, mask, starts)
    ids = None if tokens is None else _ids(tokens)
    notes = []
    if starts is not None and (starts.sum(-1) > 1).any():
        _refuse_mixed_documents(given, caches=caches and "past_key_values" in parameters)
        notes.append(
            "calls packed several documents into one sequence (position_ids begin again), and each document is an "
            "example: its rows are those of the document alone if the model keeps documents apart, as transformers "
            "does for causal attention"
        )
    pads_left = positions is None and bool((mask.any(-1) & ~mask[:, 0]).any())
    inputs = {name: found for name in others if (found := _small_numbers(given[name], shape)) is not None}
    return Call(
        input_ids=ids,
        mask=mask,
        starts=starts,
        others=others,
        inputs=inputs,
        pads_left=pads_left,
        notes=tuple(notes),
    )


def given_arguments(names: Iterable[str], args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments of a call by name, without those that are None."""
    every = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in every.items() if value is not None}


def cached_positions(given: Mapping[str, object]) -> int:
    """Return how many positions of earlier calls a call goes on from.

    Raises:
        CaptureError: It goes on from a state that does not say so.
    """
    for name in _CACHES:
        if name in given and (length := _cached(given[name])):
            if length < 0:
                raise CaptureError(
                    f"{name} holds the state of earlier calls, which does not say how many positions these had, so "
                    "that rows of this call would get wrong ones. Call the model on full sequences"
                )
            return length
    return 0


def opens_loop(given: Mapping[str, object]) -> bool:
    """Return whether a call says that later ones may go on from it: by a cache of its own, or by ``use_cache``."""
    return bool(given.get("use_cache")) or "past_key_values" in given


def read_pass(
    names: Sequence[str], given: Mapping[str, object], *, start: int, before: Bools, first_position: int, is_ours: bool
) -> tuple[Ids, Bools]:
    """Read a call that goes on: its tokens, and which positions are tokens, those before it included.

    Args:
        names: Parameter names of the model's forward.
        given: Its arguments.
        start: Positions before it, padding included.
        before: Which of them, or of more, are tokens, (sequences, positions).
        first_position: The model's number for the first position.
        is_ours: Whether the mask follows from `before`, whatever form of it the model gets: in ``generate``.

    Raises:
        CaptureError: An argument cannot be understood; the message names it.
    """
    tokens = _tokens(names, given)
    if tokens is None:
        raise CaptureError(
            "the call goes on from earlier ones without input_ids, so its rows would have no tokens: pass input_ids"
        )
    if others := _other_inputs(given, tokens):
        raise CaptureError(
            f"the call has {few(others)} and is one of a loop that goes on with a cache, in which a recorder "
            "understands tokens, mask and positions alone: call the model on full sequences"
        )
    place = given.get("cache_position")
    if isinstance(place, Tensor) and place.numel() and int(place.reshape(-1)[0]) != start:
        raise CaptureError(
            f"cache_position begins at {int(place.reshape(-1)[0])}, and the cache holds {start} positions: leave it out"
        )
    shape = (int(tokens.shape[0]), start + int(tokens.shape[1]))
    mask = given.get("attention_mask")
    if mask is None or (is_ours and not (isinstance(mask, Tensor) and tuple(mask.shape) == shape)):
        known = before[:, : shape[1]]
        later = np.ones((shape[0], shape[1] - known.shape[1]), np.bool_)
        mask_BT: Bools = np.concatenate([np.broadcast_to(known, (shape[0], known.shape[1])), later], axis=1)
    else:
        mask_BT = _mask(given, shape)
    _check_positions(given, mask_BT, start, first_position)
    return _ids(tokens), mask_BT


def _check_positions(given: Mapping[str, object], mask: Bools, start: int, first_position: int) -> None:
    """Refuse positions of a call that goes on and that do not count the tokens of its examples."""
    places = given.get("position_ids")
    if not isinstance(places, Tensor) or places.ndim > _POSITION_AXES:
        return
    n_new = mask.shape[1] - start
    found = _positions(given, (len(mask), n_new))
    expected = (mask.cumsum(-1) - 1 + first_position)[:, start:]
    wrong = mask[:, start:] & (found != expected)
    if found is not None and wrong.any():
        sequence, place = np.argwhere(wrong)[0].tolist()
        raise CaptureError(
            f"position_ids of sequence {sequence} has {found[sequence, place]} at a token whose position is "
            f"{expected[sequence, place]}, counted from {first_position} without padding: a row is filed under the "
            "number of its token, so pass positions that go on from those of the calls before"
        )


def _refuse_past(given: Mapping[str, object]) -> None:
    """Raise CaptureError if the call goes on from an earlier one."""
    for name in _CACHES:
        if name in given and (length := _cached(given[name])):
            held = "the state of earlier calls" if length < 0 else f"{length} positions of earlier calls"
            raise CaptureError(
                f"{name} holds {held}, and a recorded call has to begin its examples: the tokens before are not part "
                f"of the call, so its rows would get wrong positions. Call the model on full sequences. {_GENERATED}"
            )
    place = given.get("cache_position")
    if isinstance(place, Tensor) and place.numel() and int(place.reshape(-1)[0]):
        raise CaptureError(
            f"cache_position begins at {int(place.reshape(-1)[0])}, and a recorded call has to begin its examples at "
            f"0: call the model on full sequences. {_GENERATED}"
        )


def _cached(cache: Any) -> int:
    """Return how many positions a cache holds; -1 for a state whose length is not known, 0 for an empty one."""
    if isinstance(cache, list | tuple):
        return -1 if any(part is not None for part in cache) else 0
    length, has_state = (_answer(cache, name) for name in ("get_seq_length", "has_previous_state"))
    if length:
        return int(length)
    return -1 if has_state or (length is None and has_state is None) else 0


def _answer(cache: Any, name: str) -> Any:
    """Return what a cache answers; None for one that has no layer of the kind that the question is about."""
    try:
        found = getattr(cache, name)
        return found() if callable(found) else found
    except (AttributeError, TypeError, ValueError):
        return None


def _tokens(parameters: Sequence[str], given: Mapping[str, object]) -> Tensor | None:
    """Return the token ids; None for a call without them."""
    if "input_ids" in given or "input_ids" in parameters:
        tokens = given.get("input_ids")
        if tokens is None:
            return None
        if not isinstance(tokens, Tensor) or tokens.ndim != _POSITION_AXES or tokens.dtype not in _TOKEN_TYPES:
            found = _described(tokens)
            raise CaptureError(
                f"the model was called without a tensor of tokens: input_ids is {found}, and a recorded call needs "
                "whole numbers of shape (examples, positions)"
            )
        return tokens
    first = given.get(parameters[0] if parameters else "argument 0")
    is_tokens = isinstance(first, Tensor) and first.ndim == _POSITION_AXES and first.dtype in _TOKEN_TYPES
    known = parameters[:1] and (parameters[0] in _WITHOUT_EFFECT or parameters[0] in _SEGMENTS)
    return first if isinstance(first, Tensor) and is_tokens and not known else None


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _ids(tokens: Tensor) -> Ids:
    found = tokens.detach().cpu().numpy()
    if found.size and not 0 <= found.min() <= found.max() <= np.iinfo(np.int32).max:
        raise CaptureError(
            f"input_ids go from {found.min()} to {found.max()}, and token ids are 0 or more and fit 32 bits"
        )
    ids: Ids = found.astype(np.int32)
    return ids


def _shape_of_embeddings(given: Mapping[str, object]) -> tuple[int, ...] | None:
    embedded = given.get("inputs_embeds")
    return tuple(embedded.shape[:2]) if isinstance(embedded, Tensor) and embedded.ndim > _POSITION_AXES else None


def _mask(given: Mapping[str, object], shape: tuple[int, ...]) -> Bools:
    """Return which positions are tokens, (examples, positions)."""
    mask = given.get("attention_mask")
    if mask is None:
        return np.ones(shape, bool)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        more = f" {_GENERATED}" if isinstance(mask, Tensor) and mask.ndim == _POSITION_AXES else ""
        raise CaptureError(
            f"attention_mask is {found} for input_ids of shape {shape}: a recorded call needs one mask entry per "
            "token, 0 or 1. Masks of more dimensions do not say which positions are tokens; for packed documents pass "
            f"position_ids that begin again at each document.{more}"
        )
    values = mask.detach().cpu()
    is_token = values == 1
    if not bool((is_token | (values == 0)).all()):
        odd = values[~(is_token | (values == 0))].reshape(-1)[0].item()
        raise CaptureError(
            f"attention_mask has the value {odd}, and a recorded call needs 1 for a token and 0 for padding. For "
            "packed documents leave it out, and pass position_ids that begin again at each document."
        )
    if values.is_floating_point() and not bool(is_token.any()):
        raise CaptureError(
            "attention_mask is 0 everywhere and of a floating-point type, so it adds to the scores rather than marking "
            "padding: pass 1 for a token and 0 for padding"
        )
    found_mask: Bools = is_token.numpy()
    return found_mask


def _mask_without_tokens(given: Mapping[str, object]) -> Bools:
    """Return the mask of a call without tokens: one position per example, or those that its own mask has."""
    mask = given.get("attention_mask")
    inputs = [value for name, value in given.items() if name != "attention_mask"]
    first = next((value for value in inputs if isinstance(value, Tensor) and value.ndim), None)
    if first is None:
        raise CaptureError(
            "the model was called without a tensor, so its examples cannot be counted: pass a tensor with one entry "
            "per example"
        )
    if isinstance(mask, Tensor) and mask.ndim == _POSITION_AXES and mask.shape == first.shape[:2]:
        return _mask(given, tuple(mask.shape))
    return np.ones((first.shape[0], 1), bool)


def _positions(given: Mapping[str, object], shape: tuple[int, ...]) -> npt.NDArray[np.int64] | None:
    """Return the model's number of each position, (examples, positions); None if the call has none.

    Models over images number their positions along several axes. Then the first one, which never goes back inside an
    example, shows where examples begin, and what is returned counts positions from there.
    """
    found = given.get("position_ids")
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.is_floating_point():
        raise CaptureError(f"position_ids is {_described(found)}: a recorded call needs whole numbers, one per token")
    planes = found.detach().cpu()
    if planes.ndim > _POSITION_AXES:
        return _positions_of_planes(planes, shape)
    if planes.shape[-1:] != shape[1:] or planes.shape[:-1] not in ((), (1,), shape[:1]):
        raise CaptureError(
            f"position_ids has shape {tuple(found.shape)} for {shape[0]} examples of {shape[1]} positions: a recorded "
            "call needs one per token"
        )
    positions: npt.NDArray[np.int64] = np.broadcast_to(planes.numpy().astype(np.int64), shape)
    return positions


def _positions_of_planes(planes: Tensor, shape: tuple[int, ...]) -> npt.NDArray[np.int64] | None:
    if tuple(planes.shape[1:]) not in (shape, (1, *shape[1:])):
        raise CaptureError(
            f"position_ids has shape {tuple(planes.shape)} for {shape[0]} examples of {shape[1]} positions: a recorded "
            "call needs (axes, examples, positions)"
        )
    first: npt.NDArray[np.int64] = np.broadcast_to(planes[0].numpy().astype(np.int64), shape)
    if len(planes) == _TEXT_PLANE_FIRST or bool((planes == planes[:1]).all()):
        return first
    if (np.diff(first, axis=-1) < 0).any():
        raise CaptureError(
            f"position_ids has {len(planes)} axes, and the first one goes back inside a sequence: where its documents "
            "begin is not clear. Give one document per sequence, or leave position_ids out."
        )
    return None


def _check_holes(parameters: Sequence[str], mask: Bools, positions: npt.NDArray[np.int64] | None) -> None:
    """Refuse a mask with gaps, inside which a model that gets no positions goes on counting."""
    n_runs = (np.diff(mask.astype(np.int8), axis=-1, prepend=0) == 1).sum(-1)
    if positions is None and "position_ids" in parameters and (n_runs > 1).any():
        raise CaptureError(
            f"attention_mask leaves out positions between the tokens of example {int(np.argmax(n_runs > 1))}, and the "
            "model counts them: pass position_ids that count tokens only, (attention_mask.cumsum(-1) - 1).clamp(min=0)"
        )


def _starts(positions: npt.NDArray[np.int64], mask: Bools, first_position: int) -> Bools:
    """Return at which tokens a document begins, (examples, positions)."""
    starts = np.zeros_like(mask)
    for b, tokens in enumerate(mask):
        at = np.flatnonzero(tokens)
        if not len(at):
            continue
        numbers = positions[b, at]
        begins = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
        wrong = begins[numbers[begins] != first_position]
        if len(wrong):
            before = "" if not wrong[0] else f", after {numbers[wrong[0] - 1]}"
            raise CaptureError(
                f"position_ids of sequence {b} has {numbers[wrong[0]]} at its token {wrong[0]}{before}: positions of a "
                f"recorded call count the tokens of each document from {first_position}, because a row is filed under "
                "the number of its token. Call the model on full documents from their first token on."
            )
        starts[b, at[begins]] = True
    return starts


def _check_lengths(given: Mapping[str, object], mask: Bools, starts: Bools | None) -> None:
    """Refuse lengths or numbers of documents that are not those of the positions."""
    begins = np.zeros_like(mask) if starts is None else starts.copy()
    if begins.size:
        begins[:, 0] |= mask[:, 0]
    for name, value in given.items():
        if name == "seq_idx" and isinstance(value, Tensor):
            index = value.detach().cpu().numpy().reshape(mask.shape) if value.numel() == mask.size else None
            changes = None if index is None else np.diff(index, axis=-1, prepend=index[:, :1] - 1) != 0
            agrees = changes is not None and np.array_equal(changes, begins)
        elif _LENGTHS.fullmatch(name) and isinstance(value, Tensor):
            ends = np.append(np.flatnonzero(begins.reshape(-1)), mask.size)
            agrees = value.detach().cpu().reshape(-1).tolist() == ends.tolist()
        else:
            continue
        if not agrees:
            raise CaptureError(
                f"{name} divides the call into other documents than position_ids: pass position_ids that begin again "
                "at each document, and no padding"
            )


def _refuse_mixed_documents(given: Mapping[str, object], *, caches: bool) -> None:
    """Refuse packed documents that transformers would let see each other: with a mask, or with a cache."""
    reason = ""
    if "attention_mask" in given:
        reason = "leave attention_mask out"
    elif given.get("use_cache", caches) or "past_key_values" in given:
        reason = "pass use_cache=False and no cache"
    if reason:
        raise CaptureError(
            "position_ids begin again inside a sequence, so it packs several documents, and with an attention_mask or "
            f"a cache transformers lets each see those before it: {reason}, or give one document per sequence"
        )


def _other_inputs(given: Mapping[str, object], tokens: Tensor | None) -> tuple[str, ...]:
    """Return the names of what the call had beside tokens and mask, and that may change what the model computes."""
    found = []
    for name, value in given.items():
        if value is tokens or name in _WITHOUT_EFFECT or _LENGTHS.fullmatch(name) or not _has_tensor(value):
            continue
        if name in _SEGMENTS and isinstance(value, Tensor) and not bool(value.any()):
            continue
        found.append(name)
    planes = given.get("position_ids")
    if isinstance(planes, Tensor) and planes.ndim > _POSITION_AXES:
        found.append("position_ids")
    return tuple(found)


def _small_numbers(value: object, shape: tuple[int, ...]) -> npt.NDArray[np.int64] | None:
    """Return an input that an archive can keep: whole numbers, one for each example, or few for each token."""
    if not isinstance(value, Tensor) or value.dtype not in _TOKEN_TYPES or not value.numel():
        return None
    by_example = tuple(value.shape) == shape[:1]
    by_token = tuple(value.shape[:2]) == shape and value[0, 0].numel() <= _FEW_NUMBERS
    if not (by_example or (by_token and value.ndim <= _POSITION_AXES + 1)):
        return None
    found: npt.NDArray[np.int64] = value.detach().cpu().numpy().astype(np.int64)
    return found


def _has_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)
