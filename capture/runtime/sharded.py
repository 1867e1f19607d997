"""Models whose weights are sharded, mostly over data-parallel workers, by FSDP2 or DeepSpeed's ZeRO-3.

There each worker runs its own batches, and has full activations. But every forward pass gathers weights from all
workers, so all workers must run the same number of forward passes (see `Agreement` in
`residua.capture.runtime.collectives`).

FSDP: Zhao et al. 2023, arXiv:2304.11277. ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

import sys
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

ModelT = TypeVar("ModelT", bound=nn.Module)


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 or DeepSpeed's ZeRO-3 shards the weights of `model`."""
    return is_zero3(model) or any(isinstance(module, FSDPModule) for module in model.modules())


def frees_gathered(model: nn.Module) -> bool:
    """Return whether FSDP puts full weights into memory that it frees later, from which they must be copied.

    After a forward pass the weights of the outermost module stay full until they are sharded again, for example by
    ``state_dict``; NumPy arrays of that memory would forbid torch to free it.
    """
    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())


def is_zero3(model: nn.Module) -> bool:
    """Return whether DeepSpeed's ZeRO-3 shards the weights of `model`."""
    return any(_is_of_zero3(parameter) for parameter in model.parameters())


def without_gradients(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which `model` runs without autograd: no_grad if weights are DTensors, or inference mode.

    In inference mode a DTensor runs ``aten.linear`` whole, for which torch 2.13 has no sharding rule: it derives one
    for every new shape of a batch, which takes seconds. With no_grad it runs the matrix products that a linear is made
    of; the values are the same.
    """
    has_dtensors = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return torch.no_grad() if has_dtensors else torch.inference_mode()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a weight, detached; a collective of all workers if the weight is sharded."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full.detach()
    if not _is_of_zero3(tensor):
        return tensor.detach()
    with _deepspeed().zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def full_gradient(parameter: Tensor) -> Tensor | None:
    """Return the full gradient of a weight, None if there is none; a collective like `full_tensor`."""
    if not _is_of_zero3(parameter):
        return None if parameter.grad is None else full_tensor(parameter.grad)
    gradient: Tensor | None = _deepspeed().utils.safe_get_full_grad(parameter)
    return gradient


def _deepspeed() -> Any:
    return sys.modules["deepspeed"]  # not a dependency; it is imported if it made the weight


def _is_of_zero3(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")  # DeepSpeed sets it on each parameter that it shards


def plain_class(model: ModelT) -> type[ModelT]:
    """Return the class of `model`; of a model that FSDP2 shards, the class that it had before `fully_shard`."""
    kinds = type(model).__mro__
    if isinstance(model, FSDPModule):
        kinds = tuple(kind for kind in kinds if issubclass(kind, nn.Module) and not issubclass(kind, FSDPModule))
    return cast("type[ModelT]", kinds[0])
