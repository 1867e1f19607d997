"""Tiny models with other sequence mixers than attention, with factors in their sums, and with mixtures of experts."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

from tests.unlike_models import _GROUPED, _IDS, _SIZES, made

_TWO: dict[str, Any] = {**_GROUPED, "num_hidden_layers": 2}
_TWO_PLAIN: dict[str, Any] = {**_SIZES, "num_hidden_layers": 2}
_MIX: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
_NO_NUMBER: dict[str, Any] = {name: value for name, value in _GROUPED.items() if name != "num_hidden_layers"}
_HYBRID: dict[str, Any] = {**_GROUPED, **_MIX}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MAMBA: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
_NO_EXPANSION: dict[str, Any] = {name: size for name, size in _MAMBA.items() if name != "mamba_expand"}


def lively(kind: type[PreTrainedModel], config: PreTrainedConfig, **buffers: float) -> PreTrainedModel:
    """Build a model as `made` does, also with weights of experts and convolutions that show.

    Args:
        kind: Class of the model.
        config: Its config.
        buffers: From the end of a buffer's name to what each of its numbers may be at most.
    """
    model = made(kind, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 2 or name.endswith("gate.weight"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            for end, size in buffers.items():
                if name.endswith(end):
                    buffer.copy_(size * torch.rand(buffer.shape, generator=generator))
    return model


MIXERS: dict[str, tuple[Callable[[], PreTrainedModel], tuple[str, ...]]] = {
    "bamba": (
        lambda: lively(hf.BambaForCausalLM, hf.BambaConfig(**_TWO, **_MAMBA, attn_layer_indices=[1])),
        ("mamba", ""),
    ),
    "fnet": (lambda: lively(hf.FNetForMaskedLM, hf.FNetConfig(**_SIZES)), ("fourier.self", "fourier.self")),
    "granitemoehybrid": (
        lambda: lively(
            hf.GraniteMoeHybridForCausalLM,
            hf.GraniteMoeHybridConfig(
                **_TWO,
                **_MAMBA,
                layer_types=["mamba", "attention"],
                num_local_experts=4,
                shared_intermediate_size=24,
                residual_multiplier=0.22,
            ),
        ),
        ("mamba", ""),
    ),
    "jamba": (
        lambda: lively(
            hf.JambaForCausalLM,
            hf.JambaConfig(
                **_TWO,
                attn_layer_period=2,
                attn_layer_offset=1,
                num_experts=4,
                mamba_d_state=4,
                mamba_dt_rank=4,
            ),
        ),
        ("mamba", ""),
    ),
    "lfm2": (
        lambda: lively(
            hf.Lfm2ForCausalLM,
            hf.Lfm2Config(**_TWO, layer_types=["conv", "full_attention"], conv_L_cache=3),
        ),
        ("conv", ""),
    ),
    "mamba2": (
        lambda: lively(
            hf.Mamba2ForCausalLM,
            hf.Mamba2Config(
                vocab_size=97,
                hidden_size=32,
                num_hidden_layers=2,
                num_heads=8,
                head_dim=8,
                n_groups=1,
                chunk_size=8,
                state_size=8,
                **_IDS,
            ),
        ),
        ("mixer", "mixer"),
    ),
    "minimax": (
        lambda: lively(
            hf.MiniMaxForCausalLM,
            hf.MiniMaxConfig(
                **_HYBRID, num_local_experts=4, num_experts_per_tok=2, block_size=8, full_attn_alpha_factor=3.5
            ),
        ),
        ("self_attn", ""),
    ),
    "nemotron_h": (
        lambda: lively(
            hf.NemotronHForCausalLM,
            hf.NemotronHConfig(
                **_NO_NUMBER,
                layers_block_type=["linear_attention", "mlp", "full_attention"],
                head_dim=8,
                n_groups=1,
                mamba_num_heads=8,
                mamba_head_dim=8,
                ssm_state_size=8,
                chunk_size=8,
            ),
        ),
        ("mixer", "", ""),
    ),
    "qwen3_next": (
        lambda: lively(
            hf.Qwen3NextForCausalLM,
            hf.Qwen3NextConfig(**_HYBRID, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=24),
        ),
        ("linear_attn", ""),
    ),
    "recurrent_gemma": (
        lambda: lively(
            hf.RecurrentGemmaForCausalLM,
            hf.RecurrentGemmaConfig(**_TWO, block_types=["recurrent", "attention"], lru_width=32),
        ),
        ("temporal_block", ""),
    ),
    "rwkv": (
        lambda: lively(
            hf.RwkvForCausalLM,
            hf.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        ),
        ("attention", "attention"),
    ),
    "zamba2": (
        lambda: lively(
            hf.Zamba2ForCausalLM,
            hf.Zamba2Config(
                **_TWO_PLAIN,
                layers_block_type=["linear_attention", "hybrid"],
                n_mamba_heads=8,
                mamba_ngroups=1,
                mamba_d_state=8,
                chunk_size=8,
                adapter_rank=4,
            ),
        ),
        ("mamba", "mamba_decoder.mamba"),
    ),
}
"""By name: a function that builds the model; and for each block the module that is its mixer without attention."""

FACTORS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, tuple[str, float]]]] = {
    "falcon_h1": (
        lambda: lively(
            hf.FalconH1ForCausalLM,
            hf.FalconH1Config(
                **_TWO,
                **_NO_EXPANSION,
                mamba_d_ssm=64,
                attention_out_multiplier=0.37,
                ssm_out_multiplier=1.3,
            ),
        ),
        {"attn_out": ("self_attn", 0.37), "mixer_out": ("mamba", 1.3), "mlp_out": ("feed_forward", 1.0)},
    ),
    "granite": (
        lambda: lively(hf.GraniteForCausalLM, hf.GraniteConfig(**_GROUPED, residual_multiplier=0.22)),
        {"attn_out": ("self_attn", 0.22), "mlp_out": ("mlp", 0.22)},
    ),
    "granitemoehybrid": (MIXERS["granitemoehybrid"][0], {"mixer_out": ("mamba", 0.22)}),
    "minicpm3": (
        lambda: lively(
            hf.MiniCPM3ForCausalLM,
            hf.MiniCPM3Config(
                **_TWO_PLAIN,
                num_key_value_heads=4,
                qk_nope_head_dim=8,
                qk_rope_head_dim=4,
                v_head_dim=8,
                kv_lora_rank=8,
                q_lora_rank=8,
                scale_depth=1.4,
            ),
        ),
        {"attn_out": ("self_attn", 1.4 / 2**0.5), "mlp_out": ("mlp", 1.4 / 2**0.5)},
    ),
}
"""By name: a function that builds the model; and for sites of block 0 the module and the factor of its output."""


_MLA: dict[str, Any] = {
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "num_key_value_heads": 4,
}

EXPERTS: dict[str, Callable[[], PreTrainedModel]] = {
    "deepseek_v3": lambda: lively(
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(
            **_TWO_PLAIN,
            **_MLA,
            **_EXPERTS,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        e_score_correction_bias=0.3,
    ),
    "gpt_oss": lambda: lively(
        hf.GptOssForCausalLM,
        hf.GptOssConfig(**_TWO, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    ),
    "granitemoehybrid": MIXERS["granitemoehybrid"][0],
    "jamba": MIXERS["jamba"][0],
    "mixtral": lambda: lively(
        hf.MixtralForCausalLM, hf.MixtralConfig(**_TWO, num_local_experts=4, num_experts_per_tok=2)
    ),
    "olmoe": lambda: lively(hf.OlmoeForCausalLM, hf.OlmoeConfig(**_TWO, num_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": lambda: lively(
        hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig(**_TWO, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=24)
    ),
    "qwen3_next": MIXERS["qwen3_next"][0],
    "qwen3_moe": lambda: lively(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**_TWO, **_EXPERTS, num_experts=4)),
}
"""Mixtures of experts in block 1."""

LATENT: dict[str, Callable[[], PreTrainedModel]] = {
    "deepseek_v2": lambda: lively(
        hf.DeepseekV2ForCausalLM,
        hf.DeepseekV2Config(**_TWO_PLAIN, **_MLA, first_k_dense_replace=2, n_routed_experts=4),
    ),
    "deepseek_v3": EXPERTS["deepseek_v3"],
    "minicpm3": FACTORS["minicpm3"][0],
    "mla-without-query-latent": lambda: lively(
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(**{**_TWO_PLAIN, **_MLA, "q_lora_rank": None}, first_k_dense_replace=2, n_routed_experts=4),
    ),
}
"""Multi-head latent attention."""
