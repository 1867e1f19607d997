"""Attention: switching to eager and back, models with sub-models, and models that do not use the interface."""

import logging
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from residua.capture.hooks.attention import eager_attention
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.taps.reading import reading
from residua.capture.taps.tap import tap
from residua.store.base.errors import CaptureError
from tests.capture.site_readings import read, run
from tests.models.tiny import LAYERS, ODD, TINY
from tests.unlike_models import UNLIKE


def test_a_pattern_switches_to_eager_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    model = TINY["llama"]()
    assert model.config._attn_implementation == "sdpa"
    with (
        caplog.at_level(logging.INFO, "residua"),
        reading(model, "pattern.0,resid_post.1", lambda *_: None) as taps,
    ):
        assert model.config._attn_implementation == "eager"
        run(model)
        taps.end_forward()
    assert model.config._attn_implementation == "sdpa"
    assert "eager" in caplog.text


def test_other_sites_leave_the_implementation_alone() -> None:
    model = TINY["llama"]()
    with reading(model, "q.0,z.0", lambda *_: None):
        assert model.config._attn_implementation == "sdpa"


def test_a_model_that_is_eager_already_is_not_switched() -> None:
    model = TINY["llama"]()
    model.set_attn_implementation("eager")
    with eager_attention(model) as switched:
        assert not switched
    assert model.config._attn_implementation == "eager"


def test_every_sub_model_is_switched_and_restored() -> None:
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = TINY["llama"]().config
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    configs = [model.config, model.config.get_text_config(), model.config.vision_config]
    assert all(isinstance(config, PreTrainedConfig) for config in configs)
    before = [getattr(config, "_attn_implementation", None) for config in configs]
    assert len(set(before)) == 2
    with eager_attention(model) as switched:
        assert switched
        assert {getattr(config, "_attn_implementation", None) for config in configs} == {"eager"}
    assert [getattr(config, "_attn_implementation", None) for config in configs] == before


def test_a_model_that_does_not_use_the_interface_is_refused_by_layer() -> None:
    model = TINY["gpt2"]()
    for layer in range(LAYERS):
        model.get_submodule(f"transformer.h.{layer}.attn").__dict__["reorder_and_upcast_attn"] = True
    model.set_attn_implementation("eager")
    with pytest.raises(CaptureError) as caught:
        read(model, "q.1,z.1")
    assert "'q.1' was not met" in str(caught.value)
    assert "module:transformer.h.1" in str(caught.value)


def test_a_switch_away_from_eager_while_patterns_are_read_is_refused() -> None:
    model = TINY["llama"]()
    with reading(model, "pattern.0", lambda *_: None):
        model.set_attn_implementation("sdpa")
        with pytest.raises(CaptureError, match="only 'eager' computes it"):
            run(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_users_own_implementation_is_read_too() -> None:
    calls: list[int] = []

    def mine(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(int(str(module.layer_idx)))
        return sdpa_attention_forward(module, *args, **kwargs)

    model = TINY["llama"]()
    AttentionInterface.register("mine", mine)
    try:
        model.set_attn_implementation("mine")
        got = read(model, "q.*,z.2")
        assert torch.equal(run(model), got.logits)
    finally:
        del AttentionInterface._global_mapping["mine"]
    assert calls == [0, 1, 2, 0, 1, 2]
    assert set(got.sites) == {"q.0", "q.1", "q.2", "z.2"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "olmo2", "stablelm", "lfm2", "gemma4", "diffllama"])
def test_a_pattern_that_is_put_back_changes_nothing(name: str) -> None:
    model = {**TINY, **ODD, **UNLIKE}[name]()
    model.set_attn_implementation("eager")
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with tap(model, "pattern.*", lambda _name, tensor: tensor.clone()):
            torch.testing.assert_close(model(input_ids=ids).logits, plain)


def test_a_pattern_that_does_not_make_z_alone_is_not_replaced() -> None:
    model = UNLIKE["granite_swa"]()
    model.set_attn_implementation("eager")
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        with tap(model, "pattern.*", lambda _name, tensor: None):
            model(input_ids=ids)
        with pytest.raises(CaptureError, match="replace z"), tap(model, "pattern.0", lambda _name, tensor: tensor):
            model(input_ids=ids)


def test_differential_attention_has_one_pattern_and_gets_one_replacement() -> None:
    model = UNLIKE["diffllama"]()
    ids = torch.arange(5, 21)[None]
    sites = resolve_sites(model, "q.1,k.1,pattern.1")
    seen: dict[str, list[Tensor]] = {site: [] for site in sites}

    def zero(site: str, tensor: Tensor) -> Tensor | None:
        seen[site].append(tensor.clone())
        return torch.zeros_like(tensor) if site == "q.1" else None

    model.set_attn_implementation("eager")
    with torch.no_grad():
        (plain,) = (model(input_ids=ids, output_attentions=True).attentions[1],)
        with tap(model, {site: sites[site] for site in ("k.1", "pattern.1")}, zero):
            model(input_ids=ids)
        with tap(model, sites, zero):
            moved = model(input_ids=ids, output_attentions=True)
    assert [len(found) for found in seen.values()] == [1, 2, 2]
    assert torch.equal(seen["pattern.1"][0].transpose(1, 2), plain)
    uniform = torch.ones(16, 16).tril() / torch.arange(1, 17)[:, None]
    torch.testing.assert_close(seen["pattern.1"][1][0, :, 0], uniform)
    assert torch.equal(moved.attentions[1].transpose(1, 2), seen["pattern.1"][1])
    values = model.get_submodule("model.layers.1.self_attn.v_proj")
    taken: list[Any] = []
    hooks = [
        values.register_forward_hook(lambda _m, _a, output: taken.append(output)),
        model.get_submodule("model.layers.1.self_attn.groupnorm").register_forward_pre_hook(
            lambda _m, args: taken.append(args[0])
        ),
    ]
    with torch.no_grad(), tap(model, sites, zero):
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    # with uniform weights in both calls, every head gives the running mean of its values, both halves alike
    mean = taken[0][0].cumsum(0) / torch.arange(1, 17)[:, None]
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    factor = (attention.lambda_q1 * attention.lambda_k1).sum().exp() - (
        attention.lambda_q2 * attention.lambda_k2
    ).sum().exp()
    expected = (1 - factor - attention.lambda_init) * mean
    torch.testing.assert_close(taken[1][0, :, 0], expected, rtol=1e-4, atol=1e-5)
