"""Adapters as PEFT makes them: layers and wrappers of the same names and attributes, without the library."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class BaseTunerLayer:
    """Marks a layer that holds adapters."""


class LoraLinear(nn.Module, BaseTunerLayer):
    """A linear layer with one adapter of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        generator = torch.Generator().manual_seed(base.in_features)
        self.lora_A = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.lora_B = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))
        self.scaling = {"default": 0.5}
        self.merged_adapters: list[str] = []
        self._active_adapter = "default"
        self._disable_adapters = False

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.base_layer(hidden)
        if self._disable_adapters:
            return out
        return out + self.scaling["default"] * (hidden @ self.lora_A.T @ self.lora_B.T)


class BaseTuner(nn.Module):
    """What PEFT puts between its wrapper and the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class PeftModel(nn.Module):
    """PEFT's wrapper around a model with adapters in it, or, for prompt learning, around the model itself."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__()
        asked = {"is_prompt_learning": False, "peft_type": "LORA", **settings}
        self.base_model = model if asked["is_prompt_learning"] else BaseTuner(model)
        self.active_peft_config = SimpleNamespace(**asked)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.base_model
        return (inner.model if isinstance(inner, BaseTuner) else inner)(*args, **kwargs)


def add_adapter(model: nn.Module, *names: str) -> list[LoraLinear]:
    """Put an adapter into the linear layers whose path ends in one of `names`, and return them."""
    layers = []
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith(names):
            parent, _, last = path.rpartition(".")
            layers.append(LoraLinear(module).eval())
            setattr(model.get_submodule(parent), last, layers[-1])
    model.peft_config = {"default": SimpleNamespace(peft_type="LORA", r=2, target_modules=set(names), bias=None)}  # type: ignore[assignment]  # as PEFT does
    return layers
