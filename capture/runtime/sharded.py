"""Models whose weights are spread over data-parallel workers (FSDP2, ZeRO-3): each forward pass is a collective.

Each worker runs batches of its own, and the activations are whole. But every forward call gathers weights from all
workers, so all must make the same number of calls: they agree before each batch on whether any of them has one.
"""

import sys
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 or DeepSpeed's ZeRO-3 spreads the weights of `model` over workers."""
    return is_zero3(model) or any(isinstance(module, FSDPModule) for module in model.modules())


def is_zero3(model: nn.Module) -> bool:
    """Say whether DeepSpeed's ZeRO-3 spreads the weights of `model` over workers."""
    return any(_is_of_zero3(parameter) for parameter in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a weight as a whole, detached; a collective of all workers if it is spread over them."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full.detach()
    if not _is_of_zero3(tensor):
        return tensor.detach()
    with _deepspeed().zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def full_gradient(parameter: Tensor) -> Tensor | None:
    """Return the gradient of a weight as a whole, None if there is none; a collective as `full_tensor` is."""
    if not _is_of_zero3(parameter):
        return None if parameter.grad is None else full_tensor(parameter.grad)
    gradient: Tensor | None = _deepspeed().utils.safe_get_full_grad(parameter)
    return gradient


def _deepspeed() -> Any:
    return sys.modules["deepspeed"]  # no dependency of ours; it is there if a weight is of its making


def _is_of_zero3(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")  # DeepSpeed's mark on each parameter that it cuts up


def plain_class(model: nn.Module) -> type[nn.Module]:
    """Return the class of `model` as it was before FSDP2 put its own in front."""
    kind = type(model)
    if isinstance(model, FSDPModule):
        return next(
            base for base in kind.__mro__[1:] if issubclass(base, nn.Module) and not issubclass(base, FSDPModule)
        )
    return kind
