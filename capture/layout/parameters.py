"""One whole parameter of a model whose parameters are split, sharded or offloaded."""

from contextlib import AbstractContextManager, nullcontext

from accelerate.utils import align_module_device  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.sharded import whole, whole_gradient
from residua.capture.runtime.wrappers import core_of, named_parts
from residua.store.base.errors import CaptureError


def whole_parameter(model: nn.Module, name: str, *, gradient: bool = False) -> Tensor:
    """Return a copy of one parameter, whole, or of its gradient.

    Every process that shares the model has to ask for it, and each gets all of it.

    Args:
        model: Any torch module, wrapped, sharded (FSDP, ZeRO-3, tensor parallel) or offloaded (``device_map``).
        name: Name of the parameter in the bare model, for example ``model.layers.3.mlp.up_proj.weight``.
        gradient: Whether its gradient is wanted.

    Returns:
        A detached tensor of the shape that it has in the unsharded model.

    Raises:
        CaptureError: There is no such parameter in this process, or it has no gradient.

    Example:
        >>> whole_parameter(nn.Sequential(nn.Linear(2, 3)), "0.weight").shape
        torch.Size([3, 2])
    """
    path, _, last = name.rpartition(".")
    parts = named_parts(model)
    if path not in parts:
        raise CaptureError(
            f"The parameter {name!r} was asked for{on_rank()}, and {type(core_of(model)).__name__} has no module "
            f"{path!r} here. Take a name from the bare model's named_parameters()."
        )
    module = core_of(parts[path])
    with _gathered_fsdp1(model, gradients=gradient), align_module_device(module):
        parameter = getattr(module, last, None)
        if not isinstance(parameter, Tensor):
            raise CaptureError(
                f"The parameter {name!r} was asked for{on_rank()}, and there is no such parameter there."
            )
        tensor = whole_gradient(parameter) if gradient else whole(parameter)
        if tensor is None:
            raise CaptureError(f"The parameter {name!r} was asked for{on_rank()}, and there is no gradient.")
        return tensor.clone()


def _gathered_fsdp1(model: nn.Module, *, gradients: bool) -> AbstractContextManager[None]:
    if not isinstance(model, FullyShardedDataParallel):
        return nullcontext()
    return FullyShardedDataParallel.summon_full_params(model, writeback=False, with_grads=gradients)
