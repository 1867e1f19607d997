"""The logit lens over archives of models whose LM head was found by looking: it reads the logits of plain calls."""

import base64
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import residua
from tests.analysis.page.conftest import registered
from tests.models.registries import build

EXAMPLES = [[5, 9, 30, 7, 12, 41], [6, 11, 4, 77]]

MODELS = {
    "causal/granite": "model",  # logits are scaled
    "causal/bloom": "transformer",  # a layer norm
    "vision-language/gemma3": "model.language_model",  # a text model inside a multimodal one
    "vision-language/qwen2_vl": "model.language_model",
}
"""From a type to the path of the model that holds its blocks."""


def lively(name: str) -> Any:
    """Return a model whose norms differ from ones and whose blocks move its logits."""
    registry, _, key = name.partition("/")
    model: Any = build(registry, key)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits_of(model: Any, ids: list[int]) -> Tensor:
    """Return the logits of a plain call, (tokens, vocabulary)."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    return logits


def with_one_block(model: Any, path: str) -> Any:
    """Return a copy of a model that ends after its first block: its logits are those of the logit lens there."""
    cut = deepcopy(model)
    inner: Any = cut.get_submodule(path)
    name = "h" if hasattr(inner, "h") else "layers"
    setattr(inner, name, nn.ModuleList(list(getattr(inner, name))[:1]))
    inner.config.num_hidden_layers = 1
    return cut


@pytest.mark.parametrize("name", MODELS)
def test_readouts_of_a_page_are_the_tokens_of_plain_logits(name: str, tmp_path: Path) -> None:
    model = lively(name)
    archive = residua.capture_dataset(
        model, EXAMPLES, out=tmp_path / "a.zarr", sites="resid_post.0,resid_post.2"
    ).archive
    residua.page(archive, tmp_path / "page")
    files = registered(tmp_path / "page", "archive")["files"]["readouts"]
    assert set(files) == {"resid_post.0", "resid_post.2"}
    for site, source in (("resid_post.2", model), ("resid_post.0", with_one_block(model, MODELS[name]))):
        stored = registered(tmp_path / "page", files[site].removeprefix("data/").removesuffix(".js"))
        shares = torch.cat([logits_of(source, ids).double().softmax(-1) for ids in EXAMPLES])
        best = shares.topk(stored["k"])
        tokens, found = (
            np.frombuffer(base64.b64decode(stored[key]), dtype).reshape(-1, stored["k"])
            for key, dtype in (("tokens", "<i4"), ("probabilities", "<f4"))
        )
        np.testing.assert_allclose(found, best.values, rtol=1e-3)
        assert (tokens == best.indices.numpy()).mean() > 0.95  # two tokens may be as likely, to rounding
    assert not torch.allclose(logits_of(model, EXAMPLES[0]), logits_of(source, EXAMPLES[0]), atol=1e-2)
