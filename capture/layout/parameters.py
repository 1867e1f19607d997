"""Full parameters of a model whose parameters are split, sharded or offloaded."""

from contextlib import AbstractContextManager, nullcontext

from accelerate.utils import align_module_device  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from residua.capture.layout.gather import gathered
from residua.capture.layout.layouts import Layout, Shape, infer_layout, shard_reports
from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.devices import with_values
from residua.capture.runtime.process_groups import declared_group_of
from residua.capture.runtime.sharded import full_gradient, full_tensor
from residua.capture.runtime.wrappers import core_of, named_modules
from residua.capture.sites.reference_model import unsharded_shapes
from residua.store.base.errors import CaptureError


def full_parameter(model: nn.Module, name: str, *, gradient: bool = False) -> Tensor:
    """Return a copy of one full parameter, or of its full gradient.

    Every process that shares the model has to call this; each gets the full tensor.

    Args:
        model: Any torch module, wrapped, sharded (FSDP, ZeRO-3, tensor parallel) or offloaded (``device_map``).
        name: Name of the parameter in the unwrapped model, for example ``model.layers.3.mlp.up_proj.weight``.
        gradient: Return the gradient instead of the value.

    Returns:
        A detached tensor of the shape that the parameter has in the unsharded model.

    Raises:
        CaptureError: This process has no such parameter, or the parameter has no gradient.

    Example:
        >>> full_parameter(nn.Sequential(nn.Linear(2, 3)), "0.weight").shape
        torch.Size([3, 2])
    """
    asked = f"The parameter {name!r} was asked for{on_rank()}"
    path, _, last = name.rpartition(".")
    modules = named_modules(model)
    if path not in modules:
        raise CaptureError(
            f"{asked}, and {type(core_of(model)).__name__} has no module {path!r} here. Take a name from the unwrapped "
            "model's named_parameters()."
        )
    module = core_of(modules[path])
    with _gathered_fsdp1(model, gradients=gradient), align_module_device(module):
        parameter = getattr(module, last, None)
        if not isinstance(parameter, Tensor):
            raise CaptureError(f"{asked}, and there is no such parameter in the module {path!r}.")
        tensor = full_gradient(parameter) if gradient else full_tensor(parameter)
        if tensor is None:
            raise CaptureError(f"{asked}, and it has no gradient. Call backward() first.")
        return tensor.clone()


def _gathered_fsdp1(model: nn.Module, *, gradients: bool) -> AbstractContextManager[None]:
    if not isinstance(model, FullyShardedDataParallel):
        return nullcontext()
    return FullyShardedDataParallel.summon_full_params(model, writeback=False, with_grads=gradients)


class FullParameters:
    """Gives full parameters of one model, also of one that was split by hand; each call is a collective.

    Args:
        model: Any model; all processes that hold it have to ask.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._group = declared_group_of(model)
        self._shapes = {} if self._group is None else unsharded_shapes(model)

    def full(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a full parameter, detached; None if the ranks have shards of it and their layout is unknown.

        Args:
            name: Its name in the unwrapped model.
            tensor: What this process has of it.
        """
        if self._group is None or isinstance(tensor, DTensor):
            return full_tensor(with_values(self._model, name, tensor))
        layout = infer_layout(shard_reports(tensor, self._group), self._shapes.get(name), n_free_axes=0)
        return gathered(tensor.detach(), layout, self._group) if isinstance(layout, Layout) else None

    def shards(self, tensor: Tensor) -> list[tuple[Shape, int]]:
        """Return shape and crc32c of each rank's shard, in their order."""
        return [(report.shape, report.checksum) for report in shard_reports(tensor, self._group)]
