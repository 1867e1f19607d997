"""Wrappers around a model, compiled models, and the bare model inside them.

A wrapper (DDP, FSDP, `torch.compile`, checkpointing, PEFT) holds the wrapped module as a child of a fixed name, so the
names of `named_modules` contain parts such as ``module`` or ``_fsdp_wrapped_module``. The names used here do not: a
wrapped module has the name that it has in the bare model. `named_modules` returns the wrapper under that name, because
the model around it sees what enters and leaves the wrapper. FSDP2 and transformers' own parallelism wrap nothing: they
change the model's class or the forward method of its modules.

Compiled code ignores hooks that are added after the first compiled call, and hooks that are added before it break the
graph. A capture or a tap therefore runs everything uncompiled that torch.compile made: modules, their methods, and
functions that a forward calls, wherever they are kept. transformers' flex attention stays compiled: no hook lies in it.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn import DataParallel
from torch.nn.parallel import DistributedDataParallel

from residua.capture.runtime import compat
from residua.store.base.errors import CaptureError, PlanError

ModelT = TypeVar("ModelT", bound=nn.Module)

# By name, as below: PEFT's wrappers, and what lies between them and the model.
_ADAPTED, _TUNERS = ("PeftModel", "PeftMixedModel"), ("BaseTuner", "AdaptionPromptModel")
_OWN_FORWARD = ("XLORA", "POLY", "SHADOW")  # kinds whose wrapper does more than run the model
_ENGINES = ("DeepSpeedEngine", "PipelineEngine", "InferenceEngine")  # compared by name: the library is optional


def inside(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper wraps; None for a module that is no wrapper.

    Raises:
        CaptureError: The wrapper runs copies of the model on slices of each batch, or adds to what the model is given.
    """
    kind: type = type(module)
    child, is_adapted = _wrapped_child(kind)
    if is_adapted:
        _refuse_added_inputs(module)
    if isinstance(module, DataParallel) and len(module.device_ids) > 1:
        raise CaptureError(
            f"the model is wrapped in nn.DataParallel over {len(module.device_ids)} devices, which runs a copy of it "
            "on a slice of each batch, so no device has the full tensor of a site. Use the model inside "
            "(model.module), or one process for each device with DistributedDataParallel"
        )
    if child:
        return module.get_submodule(child)
    children = compat.children_by_name(module)
    return next((children[name] for name in compat.WRAPPED_CHILDREN if children.get(name) is not None), None)


@lru_cache(maxsize=4096)
def _wrapped_child(kind: type) -> tuple[str, bool]:
    """Return where modules of a class keep what they wrap, empty unless the class says so, and whether PEFT wraps it.

    A walk through a large model asks this of every module of it.
    """
    names = {base.__name__ for base in kind.__mro__}
    if not names.isdisjoint(_ADAPTED):
        return "base_model", True
    if not names.isdisjoint(_TUNERS):
        return "model", False
    wraps = issubclass(kind, DistributedDataParallel | DataParallel) or kind.__name__ in _ENGINES
    return "module" if wraps else "", False


def _refuse_added_inputs(adapted: nn.Module) -> None:
    """Raise CaptureError if PEFT does more than run the model with its adapters in it."""
    for name in cast("Any", adapted).active_adapters:
        config = cast("Any", adapted).peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning or kind in _OWN_FORWARD or getattr(config, "alora_invocation_tokens", None):
            raise CaptureError(
                f"the model is wrapped in {type(adapted).__name__} with {kind} (adapter {name!r}), which acts on the "
                "inputs of the model and not on its modules: its own tokens, or several passes, have no rows of the "
                "dataset. Use adapters that lie in the modules (LoRA, IA3, OFT and their like), or the model inside "
                "(model.get_base_model())"
            )


