"""A fingerprint of a model's weights, the same on every device, under every wrapper, in bounded memory."""

import hashlib
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
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

_CHUNK_BYTES = 64 * 2**20  # what is brought to the host at a time
_WRAPPERS = re.compile(r"(^|\.)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


def weights_fingerprint(model: nn.Module) -> str:
    """Return the sha256 over name, shape, type and crc32c of every parameter and persistent buffer.

    Weights that share one tensor count once, under the name that sorts first. Names are those inside
    wrappers (DDP, FSDP, compile), so that a wrapped model has the fingerprint of the bare one. Of a model that is
    spread over several processes this is a collective of them all.

    Args:
        model: Any torch module, on any device.

    Returns:
        64 hexadecimal digits.

    Raises:
        CaptureError: A weight has no values here, since it lies on the meta device.

    Example:
        >>> len(weights_fingerprint(nn.Linear(2, 2)))
        64
    """
    lines, stages = _lines(model), pipeline_group(model)
    if stages is not None:
        others = _other_names(reference_model(cast("PreTrainedModel", core_of(model))))
        lines = _of_all_stages(all_gather_objects(stages, lines), others)
    digest = hashlib.sha256()
    for _, line in sorted(lines.items()):
        digest.update(line)
    return digest.hexdigest()


def _of_all_stages(everyone: Sequence[Mapping[str, bytes]], others: Container[str]) -> dict[str, bytes]:
    """Bring together what the stages of a pipeline have; where they share a weight it counts under its first name."""
    lines: dict[str, bytes] = {}
    for name, line in (item for found in everyone for item in found.items() if item[0] not in others):
        if lines.setdefault(name, line) != line:
            raise CaptureError(
                f"two stages of the pipeline have different weights of the name {name!r}: let every stage keep its "
                "blocks under the names that they have in the whole model, for example as nn.ModuleDict({'4': block})"
            )
    return lines


def _other_names(model: nn.Module) -> set[str]:
    """Further names of weights that have several."""
    seen: set[int | str] = set()
    others: set[str] = set()
    tied = _tied(model)
    for name, tensor in _sorted_weights(model):
        # One that is offloaded stands under each of its names by itself.
        marks: set[int | str] = {id(tensor), tied.get(name, name)} if tensor.is_meta else {id(tensor)}
        others |= set() if marks.isdisjoint(seen) else {name}
        seen |= marks
    return others


def _lines(model: nn.Module) -> dict[str, bytes]:
    """From name to what is hashed of each weight that is here."""
    lines: dict[str, bytes] = {}
    core = core_of(model)
    is_copied = isinstance(model, FullyShardedDataParallel) and isinstance(core, PreTrainedModel)
    # FSDP1 gives each name a tensor of its own
    weights, others = (
        FullParameters(model),
        _other_names(reference_model(cast("PreTrainedModel", core)) if is_copied else model),
    )
    for name, tensor in _sorted_weights(model):
        if name in others:
            continue
        full = weights.full(name, tensor)
        found = weights.shards(tensor) if full is None else [list(full.shape), _checksum(full)]
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines[name] = json.dumps([name, *found[:1], dtype, *found[1:]]).encode() + b"\n"
    return lines


def _tied(model: nn.Module) -> dict[str, str]:
    """From name to name of the weight that a transformers model ties it to."""
    return dict(getattr(core_of(model), "all_tied_weights_keys", {}))


def _checksum(tensor: Tensor) -> int:
    crc = 0
    for part in _host_bytes(tensor):
        crc = crc32c(part, crc)
    return crc


def _sorted_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    state = model.state_dict(keep_vars=True)
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    inner = {_WRAPPERS.sub("", name).lstrip("."): value for name, value in weights.items()}
    unambiguous = inner if len(inner) == len(weights) else weights
    return sorted(unambiguous.items(), key=lambda pair: pair[0])


def _host_bytes(tensor: Tensor) -> Iterator[npt.NDArray[np.uint8]]:
    """The tensor's bytes in order, a chunk at a time."""
    flat = tensor.reshape(-1)
    step = _CHUNK_BYTES // tensor.element_size()
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy()
