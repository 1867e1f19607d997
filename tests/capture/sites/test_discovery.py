"""Sites of architectures that are not in the table: found by a run, each for itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.sites.architectures import _FAMILIES
from residua.capture.sites.names_to_modules import model_sites, resolve_sites
from residua.capture.taps.tap import tap
from residua.store.base.errors import UnknownSiteError
from tests.models.tiny import LAYERS, ODD, TINY
from tests.unlike_models import UNLIKE, attention_weights

ALL = {**ODD, **UNLIKE}
IDS = torch.tensor([[5, 9, 30, 7, 12, 41, 8, 3], [6, 11, 4, 77, 50, 23, 9, 10]])


def run(model: PreTrainedModel, **options: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)


def tapped(model: PreTrainedModel, sites: Any) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    with tap(model, sites, kept.__setitem__):
        run(model)
    return kept


@pytest.mark.parametrize("name", ["bloom", "gptj", "olmo2", "roberta", "lfm2", "gemma4", "granite", "mamba"])
def test_the_residual_stream_is_that_of_hidden_states(name: str) -> None:
    model = ALL[name]()
    kept = tapped(model, "resid_pre.*,resid_post.*")
    states = run(model, output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):  # the last state follows the final norm; Mamba's first one is of block 0
        assert torch.equal(kept[f"resid_post.{layer}"], states[layer + (name != "mamba")])
        assert torch.equal(kept[f"resid_pre.{layer + 1}"], kept[f"resid_post.{layer}"])


@pytest.mark.parametrize(
    ("name", "has_middle"),
    [("olmo2", True), ("roberta", True), ("bloom", True), ("gptj", False), ("lfm2", True), ("stablelm", True)],
)
def test_parts_add_up_and_what_is_put_in_acts(name: str, has_middle: bool) -> None:
    model = ALL[name]()
    layer = 1
    sites = [f"{kind}.{layer}" for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    kept = tapped(model, [*sites, *([f"resid_mid.{layer}"] if has_middle else [])])
    x, a, b, y = (kept[site] for site in sites)
    if name == "roberta":  # norms after the sums
        block = model.get_submodule(f"roberta.encoder.layer.{layer}")
        middle = block.get_submodule("attention.output.LayerNorm")(x + a)
        torch.testing.assert_close(kept[f"resid_mid.{layer}"], middle)
        torch.testing.assert_close(block.get_submodule("output.LayerNorm")(middle + b), y)
    else:
        torch.testing.assert_close(x + a + b, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
        if has_middle:
            torch.testing.assert_close(kept[f"resid_mid.{layer}"], x + a)
            with tap(model, f"resid_mid.{layer}", lambda _n, t: t + 1.0):
                moved = tapped(model, [f"resid_mid.{layer}", f"mlp_out.{layer}", f"resid_post.{layer}"])
            got = moved[f"resid_post.{layer}"] - moved[f"mlp_out.{layer}"]
            torch.testing.assert_close(got, x + a + 1.0, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("name", ["olmo2", "roberta", "bloom", "gptj", "stablelm", "lfm2"])
def test_activations_give_the_mlp_through_its_last_linear_map(name: str) -> None:
    model = ALL[name]()
    info = model_sites(model)["mlp_act.1"]
    kept = tapped(model, "mlp_act.1,mlp_out.1")
    with torch.no_grad():
        given = model.get_submodule(info.module)(kept["mlp_act.1"])
    if name == "olmo2":  # a norm follows
        given = model.get_submodule("model.layers.1.post_feedforward_layernorm")(given)
    if name == "bloom":  # the linear map adds the residual stream itself
        return
    torch.testing.assert_close(given, kept["mlp_out.1"])


@pytest.mark.parametrize("name", TINY)
def test_discovery_agrees_with_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY[name]()
    told = model_sites(model)
    expected = tapped(model, [site for site in told if not site.startswith("pattern")])
    monkeypatch.delitem(_FAMILIES, model.config.model_type)
    found = model_sites(model)
    assert [site for site in told if site not in found] == []
    kept = tapped(model, {site: found[site] for site in expected})
    for site, value in expected.items():
        assert torch.equal(kept[site], value), site
        assert found[site].row_shape == told[site].row_shape


def test_blocks_of_one_model_may_differ() -> None:
    model = UNLIKE["lfm2"]()
    sites = model_sites(model)
    assert [site for site in sites if site.startswith("q.")] == ["q.1"]
    assert [site for site in sites if site.startswith("attn_out.")] == ["attn_out.1"]
    assert [site for site in sites if site.startswith("mlp_out.")] == ["mlp_out.0", "mlp_out.1", "mlp_out.2"]
    with pytest.raises(UnknownSiteError) as caught:
        resolve_sites(model, "q.0")
    for word in ("q.0", "model.layers.0", "lfm2", "attention", "module:model.layers.0"):
        assert word in str(caught.value)
    wide = model_sites(UNLIKE["gemma4"]())
    assert wide["q.0"].row_shape == (4, 8)
    assert wide["q.2"].row_shape == (4, 16)
    assert wide["resid_post.2"].row_shape == (32,)


@pytest.mark.parametrize("name", ["olmo2", "lfm2", "gemma4", "stablelm"])
def test_patterns_are_those_of_eager_attention(name: str) -> None:
    model = ALL[name]()
    sites = [site for site in model_sites(model) if site.startswith("pattern.")]
    kept = tapped(model, sites)
    for site, weights in zip(sites, attention_weights(model, IDS), strict=True):
        torch.testing.assert_close(kept[site].transpose(1, 2), weights)


@pytest.mark.parametrize(("name", "lost"), [("xlm", "resid_post"), ("flaubert", "resid_pre")])
def test_what_is_not_a_residual_stream_of_tokens_is_not_called_one(name: str, lost: str) -> None:
    model = UNLIKE[name]()
    sites = model_sites(model)
    assert "logits" in sites
    assert not any(site.startswith(lost) for site in sites)
    with pytest.raises(UnknownSiteError, match=rf"{lost}.0 of '.*module:"):
        resolve_sites(model, f"{lost}.*")
    with torch.no_grad():
        plain = run(model)
    kept = tapped(model, "logits")
    assert torch.equal(kept["logits"], plain.logits)


def test_an_embedding_without_attributes_is_measured() -> None:
    sites = model_sites(UNLIKE["ibert"]())
    assert sites["logits"].row_shape == (97,)


@pytest.mark.parametrize("name", ["albert", "clip", "lfm2"])
def test_a_module_site_is_measured_for_itself(name: str) -> None:
    model = UNLIKE[name]()
    once = {"albert": "embeddings", "clip": "text_model.embeddings", "lfm2": "lm_head"}[name]
    (info,) = resolve_sites(model, f"module:{once}").values()
    assert info.per_token == (name != "clip")
    assert (info.n_met, bool(info.problem)) == ((0, True) if name == "clip" else (1, False))


def test_a_shared_module_says_how_often_it_was_met() -> None:
    (info,) = resolve_sites(UNLIKE["albert"](), "module:encoder.albert_layer_groups.0").values()
    assert info.n_met == LAYERS
    assert f"{LAYERS} times" in info.problem


def test_a_shared_module_is_found_under_each_of_its_names() -> None:
    model = TINY["llama"]()
    first, second = (model.get_submodule(f"model.layers.{layer}.mlp") for layer in (0, 1))
    shared = first.get_submodule("act_fn")
    setattr(second, "act_fn", shared)  # noqa: B010 - typed as a module
    (info,) = resolve_sites(model, "module:model.layers.1.mlp.act_fn").values()
    assert (info.name, info.module) == ("module:model.layers.1.mlp.act_fn@output", "model.layers.0.mlp.act_fn")
    assert "2 times" in info.problem


def test_the_text_model_is_meant_where_a_tower_has_as_many_blocks() -> None:
    sites = model_sites(UNLIKE["llava"]())
    assert sites["resid_post.1"].module.startswith("model.language_model.")
    assert sites["attn_out.1"].module.startswith("model.language_model.")


@pytest.mark.parametrize("name", ["olmo2", "roberta", "gptj", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_are_found_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = ALL[name]()
    expected = {site: info.module for site, info in model_sites(model).items()}
    nn.Module.to(model, dtype)
    assert {site: info.module for site, info in model_sites(model).items()} == expected


def test_looking_for_sites_shows_nothing_to_taps_and_recorders_around(tmp_path: Path) -> None:
    model, seen = ALL["olmo2"](), list[tuple[int, ...]]()
    with (
        torch.no_grad(),
        residua.Recorder(model, sites="resid_post.1", out=tmp_path / "a.zarr"),
        tap(model, "resid_post.0", lambda _name, tensor: seen.append(tuple(tensor.shape[:2]))),
    ):
        resolve_sites(model, "attn_out.*,module:model.layers.0.mlp")
        run(model)
    assert seen == [tuple(IDS.shape)]
    assert residua.open(tmp_path / "a.zarr").n_rows == IDS.numel()
