"""A fingerprint of a model's weights: the same on every device, under every wrapper, in every layout."""

import hashlib
import json
import re
from collections.abc import Container, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from residua.capture.layout.parameters import FullParameters
from residua.capture.runtime.collectives import all_gather_objects
from residua.capture.runtime.process_groups import pipeline_group
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.reference_model import reference_model
from residua.store.base.errors import CaptureError
from residua.store.storage.crc import crc32c

_WRAPPERS = re.compile(r"(^|\.)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


def weights_fingerprint(model: nn.Module, *, chunk_bytes: int = 64 * 2**20) -> str:
    """Return the sha256 over name, shape, dtype and crc32c of every parameter and persistent buffer.

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
        full = parameters.full(name, tensor)
        found = parameters.shards(tensor) if full is None else [list(full.shape), _checksum(full, chunk_bytes)]
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines[name] = json.dumps([name, *found[:1], dtype, *found[1:]]).encode() + b"\n"
    return lines


def _checksum(tensor: Tensor, chunk_bytes: int) -> int:
    """Return the crc32c of a tensor's bytes, of which one chunk at a time is on the host."""
    flat, crc = tensor.reshape(-1), 0
    step = chunk_bytes // tensor.element_size()
    for start in range(0, flat.numel(), step):
        crc = crc32c(flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy(), crc)
    return crc


def _sorted_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    state = model.state_dict(keep_vars=True)
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    inner = {_WRAPPERS.sub("", name).lstrip("."): value for name, value in weights.items()}
    unambiguous = inner if len(inner) == len(weights) else weights
    return sorted(unambiguous.items(), key=lambda pair: pair[0])
