"""Sequence mixers other than attention, several summands in a block, and factors in their sums."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.hooks.site import SiteInfo
from residua.capture.sites.names_to_modules import model_sites, resolve_sites
from residua.capture.taps.tap import tap
from residua.store.base.errors import UnknownSiteError
from tests.capture.manual_hooks import hooked
from tests.mixer_models import FACTORS, MIXERS

IDS = torch.tensor([[5, 9, 30, 7, 12, 41, 8, 3], [6, 11, 4, 77, 50, 23, 9, 10]])
PARTS = ("attn_out", "mixer_out", "mlp_out")


@cache
def model_of(name: str) -> PreTrainedModel:
    return (MIXERS[name] if name in MIXERS else FACTORS[name])[0]()


@cache
def sites_of(name: str) -> dict[str, SiteInfo]:
    return model_sites(model_of(name))


def run(model: PreTrainedModel, **options: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)


def tapped(name: str, *names: str) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    with tap(model_of(name), {site: sites_of(name)[site] for site in names}, kept.__setitem__):
        run(model_of(name))
    return kept


def outputs(model: PreTrainedModel, paths: list[str]) -> dict[str, Tensor]:
    """Run with hooks written by hand."""
    kept: dict[str, Tensor] = {}

    def keep(path: str, output: Any) -> None:
        kept[path] = (output[0] if isinstance(output, tuple) else output).clone()

    handles = [
        model.get_submodule(path).register_forward_hook(lambda _m, _a, output, path=path: keep(path, output))
        for path in paths
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return kept


def block_of(name: str, layer: int) -> str:
    return sites_of(name)[f"resid_post.{layer}"].module


@pytest.mark.parametrize("name", MIXERS)
def test_each_block_names_its_own_mixer(name: str) -> None:
    model, mixers = model_of(name), MIXERS[name][1]
    sites = sites_of(name)
    of_mixers = {f"{block_of(name, layer)}.{path}": layer for layer, path in enumerate(mixers) if path}
    by_hand = outputs(model, list(of_mixers))
    kept = tapped(name, *(f"mixer_out.{layer}" for layer in of_mixers.values()))
    for path, layer in of_mixers.items():
        assert torch.equal(kept[f"mixer_out.{layer}"], sites[f"mixer_out.{layer}"].factor * by_hand[path])
        assert f"attn_out.{layer}" not in sites
    for layer, path in enumerate(mixers):
        assert (f"mixer_out.{layer}" in sites) == bool(path)
        is_attention = f"q.{layer}" in sites
        assert (f"attn_out.{layer}" in sites) == (is_attention and not path)


@pytest.mark.parametrize("name", sorted({*MIXERS, *FACTORS} - {"fnet", "minimax", "rwkv"}))  # these norm the stream
def test_what_is_added_adds_up_to_the_next_hidden_state(name: str) -> None:
    model = model_of(name)
    sites = sites_of(name)
    kept = tapped(name, *(site for site in sites if site.split(".")[0] in (*PARTS, "resid_mid", "resid_pre")))
    states = run(model, output_hidden_states=True).hidden_states
    n_blocks = sum(site.startswith("resid_post.") for site in sites)
    after = [kept.get(f"resid_pre.{layer + 1}") for layer in range(n_blocks)]
    for layer in range(n_blocks - 1):
        x, y = kept[f"resid_pre.{layer}"], after[layer]
        assert y is not None
        assert any(torch.equal(y, state) for state in states)
        parts = [kept[f"{kind}.{layer}"] for kind in PARTS if f"{kind}.{layer}" in kept]
        middle = kept.get(f"resid_mid.{layer}")
        if middle is not None:
            mixed = [kept[f"{kind}.{layer}"] for kind in PARTS[:2] if f"{kind}.{layer}" in kept]
            torch.testing.assert_close(middle, x + sum(mixed), rtol=1e-5, atol=1e-5)
        if middle is None or f"mlp_out.{layer}" in kept:
            torch.testing.assert_close(y, x + sum(parts), rtol=1e-5, atol=1e-5)


def test_a_stream_that_a_norm_gives() -> None:
    model = model_of("minimax")
    first_block = ("resid_pre.0", "resid_post.0", "resid_mid.0", "mixer_out.0", "mlp_out.0")
    kept = tapped("minimax", *first_block, "resid_pre.1", "attn_out.1", "resid_mid.1")
    first, second = (model.get_submodule(f"model.layers.{layer}") for layer in (0, 1))
    with torch.no_grad():
        for x, added, middle, block, alpha in (
            (kept["resid_pre.0"], kept["mixer_out.0"], kept["resid_mid.0"], first, 1.0),
            (kept["resid_pre.1"], kept["attn_out.1"], kept["resid_mid.1"], second, 3.5),
        ):
            summed = alpha * block.get_submodule("input_layernorm")(x) + added
            torch.testing.assert_close(block.get_submodule("post_attention_layernorm")(summed), middle)
    torch.testing.assert_close(kept["resid_mid.0"] + kept["mlp_out.0"], kept["resid_post.0"])


@pytest.mark.parametrize("name", FACTORS)
def test_what_is_added_is_the_output_times_the_factor_of_the_block(name: str) -> None:
    model = model_of(name)
    sites, block = sites_of(name), block_of(name, 0)
    by_hand = outputs(model, [f"{block}.{path}" for path, _ in FACTORS[name][1].values()])
    kept = tapped(name, *(f"{kind}.0" for kind in FACTORS[name][1]))
    for kind, (path, factor) in FACTORS[name][1].items():
        assert sites[f"{kind}.0"].factor == factor
        assert torch.equal(kept[f"{kind}.0"], by_hand[f"{block}.{path}"] * factor)
        assert factor == 1 or f"times {factor:.6g}" in sites[f"{kind}.0"].where


@pytest.mark.parametrize("name", ["falcon_h1", "granite", "minicpm3"])
def test_what_is_put_in_is_what_is_added(name: str) -> None:
    model = model_of(name)
    plain = run(model).logits
    with tap(model, "attn_out.*", lambda _n, tensor: tensor.clone()):
        assert torch.equal(run(model).logits, plain)  # the same value again changes no bit
    added = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    mixer = ("mixer_out.0",) if name == "falcon_h1" else ()
    with tap(model, "attn_out.0", lambda _n, _t: added):
        kept = tapped(name, "resid_pre.0", "resid_mid.0", *mixer)
    expected = kept["resid_pre.0"] + added + kept.get("mixer_out.0", 0.0)
    torch.testing.assert_close(kept["resid_mid.0"], expected, rtol=1e-5, atol=1e-5)
    module, factor = FACTORS[name][1]["attn_out"]
    block = model.get_submodule(block_of(name, 0))
    with hooked(block.get_submodule(module), lambda _m, _a, output: (output[0] * 0, *output[1:])):
        ablated = run(model).logits
    with tap(model, "attn_out.0", lambda _n, tensor: tensor * 0):
        assert torch.equal(run(model).logits, ablated)
    assert factor != 1


def test_gradients_are_those_of_what_is_added() -> None:
    model = model_of("granite")
    gradients: dict[str, Tensor] = {}
    with tap(model, "attn_out.0,resid_mid.0", gradients.__setitem__, backward=True):
        model(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(gradients["attn_out.0"], gradients["resid_mid.0"])
    adapter = nn.Parameter(torch.zeros(32))  # begins with no change, and still learns
    with tap(model, "attn_out.0", lambda _n, tensor: tensor + adapter, differentiable=True):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert adapter.grad is not None
    torch.testing.assert_close(adapter.grad, gradients["attn_out.0"].sum((0, 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["granite", "lfm2", "falcon_h1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_finds_the_same_parts(name: str, dtype: torch.dtype) -> None:
    model = (MIXERS if name in MIXERS else FACTORS)[name][0]()
    expected = {site: (info.module, info.factor) for site, info in sites_of(name).items()}
    nn.Module.to(model, dtype)
    assert {site: (info.module, info.factor) for site, info in model_sites(model).items()} == expected


def test_a_missing_part_names_what_the_block_adds() -> None:
    with pytest.raises(UnknownSiteError) as caught:
        resolve_sites(model_of("lfm2"), "attn_out.0")
    for word in ("attn_out.0", "model.layers.0", "no attention", "mixer_out.0", "module:model.layers.0.conv@output"):
        assert word in str(caught.value)
    with pytest.raises(UnknownSiteError) as caught:
        resolve_sites(model_of("granitemoehybrid"), "mlp_out.1")
    for word in ("block_sparse_moe", "shared_mlp", "0.22 times"):
        assert word in str(caught.value)


def test_an_edit_of_a_mixer_is_replayed(tmp_path: Path) -> None:
    model = model_of("bamba")
    archive = residua.capture_dataset(
        model,
        [{"input_ids": row.tolist()} for row in IDS],
        out=tmp_path / "a.zarr",
        sites="mixer_out.0,resid_post.*,logits",
        rows_per_shard=64,
    ).archive
    stored = archive["mixer_out.0"].torch(slice(0, 8))
    torch.testing.assert_close(stored, tapped("bamba", "mixer_out.0")["mixer_out.0"][0])
    with hooked(model.get_submodule("model.layers.0.mamba"), lambda _m, _a, output: output * 0):
        expected = run(model).logits
    zero = [{"edit": "zero", "site": "mixer_out.0"}]
    with residua.replay(model, archive, examples=[0, 1], edits=zero) as edited:
        torch.testing.assert_close(torch.stack(list(edited.logits)), expected)
    with residua.replay(model, archive, examples=[0, 1], at="mixer_out.0") as put_back:
        assert torch.equal(torch.stack(list(put_back.logits)), run(model).logits)
