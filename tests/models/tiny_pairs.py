"""Tiny encoder-decoders with random weights, built from configs; encoder and decoder differ in depth and heads.

`TINY_PAIRS` maps a name to a function that builds the model, which takes token ids on both sides.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 97
LONGEST = 40
N_ENCODER, N_DECODER = 2, 3

_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": N_ENCODER,
    "decoder_layers": N_DECODER,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": LONGEST,
    **_IDS,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_ff": 40,
    "num_layers": N_ENCODER,
    "num_decoder_layers": N_DECODER,
    "num_heads": 4,
    "d_kv": 8,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


def _build(make: type[PreTrainedModel], config: PreTrainedConfig, scale: float) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make(config)
        model.train(False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(scale)
                else:  # norms and biases away from 1 and 0, so that tests notice a missing one
                    parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


TINY_PAIRS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: _build(hf.T5ForConditionalGeneration, hf.T5Config(**_T5), 2.0),
    "bart": lambda: _build(hf.BartForConditionalGeneration, hf.BartConfig(**_SIZES), 8.0),
    "mbart": lambda: _build(hf.MBartForConditionalGeneration, hf.MBartConfig(**_SIZES), 8.0),
    "pegasus": lambda: _build(hf.PegasusForConditionalGeneration, hf.PegasusConfig(**_SIZES), 8.0),
    "marian": lambda: _build(hf.MarianMTModel, hf.MarianConfig(decoder_vocab_size=VOCABULARY, **_SIZES), 8.0),
}


def tiny_whisper() -> PreTrainedModel:
    """Return a tiny Whisper, whose encoder takes 24 frames of 8 features and has 12 positions."""
    sizes = {name: value for name, value in _SIZES.items() if name != "max_position_embeddings"}
    config = hf.WhisperConfig(
        **sizes, num_mel_bins=8, max_source_positions=12, max_target_positions=LONGEST, begin_suppress_tokens=None
    )
    return _build(hf.WhisperForConditionalGeneration, config, 8.0)
