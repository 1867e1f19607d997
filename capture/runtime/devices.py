"""The devices that a model runs on, and the values of weights that accelerate offloads.

A model runs on the devices of its weights. Weights that accelerate offloads to the host or to a disk are tensors on the
meta device in the model, without values; accelerate brings them to a device when a module runs.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate.utils import align_module_device  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor, nn

from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.compat import accelerate_hook
from residua.capture.runtime.wrappers import core_of, named_modules
from residua.store.base.errors import CaptureError


def input_device(model: nn.Module) -> torch.device:
    """Return the device for a model's inputs; the CPU for a model without weights."""
    return next(_devices(model), torch.device("cpu"))


def runs_on_cuda(model: nn.Module) -> bool:
    """Return whether any module of a model runs on a CUDA device."""
    return any(device.type == "cuda" for device in _devices(model))


def _devices(model: nn.Module) -> Iterator[torch.device]:
    yield from (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    for module in model.modules():
        hook = accelerate_hook(module)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                yield torch.device(device)


def uploaded(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """Copy a tensor from the host to a device, without waiting for the device's queued work.

    From memory that is not page-locked torch would wait, and the next batch could not be prepared in that time.
    """
    is_cuda = device is not None and torch.device(device).type == "cuda"
    return (tensor.pin_memory() if is_cuda else tensor).to(device, non_blocking=is_cuda)


def with_values(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a weight with its values; an offloaded weight is read from accelerate and returned on the CPU.

    Args:
        model: The model, wrapped or not.
        name: Name of the weight in the bare model.
        tensor: The weight in the model, which may be on the meta device.

    Raises:
        CaptureError: The weight is on the meta device, and accelerate keeps no values of it.
    """
    if not tensor.is_meta:
        return tensor
    path, _, last = name.rpartition(".")
    module = named_modules(model).get(path)
    with nullcontext() if module is None else align_module_device(core_of(module)):
        found = None if module is None else getattr(core_of(module), last)
        if not isinstance(found, Tensor) or found.is_meta:
            raise CaptureError(
                f"weight {name!r}{on_rank()} is on the meta device, and accelerate keeps no values of it: load the "
                "model's weights first"
            )
        return found.detach().cpu()
