"""Attention facts: those of the config, proved on the model, or a reason why they are not known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

import residua
from residua.capture.identity.sidecars import attention_files
from residua.capture.sites.names_to_modules import resolve_sites
from residua.store.format.sidecars import AttentionSpec, attention_from_json
from tests.models.tiny import LAYERS, ODD, TINY, VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def facts(model: PreTrainedModel) -> dict[int, AttentionSpec | str]:
    files = attention_files(model, resolve_sites(model, "q.*,k.*"))
    return attention_from_json(b"".join(bytes(piece) for piece in files["attention.json"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_every_known_architecture_is_described_by_its_config(name: str, dtype: torch.dtype) -> None:
    model = TINY[name]()
    nn.Module.to(model, dtype)
    config = model.config
    head_width = getattr(config, "head_dim", None) or 32 // 4
    for layer, found in facts(model).items():
        local = (getattr(config, "layer_types", None) or ["sliding_attention"] * LAYERS)[layer] == "sliding_attention"
        assert found == AttentionSpec(
            scale=1.0 if name.startswith("opt") else getattr(config, "query_pre_attn_scalar", head_width) ** -0.5,
            causal=name != "bert",
            softcap=getattr(config, "attn_logit_softcapping", None),
            window=getattr(config, "sliding_window", None) if local else None,
        )
    assert len(facts(model)) == LAYERS


def test_layers_may_differ() -> None:
    windows: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}
    qwen = facts(hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, **windows)))
    assert [spec.window for spec in qwen.values() if isinstance(spec, AttentionSpec)] == [None, None, 40]
    gpt2 = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True)
    scales = [spec.scale for spec in facts(hf.GPT2LMHeadModel(gpt2)).values() if isinstance(spec, AttentionSpec)]
    assert scales == pytest.approx([8**-0.5, 8**-0.5 / 2, 8**-0.5 / 3])


def test_sinks_are_the_models_own() -> None:
    config = hf.GptOssConfig(
        **SIZES, head_dim=12, sliding_window=5, num_local_experts=4, num_experts_per_tok=2, rope_parameters=None
    )
    model = hf.GptOssForCausalLM(config)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.get_submodule("self_attn").get_parameter("sinks").copy_(torch.arange(4.0) - number)
    for layer_number, spec in facts(model).items():
        assert isinstance(spec, AttentionSpec)
        assert spec.sinks == tuple(float(head - layer_number) for head in range(4))


def test_a_position_bias_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """ALiBi, on top of Llama's eager attention: q and k alone do not give these weights."""
    plain = modeling_llama.eager_attention_forward

    def with_bias(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        place = torch.arange(key.shape[2])
        bias = -0.25 * (place[:, None] - place).clamp_min(0)
        full = torch.full((len(place), len(place)), torch.finfo(query.dtype).min).triu(1)
        return plain(module, query, key, value, (full if mask is None else mask) + bias, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", with_bias)
    assert all(
        isinstance(found, str) and "do not follow from q and k" in found for found in facts(TINY["llama"]()).values()
    )


def test_an_unknown_window_gives_a_reason() -> None:
    model = TINY["gemma2"]()
    model.config.layer_types = ["sliding_attention", "chunked_attention", "full_attention"]
    nothing = "could not be run"  # the model itself does not know the type
    assert all(isinstance(found, str) and nothing in found for found in facts(model).values())
    mistral = TINY["llama"]()
    mistral.config.sliding_window = 4096
    found = facts(mistral)[1]
    assert isinstance(found, str)
    assert "do not agree on a window" in found


def test_nothing_is_written_for_other_sites_or_models() -> None:
    cases: list[tuple[nn.Module, str]] = [
        (TINY["llama"](), "q.0,k.1,resid_post.0"),
        (ODD["bloom"](), "resid_post.0"),
        (nn.Sequential(nn.Linear(2, 2)), "module:0@output"),
    ]
    for model, sites in cases:
        assert attention_files(model, resolve_sites(model, sites)) == {}


def test_the_file_is_in_the_archive_and_changes_no_plan(tmp_path: Path) -> None:
    model = TINY["mistral"]()
    data = [[5, 6, 7, 8], [9, 10, 11]]
    both = residua.capture_dataset(model, data, sites="q.1,k.1,k.2", out=tmp_path / "a.zarr").archive
    text = both.side_file("head/attention.json")
    assert text is not None
    assert list(json.loads(text)) == ["1"]
    with residua.Recorder(model, sites="q.1,k.1,k.2", out=tmp_path / "b.zarr"), torch.no_grad():
        model(input_ids=torch.tensor(data[:1]))
    assert residua.open(tmp_path / "b.zarr").side_file("head/attention.json") == text
    alone = residua.capture_dataset(model, data, sites="q.1,k.2", out=tmp_path / "c.zarr").archive
    assert alone.side_file("head/attention.json") is None
    assert model.config._attn_implementation == "sdpa"
