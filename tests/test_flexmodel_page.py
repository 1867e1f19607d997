"""Run Residua's code of docs/flexmodel.md."""

from typing import Any

import torch
from torch import nn

import residua
from tests.models.tiny import TINY
from tests.pages import blocks, run


def residua_blocks() -> list[str]:
    """Return every block that uses Residua."""
    return [block for block in blocks("docs/flexmodel.md") if "residua." in block]


def test_every_block_does_what_the_page_says() -> None:
    model = TINY["llama"]()
    inputs = torch.arange(3, 13)[None]
    names: dict[str, Any] = {"model": model, "inputs": inputs, "residua": residua, "nn": nn}
    with torch.no_grad():
        before = model(inputs).logits
    assert len(residua_blocks()) == 7
    run(residua_blocks(), names)
    up = model.get_submodule("model.layers.1.mlp.up_proj").weight
    assert isinstance(up, torch.Tensor)
    assert names["activations"]["mlp_out.1"].shape == (1, 10, 32)
    assert not torch.equal(names["logits"], before)
    assert names["seen"].keys() == {"resid_post.0"}
    assert names["values"].keys() == names["gradients"].keys()
    assert names["lens"].weight.grad.any()
    assert torch.equal(names["weight"], up)
    assert up.grad is not None
    assert torch.equal(names["gradient"], up.grad)
    assert torch.equal(names["plain"], before)
    assert torch.equal(names["edited"], names["edited_again"])
    assert not torch.equal(names["edited"], before)
