"""One whole parameter of a model whose parameters are split, sharded or offloaded."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from accelerate.utils import align_module_device  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from residua.capture.layout.gather import gathered
from residua.capture.layout.layouts import Layout, Shape, ShardReport
from residua.capture.runtime.collectives import everyones, on_rank
from residua.capture.runtime.devices import with_values
from residua.capture.runtime.process_groups import group_by_hand
from residua.capture.runtime.sharded import whole, whole_gradient
from residua.capture.runtime.wrappers import core_of, named_parts
from residua.capture.sites.reference_model import whole_weights
from residua.store.base.errors import CaptureError
from residua.store.storage.crc import crc32c


def full_parameter(model: nn.Module, name: str, *, gradient: bool = False) -> Tensor:
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
        >>> full_parameter(nn.Sequential(nn.Linear(2, 3)), "0.weight").shape
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


class FullParameters:
    """Gives weights of one model as wholes; each question is a collective of those that hold it.

    Args:
        model: Any model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._group = group_by_hand(model)
        self._shapes = {} if self._group is None else whole_weights(model)

    def whole(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a weight as a whole, detached; None if the ranks have parts of it and it is not known how.

        Args:
            name: Its name in the bare model.
            tensor: What this process has of it.
        """
        if self._group is None or isinstance(tensor, DTensor):
            return whole(with_values(self._model, name, tensor))
        local = tensor.detach()
        layout = infer_layout(self._told(local, self._group), self._shapes.get(name))
        return None if layout is None else gathered(local, layout, self._group)

    def parts(self, tensor: Tensor) -> list[tuple[Shape, int]]:
        """Return shape and crc32c of what each rank has, in their order."""
        return [(part.shape, part.checksum) for part in self._told(tensor.detach(), self._group)]

    def _told(self, local: Tensor, group: ProcessGroup | None) -> list[ShardReport]:
        checksum = crc32c(local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return everyones(group, ShardReport(dist.get_rank(), tuple(local.shape), str(local.dtype), checksum))


def infer_layout(parts: list[ShardReport], shape: Shape | None) -> Layout | None:
    """Return how a weight lies from what the ranks say of it and the shape of the whole; None if that does not tell."""
    shapes = [part.shape for part in parts]
    if len({(part.shape, part.dtype, part.checksum) for part in parts}) == 1 and shape in (None, shapes[0]):
        return Layout()
    if shape is None or {len(part) for part in shapes} != {len(shape)}:
        return None
    split = [axis for axis, size in enumerate(shape) if any(part[axis] != size for part in shapes)]
    if len(split) != 1:
        return None
    sizes = tuple(part[split[0]] for part in shapes)
    return Layout(split[0], sizes) if sum(sizes) == shape[split[0]] else None
