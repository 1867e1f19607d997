"""Models whose weights are spread over data-parallel workers (FSDP2, ZeRO-3): each forward pass is a collective.

Each worker runs batches of its own, and the activations are whole. But every forward call gathers weights from all
workers, so all must make the same number of calls: they agree before each batch on whether any of them has one.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from residua.capture.runtime.process_groups import device_of
from residua.store.base.errors import CaptureError

BatchT = TypeVar("BatchT")


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 or DeepSpeed's ZeRO-3 spreads the weights of `model` over workers."""
    return is_zero3(model) or any(isinstance(module, FSDPModule) for module in model.modules())


def is_zero3(model: nn.Module) -> bool:
    """Say whether DeepSpeed's ZeRO-3 spreads the weights of `model` over workers."""
    return any(_is_of_zero3(parameter) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a weight as a whole, detached; a collective of all workers if it is spread over them."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full.detach()
    if not _is_of_zero3(tensor):
        return tensor.detach()
    with _deepspeed().zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def whole_gradient(parameter: Tensor) -> Tensor | None:
    """Return the gradient of a weight as a whole, None if there is none; a collective as `whole` is."""
    if not _is_of_zero3(parameter):
        return None if parameter.grad is None else whole(parameter.grad)
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


def failed_together(error: RuntimeError, *, safe: str = "committed") -> CaptureError:
    """Return what to raise where a forward pass, or an agreement on it, failed that several processes share.

    Args:
        error: How it failed.
        safe: What has to have become of work that is not lost.
    """
    return CaptureError(
        "the forward pass failed, perhaps because another process that holds this model died: "
        f"{(str(error).splitlines() or [''])[0]}. What was {safe} before is safe; run the same command again "
        "to go on."
    )


class Agreement:
    """Lets all workers agree, before each batch, on whether any of them has one; a collective."""

    def __init__(self) -> None:
        self._flag = torch.zeros((), device=device_of(None))

    def __call__(self, has_batch: bool) -> bool:
        """Return whether any worker called this with true.

        Raises:
            CaptureError: Another worker is gone.
        """
        self._flag.fill_(float(has_batch))
        try:
            dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
            return bool(self._flag.item())
        except RuntimeError as error:
            raise failed_together(error) from error


def in_step(batches: Iterator[BatchT | None], agree: Callable[[bool], bool]) -> Iterator[BatchT | None]:
    """Yield the batches, then None as long as any other worker has one; no worker takes over from another."""
    batch = next(batches, None)
    while agree(batch is not None):
        yield batch
        batch = None if batch is None else next(batches, None)
