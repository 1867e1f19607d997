"""A fingerprint of a model's weights: the same on every device, under every wrapper, in every layout.

Weights may be packed: quantised tensors, tensor subclasses that hold other tensors (torchao), and values of a state
dict that are no tensors at all (`torch.ao.quantization`). Each counts by the plain tensors and values in it.
"""

import hashlib
import io
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from residua.capture.identity.four_bit import four_bit_content, is_four_bit, keeping_packed
from residua.capture.layout.parameters import FullParameters
from residua.capture.layout.process_layout import spans_processes
from residua.capture.runtime.collectives import all_gather_objects
from residua.capture.runtime.compat import WRAPPED_CHILDREN, version_of
from residua.capture.runtime.process_groups import pipeline_group
from residua.capture.runtime.sharded import frees_gathered, is_sharded
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.reference_model import reference_model
from residua.store.base.errors import CaptureError
from residua.store.storage.crc import crc32c

_WRAPPERS = re.compile(rf"(^|\.)(?:module|{'|'.join(WRAPPED_CHILDREN)})(?=\.|$)")
_MAX_DEPTH = 16  # of values within values
_Seen = tuple[str, ref[Tensor], int, int]


def weights_fingerprint(model: nn.Module, *, chunk_bytes: int = 64 * 2**20) -> str:
    """Return the sha256 over name, shape, dtype and crc32c of every parameter, persistent buffer and packed value.

    Weights that share one tensor count once, under the name that sorts first. Names are those inside wrappers (DDP,
    FSDP, compile), so that a wrapped model has the fingerprint of the unwrapped one. A collective of all processes
    that hold the model.

    Args:
        model: Any torch module, on any device.
        chunk_bytes: Bytes that are copied to the host at a time.

    Returns:
        64 hexadecimal digits.

    Raises:
        CaptureError: A weight has no values, since it lies on the meta device.

    Example:
        >>> len(weights_fingerprint(nn.Linear(2, 2)))
        64
    """
    lines, stages = _lines(model, chunk_bytes), pipeline_group(model)
    if stages is not None:
        aliases = _aliases(reference_model(cast("PreTrainedModel", core_of(model))))
        lines = _of_all_stages(all_gather_objects(stages, lines), aliases)
    digest = hashlib.sha256()
    for _, line in sorted(lines.items()):
        digest.update(line)
    return digest.hexdigest()


_known: WeakKeyDictionary[nn.Module, tuple[list[_Seen], str, str]] = WeakKeyDictionary()


def known_fingerprint(model: nn.Module, output: str) -> str:
    """Return `weights_fingerprint`; weights that have not changed since the last call are not read again.

    Torch counts the changes of a tensor, but not those through its ``data``: they show in the model's output.

    Args:
        model: As for `weights_fingerprint`.
        output: A digest of what the model computes now.
    """
    seen, known = _seen(model), _known.get(model)
    if seen is None:
        return weights_fingerprint(model)
    if known is not None and known[1] == output and _is_same(known[0], seen):
        return known[2]
    found = weights_fingerprint(model)
    _known[model] = seen, output, found
    return found


