"""Tiny models over images with random weights, built from configs without any download; no two blocks are alike.

`VISION` maps a name to a function that builds a model of 32 x 32 pixels in patches of 8 x 8: four rows and columns.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

LAYERS = 3
GRID = 4
PATCH = 8
SIZE = GRID * PATCH

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}


def build(make: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model in evaluation mode, seeded, with weights far from those at the start of training."""
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    model = make(config)
    model.train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    torch.random.set_rng_state(state)
    return model


VISION: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: build(hf.ViTForImageClassification, hf.ViTConfig(**_SIZES)),
    "deit": lambda: build(hf.DeiTModel, hf.DeiTConfig(**_SIZES)),
    "dinov2": lambda: build(hf.Dinov2Model, hf.Dinov2Config(**_SIZES)),
    "dinov2_with_registers": lambda: build(hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(**_SIZES)),
    "clip_vision": lambda: build(hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig(**_SIZES)),
    "siglip_vision": lambda: build(hf.SiglipVisionModel, hf.SiglipVisionConfig(**_SIZES)),
    "beit": lambda: build(hf.BeitModel, hf.BeitConfig(**_SIZES, use_relative_position_bias=True)),
    "yolos": lambda: build(hf.YolosModel, hf.YolosConfig(**{**_SIZES, "image_size": [SIZE, SIZE]})),
}
FIRST_PATCH = {"deit": 2, "dinov2_with_registers": 5, "siglip_vision": 0}
"""Position of the first patch, where it is not 1."""


def pixels(n_images: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """Return random images, (images, 3, height, width)."""
    return torch.randn(n_images, 3, height, width, generator=torch.Generator().manual_seed(3))