def layer_inside(module: nn.Module) -> nn.Module:
    """Return the layer around which PEFT put an adapter; any other module itself.

    Unlike a wrapper around a model, an adapter changes what the layer computes.
    """
    for name in ("base_layer", "original_module"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return layer_inside(inner)
    return module


def core_of(model: nn.Module) -> nn.Module:
    """Return the model inside any number of wrappers; the model itself if there is no wrapper.

    Example:
        >>> bare = nn.Linear(2, 2)
        >>> core_of(torch.compile(bare)) is bare
        True
    """
    inner = inside(model)
    return model if inner is None else core_of(inner)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model under the names that they have without wrappers.

    Args:
        model: Any module; wrappers around it, and around modules in it, do not appear in the names.

    Returns:
        From dotted path to module, outer modules first, the model inside the wrappers under the empty path. If a
        module in it is wrapped, the wrapper is returned under the module's name.
    """
    core = core_of(model)
    found = {"": core}
    _add_below(core, "", {id(core)}, found)
    return found


def _add_below(module: nn.Module, path: str, seen: set[int], found: dict[str, nn.Module]) -> None:
    for name, child in compat.children_by_name(core_of(module)).items():
        if child is not None and id(child) not in seen:  # one that occurs twice has its first name, as in torch
            seen.add(id(child))
            found[path + name] = child
            _add_below(child, f"{path}{name}.", seen, found)


def first_name(model: nn.Module, name: str) -> str:
    """Return the name that `named_modules` gives a module that is shared, for any of its names; empty if none has it.

    Example:
        >>> shared = nn.Linear(2, 2)
        >>> first_name(nn.Sequential(shared, nn.ReLU(), shared), "2")
        '0'
    """
    module: nn.Module | None = core_of(model)
    for part in name.split("."):
        module = None if module is None else compat.children_by_name(core_of(module)).get(part)
    return next((path for path, found in named_modules(model).items() if found is module), "") if module else ""


def is_compiled(model: nn.Module) -> bool:
    """Return whether `model` or a module in it is compiled: by `torch.compile`, in place, or a method of it alone."""
    return any(
        isinstance(module, compat.CompiledModule)
        or compat.is_compiled_in_place(module)
        or compat.is_compiled_function(module.forward)
        or any(compat.is_compiled_function(value) for value in vars(module).values())
        for module in model.modules()
    )


class _Uncompiled:
    """Counts the contexts that want modules to run uncompiled: the stance is global, and they end in any order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_contexts = 0
        self._stance = ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._n_contexts:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
                self._stance.enter_context(compat.compiled_flex_attention())
            self._n_contexts += 1

    def leave(self) -> None:
        with self._lock:
            self._n_contexts -= 1
            if not self._n_contexts:
                self._stance.close()


_uncompiled = _Uncompiled()


@contextmanager
def uncompiled_loop() -> Iterator[None]:
    """Let everything that torch.compile made run uncompiled, wherever a model or the loop around it calls it."""
    _uncompiled.enter()
    try:
        yield
    finally:
        _uncompiled.leave()


@contextmanager
def running_uncompiled(model: nn.Module) -> Iterator[bool]:
    """Let a model run uncompiled; yield whether it, or a module in it, is compiled."""
    with uncompiled_loop():
        yield is_compiled(model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, so that a forward pass uses no random numbers and updates no statistics."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def refuse_compiled(model: nn.Module) -> None:
    """Raise CaptureError if `model` is compiled: the user's own loop would run the compiled code."""
    if is_compiled(model):
        raise CaptureError(
            "the model is compiled, and compiled code ignores hooks: record with the model as it was before "
            "torch.compile (model._orig_mod), or build it without compile()"
        )


def replica_of(model: ModelT) -> ModelT:
    """Return the model inside the wrappers of DDP, DeepSpeed, PEFT and `torch.compile`: the replica that is captured.

    The forward pass of DDP communicates with the other workers, and would wait for a worker that has fewer batches.

    Raises:
        PlanError: Another wrapper shards the model over processes.
    """
    inner: nn.Module = model
    while (wrapped := inside(inner)) is not None:
        is_transparent = isinstance(inner, compat.CompiledModule | DistributedDataParallel)
        names = {kind.__name__ for kind in type(inner).__mro__}
        if not is_transparent and names.isdisjoint(("DeepSpeedEngine", *_ADAPTED, *_TUNERS)):
            raise PlanError(
                f"the model is wrapped in {type(inner).__name__}: capture the model inside, or shard it with FSDP2 "
                "(fully_shard), which wraps nothing"
            )
        inner = wrapped
    return cast("ModelT", inner)
