"""The reference model follows the model that it stands for."""

import torch
from torch import nn

from residua.capture.sites.reference_model import reference_model, unsharded_shapes
from tests.models.tiny import TINY


def test_it_is_built_once_and_anew_when_the_model_changes() -> None:
    model = TINY["llama"]()
    first = reference_model(model)
    assert reference_model(model) is first
    assert unsharded_shapes(model)["lm_head.weight"] == (97, 32)
    model.resize_token_embeddings(120)
    assert unsharded_shapes(model)["lm_head.weight"] == (120, 32)
    nn.Module.to(model, torch.bfloat16)
    assert reference_model(model).dtype == torch.bfloat16
