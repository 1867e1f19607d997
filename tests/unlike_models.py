"""Tiny models whose blocks are unlike each other or unlike those of the table of architectures, or that need images."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

from tests.models.tiny import LAYERS

_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_IDS,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {
    **_GROUPED,
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}
_SHARED_KEYS: dict[str, Any] = {
    **_GEMMA,
    "global_head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_XLM: dict[str, Any] = {
    "vocab_size": 97,
    "emb_dim": 32,
    "n_layers": LAYERS,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "pad_index": 0,
    "bos_index": 1,
    "eos_index": 2,
    **_IDS,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def made(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model with random weights, seeded, in evaluation mode; every part of it is large enough to show."""
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    model = kind(config)
    model.train(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(0, 0.2)
    torch.random.set_rng_state(state)
    return model


def attention_weights(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Return what transformers itself gives as attention weights of the blocks that have any."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
    return [weights for weights in found if weights is not None]


def _clip() -> PreTrainedModel:
    text = {**_SIZES, "projection_dim": 16}
    vision = {**_VISION, "projection_dim": 16}
    return made(hf.CLIPModel, hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _llava() -> PreTrainedModel:
    text, vision = hf.LlamaConfig(**_GROUPED), hf.CLIPVisionConfig(**_VISION)
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=4, image_seq_length=4)
    return made(hf.LlavaForConditionalGeneration, config)


UNLIKE: dict[str, Callable[[], PreTrainedModel]] = {
    "albert": lambda: made(hf.AlbertModel, hf.AlbertConfig(**_SIZES, embedding_size=16)),
    "clip": _clip,
    "bitnet": lambda: made(hf.BitNetForCausalLM, hf.BitNetConfig(**_GROUPED)),
    "diffllama": lambda: made(hf.DiffLlamaForCausalLM, hf.DiffLlamaConfig(**_GROUPED)),
    "falcon": lambda: made(hf.FalconForCausalLM, hf.FalconConfig(**_SIZES, multi_query=True, parallel_attn=True)),
    "falcon-alibi": lambda: made(
        hf.FalconForCausalLM, hf.FalconConfig(**_SIZES, multi_query=False, alibi=True, parallel_attn=False)
    ),
    "flaubert": lambda: made(hf.FlaubertWithLMHeadModel, hf.FlaubertConfig(**_XLM)),
    "gemma3n": lambda: made(
        hf.Gemma3nForCausalLM, hf.Gemma3nTextConfig(**_GEMMA, laurel_rank=4, activation_sparsity_pattern=[0.0] * LAYERS)
    ),
    "gemma3n-shared-keys": lambda: made(
        hf.Gemma3nForCausalLM,
        hf.Gemma3nTextConfig(
            **{name: value for name, value in _SHARED_KEYS.items() if name != "global_head_dim"},
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ),
    "gemma4": lambda: made(Gemma4ForCausalLM, Gemma4TextConfig(**{**_GEMMA, "global_head_dim": 16})),
    "gemma4-shared-keys": lambda: made(Gemma4ForCausalLM, Gemma4TextConfig(**_SHARED_KEYS)),
    "gpt_neo": lambda: made(
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig(
            vocab_size=97,
            hidden_size=32,
            num_layers=LAYERS,
            num_heads=4,
            intermediate_size=48,
            attention_types=[[["global", "local", "global"], 1]],
            window_size=4,
            **_IDS,
        ),
    ),
    "granite": lambda: made(hf.GraniteForCausalLM, hf.GraniteConfig(**_GROUPED, residual_multiplier=0.5)),
    "granite_swa": lambda: made(hf.GraniteSWAForCausalLM, hf.GraniteSWAConfig(**_GROUPED)),
    "ibert": lambda: made(hf.IBertForMaskedLM, hf.IBertConfig(**_SIZES)),
    "lfm2": lambda: made(
        hf.Lfm2ForCausalLM,
        hf.Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3),
    ),
    "llava": _llava,
    "mamba": lambda: made(
        hf.MambaForCausalLM,
        hf.MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=LAYERS, **_IDS),
    ),
    "mpt": lambda: made(
        hf.MptForCausalLM,
        hf.MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=LAYERS, max_seq_len=64, expansion_ratio=2, **_IDS),
    ),
    "mra": lambda: made(hf.MraForMaskedLM, hf.MraConfig(**_SIZES)),
    "nystromformer": lambda: made(hf.NystromformerForMaskedLM, hf.NystromformerConfig(**_SIZES)),
    "roformer": lambda: made(hf.RoFormerForMaskedLM, hf.RoFormerConfig(**_SIZES)),
    "stablelm": lambda: made(hf.StableLmForCausalLM, hf.StableLmConfig(**_GROUPED)),
    "xglm": lambda: made(
        hf.XGLMForCausalLM,
        hf.XGLMConfig(
            vocab_size=97,
            d_model=32,
            ffn_dim=48,
            num_layers=LAYERS,
            attention_heads=4,
            max_position_embeddings=64,
            **_IDS,
        ),
    ),
    "xlm": lambda: made(hf.XLMWithLMHeadModel, hf.XLMConfig(**_XLM)),
    "yoso": lambda: made(hf.YosoForMaskedLM, hf.YosoConfig(**_SIZES)),
}
"""Models that the table of architectures does not know, by name."""
