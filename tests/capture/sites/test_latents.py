"""Latent attention: queries and keys as they meet in the product, and the latent of keys and values."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from residua.capture.sites.names_to_modules import model_sites, resolve_sites
from residua.capture.taps.tap import tap
from residua.store.base.errors import UnknownSiteError
from tests.mixer_models import LATENT
from tests.models.tiny import TINY
from tests.unlike_models import attention_weights

IDS = torch.tensor([[5, 9, 30, 7, 12, 41, 8, 3], [6, 11, 4, 77, 50, 23, 9, 10]])


def tapped(model: PreTrainedModel, sites: str) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    with tap(model, sites, kept.__setitem__), torch.no_grad():
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    return kept


@pytest.mark.parametrize("name", LATENT)
def test_queries_keys_and_latents(name: str) -> None:
    model = LATENT[name]()
    sites = model_sites(model)
    attention = model.get_submodule("model.layers.1.self_attn")
    kept = {site.partition(".")[0]: value for site, value in tapped(model, "q.1,k.1,v.1,z.1,kv_latent.1").items()}
    q, k, v = (kept[kind].double().transpose(1, 2) for kind in "qkv")
    scores = q @ k.transpose(-1, -2) * float(vars(attention)["scaling"])
    scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    weights = scores.softmax(-1)
    torch.testing.assert_close((weights @ v).transpose(1, 2), kept["z"].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights.float(), attention_weights(LATENT[name](), IDS)[1], rtol=1e-4, atol=1e-5)

    latent = kept["kv_latent"]
    assert sites["kv_latent.1"].row_shape == latent.shape[2:]
    assert latent.shape[-1] < 32
    with torch.no_grad():
        both = attention.get_submodule("kv_b_proj")(latent).view(2, 8, 4, -1)
    width = kept["v"].shape[-1]
    assert torch.equal(both[..., -width:], kept["v"])
    assert torch.equal(both[..., :-width], kept["k"][..., : both.shape[-1] - width])

    other = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    with tap(model, "kv_latent.1", lambda _n, _t: other):
        moved = tapped(model, "v.1")["v.1"]
    with torch.no_grad():
        torch.testing.assert_close(moved, attention.get_submodule("kv_b_proj")(other).view(2, 8, 4, -1)[..., -width:])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
def test_keys_and_values_of_the_stream_have_no_latent(name: str) -> None:
    with pytest.raises(UnknownSiteError, match="kv_latent"):
        resolve_sites(TINY[name](), "kv_latent.0")
