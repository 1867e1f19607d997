"""Tiny models with random weights, one of each architecture, built from configs without any download.

Every model is in evaluation mode and float32, seeded, with weights large enough that attention is far from uniform.
`TINY` maps a name to a function that builds the model.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 97
LAYERS = 3
LONGEST = 64

_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    **_IDS,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": LONGEST,
    **_IDS,
}
_NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
_QUERY_OR_KEY = re.compile(r"q_proj|k_proj|qkv|query|key|c_attn")


def _build(make: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    model = make(config)
    model.train(False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(30.0 if _QUERY_OR_KEY.search(name) else 8.0)
            else:  # norms and biases away from 1 and 0, so that tests notice a missing one
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("q_norm.weight"):
                parameter.add_(2.0)
    torch.random.set_rng_state(state)
    return model


def _opt(**settings: Any) -> PreTrainedModel:
    sizes = {name: value for name, value in _SIZES.items() if name != "intermediate_size"}
    options = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, **sizes, **settings}
    return _build(hf.OPTForCausalLM, hf.OPTConfig(**options))


def _neox(**settings: Any) -> PreTrainedModel:
    return _build(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_SIZES, **settings))


def _gpt2() -> PreTrainedModel:
    return _build(hf.GPT2LMHeadModel, hf.GPT2Config(**_GPT, **_NO_DROPOUT, attn_pdrop=0.0))


def _gemma2() -> PreTrainedModel:
    gemma: dict[str, Any] = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5}
    caps: dict[str, Any] = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    return _build(hf.Gemma2ForCausalLM, hf.Gemma2Config(**_GROUPED, **gemma, **caps, layer_types=layer_types))


def _gemma3() -> PreTrainedModel:
    gemma: dict[str, Any] = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5}
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    return _build(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_GROUPED, **gemma, layer_types=layer_types))


def _qwen3_moe() -> PreTrainedModel:
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    options = {**_GROUPED, **experts, "head_dim": 12, "mlp_only_layers": [1]}
    return _build(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**options))


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: _build(hf.BertForMaskedLM, hf.BertConfig(**_SIZES)),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": lambda: _neox(use_parallel_residual=True),
    "gpt_neox-sequential": lambda: _neox(use_parallel_residual=False),
    "llama": lambda: _build(hf.LlamaForCausalLM, hf.LlamaConfig(**_GROUPED)),
    "mistral": lambda: _build(hf.MistralForCausalLM, hf.MistralConfig(**_GROUPED, sliding_window=5)),
    "mixtral": lambda: _build(
        hf.MixtralForCausalLM, hf.MixtralConfig(**_GROUPED, num_local_experts=4, sliding_window=None)
    ),
    "opt": _opt,
    "opt-post-norm": lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=24),
    "phi": lambda: _build(hf.PhiForCausalLM, hf.PhiConfig(**_GROUPED)),
    "phi3": lambda: _build(hf.Phi3ForCausalLM, hf.Phi3Config(**_GROUPED)),
    "qwen2": lambda: _build(hf.Qwen2ForCausalLM, hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: _build(hf.Qwen3ForCausalLM, hf.Qwen3Config(**_GROUPED, head_dim=12)),
    "qwen3_moe": _qwen3_moe,
}
"""Architectures with all canonical sites."""

_SPLIT: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 98}
_EIGHT: dict[str, Any] = {**_GROUPED, **_SPLIT}


def with_mild_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Make the attention of a model less sharp, so that rounding in another order stays a small difference."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _QUERY_OR_KEY.search(name) or name.endswith("q_norm.weight"):
                parameter.mul_(0.3)
    return model


SPLIT: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": TINY["gpt2"],
    "llama": lambda: with_mild_attention(_build(hf.LlamaForCausalLM, hf.LlamaConfig(**_EIGHT))),
    "mixtral": lambda: with_mild_attention(
        _build(
            hf.MixtralForCausalLM,
            hf.MixtralConfig(**{**_EIGHT, "intermediate_size": 96}, num_local_experts=4, sliding_window=None),
        )
    ),
    "qwen3": lambda: with_mild_attention(_build(hf.Qwen3ForCausalLM, hf.Qwen3Config(**_EIGHT, head_dim=12))),
}
"""Architectures for process layouts of up to four processes; 98 hidden units are not a multiple of four.

Grouped matrix products of experts need multiples of four, so Mixtral has 96."""

ODD: dict[str, Callable[[], PreTrainedModel]] = {
    "bloom": lambda: _build(
        hf.BloomForCausalLM, hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=LAYERS, n_head=4)
    ),
    "gptj": lambda: _build(
        hf.GPTJForCausalLM,
        hf.GPTJConfig(**_GPT, rotary_dim=4),
    ),
    "olmo2": lambda: _build(hf.Olmo2ForCausalLM, hf.Olmo2Config(**_GROUPED)),
    "roberta": lambda: _build(hf.RobertaForMaskedLM, hf.RobertaConfig(**_SIZES)),
}
"""Architectures that are not in the table of architectures: Residua finds only the sites that their structure shows."""


def gpt_oss() -> PreTrainedModel:
    """Return a model with attention sinks, a sliding window in every other layer, and grouped heads."""
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5}
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
    torch.manual_seed(3)
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **heads, **experts))
    model.train(False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.get_submodule("self_attn").get_parameter("sinks").normal_().add_(2.0)
    return model
