"""Models whose weights are spread over data-parallel workers (FSDP2): their forward pass is a collective of all.

Each worker runs batches of its own, and the activations are whole. But every forward call gathers weights from all
workers, so all must make the same number of calls: they agree before each batch on whether any of them has one.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 spreads the weights of `model` over workers."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """Return a weight as a whole; a collective of all workers if it is spread over them."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full


def plain_class(model: nn.Module) -> type[nn.Module]:
    """Return the class of `model` as it was before FSDP2 put its own in front."""
    kind = type(model)
    if isinstance(model, FSDPModule):
        return next(
            base for base in kind.__mro__[1:] if issubclass(base, nn.Module) and not issubclass(base, FSDPModule)
        )
    return kind


class Agreement:
    """Lets all workers agree, before each batch, on whether any of them has one; a collective."""

    def __init__(self) -> None:
        on_host = "gloo" in str(dist.get_backend())
        self._flag = torch.zeros((), device="cpu" if on_host else torch.device("cuda", torch.cuda.current_device()))

    def __call__(self, has_batch: bool) -> bool:
        """Return whether any worker called this with true."""
        self._flag.fill_(float(has_batch))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        return bool(self._flag.item())
