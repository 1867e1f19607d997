"""What is inside wrappers: the model that DDP, FSDP, compile and the like stand around, under its own names.

A wrapper holds the wrapped module as a child of a fixed name, so the names of `named_modules` grow parts such as
``module`` or ``_fsdp_wrapped_module``. Here they do not: a wrapped module has the name that it has in the bare
model. What is named is the wrapper, since what enters and leaves it is what the model around it sees.

FSDP2 and transformers' own parallelism wrap nothing: they change the model's class or its modules' forward.
"""

from collections.abc import Iterator

from torch import nn
from torch.nn import DataParallel
from torch.nn.parallel import DistributedDataParallel

from residua.store.base.errors import CaptureError

_BY_ATTRIBUTE = ("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_orig_mod")
_ENGINES = ("DeepSpeedEngine", "PipelineEngine", "InferenceEngine")  # known by name: the library is not imported


def inside(module: nn.Module) -> nn.Module | None:
    """Return what a wrapper wraps; None for a module that is no wrapper.

    Raises:
        CaptureError: The wrapper runs copies of the model on parts of each batch.
    """
    if isinstance(module, DataParallel) and len(module.device_ids) > 1:
        raise CaptureError(
            f"the model is wrapped in nn.DataParallel over {len(module.device_ids)} devices, which runs a copy on "
            "a part of each batch, one thread a device, so that no site is whole anywhere. Use the model inside "
            "(model.module), or one process a device and DistributedDataParallel"
        )
    if isinstance(module, DistributedDataParallel | DataParallel) or type(module).__name__ in _ENGINES:
        return module.get_submodule("module")
    children = module._modules  # and not named_children(): this is asked of every module of a model
    return next((children[name] for name in _BY_ATTRIBUTE if children.get(name) is not None), None)


def core_of(model: nn.Module) -> nn.Module:
    """Return the model inside any number of wrappers; the model itself where there is none.

    Example:
        >>> bare = nn.Linear(2, 2)
        >>> core_of(torch.compile(bare)) is bare
        True
    """
    inner = inside(model)
    return model if inner is None else core_of(inner)


def named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model under the names that they have without wrappers.

    Args:
        model: Any module; wrappers around it, and around modules in it, leave no trace in the names.

    Returns:
        From dotted path to module, outer ones first, the core itself under the empty path. Where a module in
        the core is wrapped, its wrapper stands for it.
    """
    core = core_of(model)
    return {"": core, **dict(_below(core, "", {id(core)}))}


def _below(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in core_of(module).named_children():
        if id(child) not in seen:  # a module that stands in two places has the first name, as in torch
            seen.add(id(child))
            yield path + name, child
            yield from _below(child, f"{path}{name}.", seen)