class WeightsSeen:
    """The weights of a model at one time, to notice cheaply that they changed since, except through ``data``.

    Weights that are sharded, split, packed or not here are not watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._is_watched = not (frees_gathered(model) or spans_processes(model))
        self._before = _seen(model) if self._is_watched else None

    def have_changed(self) -> bool:
        """Return whether a weight was changed or replaced since this was made."""
        now = None if self._before is None else _seen(self._model)
        return self._before is not None and (now is None or not _is_same(self._before, now))


def _seen(model: nn.Module) -> list[_Seen] | None:
    """Return each weight with what changes when it does; None if that cannot be told for one of them."""
    if pipeline_group(model) is not None or is_sharded(model) or _other_state(model):
        return None
    found: list[_Seen] = []
    for name, tensor in _sorted_weights(model):
        if tensor.is_meta or tensor.is_inference() or isinstance(tensor, DTensor) or _is_packed(tensor):
            return None
        found.append((name, ref(tensor), tensor.data_ptr(), version_of(tensor)))
    return found


def _is_same(before: Sequence[_Seen], after: Sequence[_Seen]) -> bool:
    return len(before) == len(after) and all(
        old[1]() is new[1]() and (old[0], *old[2:]) == (new[0], *new[2:])
        for old, new in zip(before, after, strict=True)
    )


def _of_all_stages(everyone: Sequence[Mapping[str, bytes]], aliases: Container[str]) -> dict[str, bytes]:
    """Join the lines of all pipeline stages; a weight that stages share counts under its first name."""
    lines: dict[str, bytes] = {}
    for name, line in (item for found in everyone for item in found.items() if item[0] not in aliases):
        if lines.setdefault(name, line) != line:
            raise CaptureError(
                f"two pipeline stages have different weights under the name {name!r}: let every stage keep its blocks "
                "under the names that they have in the full model, for example as nn.ModuleDict({'4': block})"
            )
    return lines


def _aliases(model: nn.Module) -> set[str]:
    """Return all names but the first of weights that have several names."""
    seen: set[int | str] = set()
    aliases: set[str] = set()
    tied: dict[str, str] = getattr(core_of(model), "all_tied_weights_keys", {})
    for name, tensor in _sorted_weights(model):
        # an offloaded weight is a separate tensor under each of its names
        keys: set[int | str] = {id(tensor), tied.get(name, name)} if tensor.is_meta else {id(tensor)}
        aliases |= set() if keys.isdisjoint(seen) else {name}
        seen |= keys
    return aliases


def _lines(model: nn.Module, chunk_bytes: int) -> dict[str, bytes]:
    """Return what is hashed of each weight of this process, by name."""
    lines: dict[str, bytes] = {}
    core, parameters = core_of(model), FullParameters(model)
    # FSDP1 gives each name its own tensor
    has_copies = isinstance(model, FullyShardedDataParallel) and isinstance(core, PreTrainedModel)
    aliases = _aliases(reference_model(cast("PreTrainedModel", core)) if has_copies else model)
    for name, tensor in _sorted_weights(model):
        if name in aliases:
            continue
        if _is_packed(tensor):
            pieces = [_content(piece, chunk_bytes) for piece in _pieces(tensor, _MAX_DEPTH)]
            shape = [] if is_four_bit(tensor) else list(tensor.shape)  # the first run changes it
            lines[name] = json.dumps([name, shape, *pieces]).encode() + b"\n"
            continue
        full = parameters.full(name, tensor)
        found = parameters.shards(tensor) if full is None else [list(full.shape), _checksum(full, chunk_bytes)]
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines[name] = json.dumps([name, *found[:1], dtype, *found[1:]]).encode() + b"\n"
    for name, value in _other_state(model):
        pieces = [_content(piece, chunk_bytes) for piece in _pieces(value, _MAX_DEPTH)]
        lines[name] = json.dumps([name, *pieces]).encode() + b"\n"
    return lines


def _is_packed(tensor: Tensor) -> bool:
    """Return whether a tensor is not simply its numbers in memory."""
    if isinstance(tensor, DTensor):
        return False
    if is_four_bit(tensor):
        return True
    return tensor.is_quantized or tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__")


def _content(piece: object, chunk_bytes: int) -> object:
    if not isinstance(piece, Tensor):
        return piece
    dtype = str(piece.dtype).removeprefix("torch.")
    return [list(piece.shape), dtype, _checksum(piece.detach(), chunk_bytes)]


def _pieces(value: object, depth: int) -> Iterator[object]:
    """Yield the plain tensors in `value`, and texts for everything else in it that could matter.

    An object that is none of the known kinds counts by its class: its address must not count.
    """
    if isinstance(value, Tensor) and not _is_packed(value):
        yield value
        return
    yield type(value).__name__
    inner = _inside_tensor(value) if isinstance(value, Tensor) else _inside_value(value)
    if isinstance(inner, str):
        yield inner
    elif depth:
        for one in inner:
            yield from _pieces(one, depth - 1)


def _inside_tensor(tensor: Tensor) -> Sequence[object]:
    if is_four_bit(tensor):
        return four_bit_content(tensor)
    if tensor.is_quantized:
        return str(tensor.qscheme()), tensor.int_repr(), *_quantisation(tensor)
    if tensor.layout != torch.strided:
        return (tensor.to_dense(),)
    names, context = cast("Any", tensor).__tensor_flatten__()
    return (*((name, getattr(tensor, name)) for name in names), context)


def _inside_value(value: object) -> str | Sequence[object]:
    """Return what is in a value that is no tensor: a text for a plain value, values for one that holds others."""
    if isinstance(value, io.BytesIO | bytes | bytearray):
        return hashlib.sha256(value.getvalue() if isinstance(value, io.BytesIO) else value).hexdigest()
    if isinstance(value, Mapping):
        return [(key, value[key]) for key in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return value
    if is_dataclass(value):
        return [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    return str(value) if isinstance(value, _PLAIN_VALUES) else ()


_PLAIN_VALUES = (bool, int, float, str, Enum, torch.dtype, torch.device)


def _quantisation(tensor: Tensor) -> tuple[object, ...]:
    """Return what turns the integers of a quantised tensor of torch into numbers."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return tensor.q_scale(), tensor.q_zero_point()
    return tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()


def _checksum(tensor: Tensor, chunk_bytes: int) -> int:
    """Return the crc32c of a tensor's bytes, of which one chunk at a time is on the host."""
    flat, crc = tensor.reshape(-1), 0
    step = chunk_bytes // tensor.element_size()
    for start in range(0, flat.numel(), step):
        crc = crc32c(flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy(), crc)
    return crc


def _sorted_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in _sorted_state(model) if isinstance(value, Tensor)]


def _other_state(model: nn.Module) -> list[tuple[str, object]]:
    """Return what a state dict holds beside tensors: packed parameters, extra state."""
    return [(name, value) for name, value in _sorted_state(model) if not isinstance(value, Tensor)]


def _sorted_state(model: nn.Module) -> list[tuple[str, object]]:
    with keeping_packed(model):
        state: dict[str, object] = model.state_dict(keep_vars=True)
    four_bit = [f"{name}." for name, value in state.items() if isinstance(value, Tensor) and is_four_bit(value)]
    if four_bit:  # a state dict has their scales once more
        state = {name: value for name, value in state.items() if not name.startswith(tuple(four_bit))}
    inner = {_WRAPPERS.sub("", name).lstrip("."): value for name, value in state.items()}
    unambiguous = inner if len(inner) == len(state) else state
    return sorted(unambiguous.items(), key=lambda pair: pair[0])
