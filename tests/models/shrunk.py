"""Tiny models of any transformers architecture, built from its config class: each known field is made small.

`shrunk` makes the config, sub-configs included; `enlivened` gives a model weights under which every part of it shows.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

VOCABULARY = 97
TOWER_LAYERS = 2
"""Blocks of a vision or audio tower; text models have three, so that a mix-up shows."""


def _fields(size: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


_SIZES: dict[str, Any] = {
    **_fields(VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    **_fields(64, "hidden_size d_model n_embd dim emb_dim embed_dim d_embed embedding_size word_embed_proj_dim"),
    **_fields(64, "hidden_size_global attention_hidden_size lru_width mamba_d_ssm"),
    **_fields(
        48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff d_inner n_inner dff dim_ff hidden_dim"
    ),
    **_fields(48, "feed_forward_size ffn_hidden_size prefix_hidden_size mlp_dim dense_intermediate_size"),
    **_fields(48, "expert_ffn_hidden_size"),
    **_fields(3, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"),
    **_fields(3, "num_encoder_layers num_blocks num_channels"),
    "depth": 2,
    **_fields(4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    **_fields(4, "num_decoder_attention_heads num_encoder_attention_heads attention_heads"),
    **_fields(2, "num_key_value_heads num_kv_heads n_head_kv"),
    **_fields(16, "head_dim d_head d_kv attention_head_dim dim_head"),
    **_fields(64, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions"),
    **_fields(64, "context_length"),
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **_fields(4, "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads"),
    **_fields(2, "num_experts_per_tok num_experts_per_token moe_k moe_topk num_selected_experts linear_num_key_heads"),
    **_fields(24, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    **_fields(24, "moe_shared_expert_intermediate_size"),
    **_fields(1, "n_group topk_group num_expert_group first_k_dense_replace num_shared_experts n_shared_experts"),
    **_fields(8, "qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim rotary_dim adapter_rank"),
    **_fields(16, "v_head_dim kv_lora_rank q_lora_rank qk_head_dim hidden_size_per_layer_input query_pre_attn_scalar"),
    **_fields(8, "mamba_d_state mamba_n_heads mamba_chunk_size state_size ssm_state_size mamba_num_heads chunk_size"),
    **_fields(16, "mamba_d_head mamba_head_dim mamba_headdim"),
    **_fields(4, "mamba_dt_rank time_step_rank"),
    **_fields(2, "mamba_expand n_mamba_heads"),
    **_fields(1, "mamba_n_groups mamba_ngroups"),
    **_fields(16, "index_n_heads index_head_dim"),
    **_fields(8, "index_topk sliding_window attention_window_size patch_size"),
    **_fields(0, "num_kv_shared_layers"),
    "image_size": 32,
    **dict.fromkeys(["hidden_dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"], 0.0),
    **dict.fromkeys(["activation_dropout", "layerdrop"], 0.0),
}
_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers")
_TOWER = re.compile("vision|audio")
_QUERY_OR_KEY = re.compile(
    r"q_proj|k_proj|qkv|query|key|c_attn|Wqkv|q_b_proj|in_proj_weight|(^|\.)(q|k)(\.|$)|to_q|to_k"
)
_KEEP = re.compile(  # state-space and recurrent parameters have ranges of their own; scales and routers too
    r"A_log|dt_bias|\bD\b|\.D$|\.A$|time_decay|time_first|time_mix|rg_lru|recurrent_param|rotary|inv_freq|dt_proj"
    r"|altup|correction|router_scale|logit_scale|e_score|gate_bias|hc_|alpha|beta$"
)


def shrunk(
    kind: type[PreTrainedConfig],
    fields: Mapping[str, Any],
    *,
    keep: Iterable[str] = (),
    plain: bool = False,
    tower_layers: int | None = None,
    tower_depth: int = TOWER_LAYERS,
) -> PreTrainedConfig:
    """Make a tiny config.

    Args:
        kind: Its class.
        fields: Fields to set; a mapping for a sub-config is taken as fields of that one.
        keep: Fields to leave at the default of the class.
        plain: Set none but `fields`.
        tower_layers: Number of blocks, for a vision or audio tower.
        tower_depth: Number of blocks of towers among the sub-configs.
    """
    fields = dict(fields)
    default = kind()
    made: dict[str, Any] = {}
    if not plain:
        small = {name: _SIZES[name] for name, value in vars(default).items() if name in _SIZES and value is not None}
        if tower_layers is not None:
            small |= {name: tower_layers for name in _DEPTHS if name in vars(default)}
        made |= {name: value for name, value in small.items() if name not in keep}
    for name, declared in (getattr(kind, "sub_configs", None) or {}).items():
        current, inner = vars(default).get(name), fields.pop(name, {})
        if current is None and not inner:
            continue
        sub = declared if current is None else type(current)
        if sub is not AutoConfig:
            depth = tower_depth if _TOWER.search(name) else None
            made[name] = shrunk(sub, inner, tower_layers=depth, tower_depth=tower_depth)
    made |= fields
    try:
        return kind(**made)
    except TypeError:  # some take their sub-configs as dictionaries only
        plainly: dict[str, Any] = {k: v.to_dict() if isinstance(v, PreTrainedConfig) else v for k, v in made.items()}
        return kind(**plainly)


def enlivened(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model random weights, seeded, under which attention is not uniform and every part shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for owner_name, owner in model.named_modules():
            for name, parameter in owner.named_parameters(recurse=False):
                path = f"{owner_name}.{name}".lstrip(".")
                if parameter.is_floating_point() and parameter.device.type != "meta" and not _KEEP.search(path):
                    _fill(owner, path, parameter, torch.randn(parameter.shape, generator=generator))
    return model


def _fill(owner: nn.Module, path: str, parameter: nn.Parameter, random: torch.Tensor) -> None:
    if isinstance(owner, nn.Embedding):
        parameter.copy_(random * (0.7 if parameter.shape[0] >= VOCABULARY - 5 else 0.3))
    elif isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and parameter.ndim > 1:
        parameter.copy_(random / math.sqrt(parameter[0].numel()))
    elif parameter.ndim == 2:
        width = parameter.shape[0] if type(owner).__name__ == "Conv1D" else parameter.shape[1]
        parameter.copy_(random * ((1.5 if _QUERY_OR_KEY.search(path) else 1.0) / math.sqrt(width)))
    elif parameter.ndim > 2:
        parameter.copy_(random / math.sqrt(max(parameter.shape[-2:])))
    elif parameter.ndim == 1:
        parameter.add_(0.1 * random)
