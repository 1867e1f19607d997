"""Hooks written by hand and the state of a model, to compare taps with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from residua.capture.taps.reading import reading
from tests.capture.site_readings import run
from tests.models.tiny import TINY

FAMILIES = pytest.mark.parametrize("name", TINY)


def keep_nothing(_name: str, _tensor: Tensor) -> None:
    return None


def replaced(model: PreTrainedModel, sites: str | list[str], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits after a change at these sites."""
    with reading(model, sites, lambda _name, tensor: change(tensor)) as taps:
        logits = run(model)
        taps.end_forward()
    return logits


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any], *, before: bool = False) -> Iterator[None]:
    """Add a hook as a user would write it by hand."""
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def state_of(model: PreTrainedModel) -> list[object]:
    """Everything about a model and about transformers that reading could change."""
    kinds = [name for name in vars(nn.Module()) if "hooks" in name]
    hooks = [(name, kind, dict(vars(m)[kind])) for name, m in model.named_modules() for kind in kinds]
    forwards = [(name, m.__dict__.get("forward")) for name, m in model.named_modules()]
    weights = [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()]
    registries = [dict(r._global_mapping) for r in (AttentionInterface, AttentionMaskInterface)]
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    return [hooks, forwards, weights, registries, AttentionInterface.get_interface, modes, implementation]
