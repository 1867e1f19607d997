"""Tiny models with adapters of PEFT in them."""

import warnings
from typing import Any

import peft
import torch
from torch import nn

WIDE = 0.3
"""Standard deviation of the random weights of an adapter, which has to show in every output."""


def lora(*names: str, **settings: Any) -> peft.LoraConfig:
    """Return the config of an adapter in the layers whose path ends in one of `names`."""
    return peft.LoraConfig(**{"target_modules": list(names), "r": 2, "init_lora_weights": False, **settings})


def adapted(model: Any, *configs: Any, names: tuple[str, ...] = ("default", "second"), mixed: bool = False) -> Any:
    """Wrap a model in PEFT's model with one adapter for each config; the first one is active."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for a name that will go
        wrapped: Any = peft.get_peft_model(model, configs[0], adapter_name=names[0], mixed=mixed)
        for name, config in zip(names[1:], configs[1:], strict=False):
            wrapped.add_adapter(name, config)
    return _with_random_adapters(wrapped)


def _with_random_adapters(model: Any) -> Any:
    """Give every weight of an adapter the same random numbers each time, and evaluate."""
    generator = torch.Generator().manual_seed(4)
    markers = ("lora_", "ia3_", "modules_to_save", "hada_", "trainable_tokens_delta", "adaption_", "oft_")
    with torch.no_grad():
        for name, weight in sorted(nn.Module.named_parameters(model)):
            if any(marker in name for marker in markers):
                weight.add_(WIDE * torch.randn(weight.shape, generator=generator))
    return model.train(False)
