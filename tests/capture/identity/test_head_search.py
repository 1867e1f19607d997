"""LM heads of models that are not in the table: their files give the logits of plain calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residua.analysis.lens.lm_head import load_lm_head
from residua.capture.identity.lm_head import lm_head_problem
from tests.lm_heads import save_lm_head
from tests.models.registries import build
from tests.models.tiny_pairs import TINY_PAIRS, tiny_whisper

LAST = {
    "causal/bloom": "transformer.h.2",  # layer norm
    "causal/granite": "model.layers.2",  # logits are scaled
    "causal/cohere": "model.layers.2",
    "causal/minicpm3": "model.layers.2",  # the stream is scaled before the head
    "causal/gemma4_text": "model.layers.3",
    "causal/recurrent_gemma": "model.layers.3",  # a norm with an offset, and a soft cap of another name
    "causal/mamba": "backbone.layers.2",
    "causal/lfm2": "model.layers.3",
    "masked/roberta": "roberta.encoder.layer.2",  # a dense layer with activation and norm
    "masked/distilbert": "distilbert.transformer.layer.2",
    "vision-language/qwen2_vl": "model.language_model.layers.2",
    "vision-language/gemma3": "model.language_model.layers.2",
    "vision-language/idefics3": "model.text_model.layers.2",
    "seq2seq/t5": "decoder.block.2",  # scaled, since input and output embeddings are tied
    "seq2seq/marian": "model.decoder.layers.2",
}


def final_and_logits(model: PreTrainedModel, path: str) -> tuple[Tensor, Tensor]:
    """Return what the last block gives in a plain call, and the logits."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).clone())

    handle = model.get_submodule(path).register_forward_hook(keep)
    ids = torch.randint(8, 90, (2, 9), generator=torch.Generator().manual_seed(4))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        call["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        logits: Tensor = model(**call).logits
    handle.remove()
    return seen[0], logits


@pytest.mark.parametrize("name", LAST)
def test_a_found_head_gives_the_logits(name: str, tmp_path: Path) -> None:
    registry, _, key = name.partition("/")
    model = build(registry, key)
    assert lm_head_problem(model) == ""
    assert save_lm_head(model, tmp_path / "head")
    final, logits = final_and_logits(model, LAST[name])
    found = load_lm_head(tmp_path / "head").logits(final)
    torch.testing.assert_close(found, logits, atol=float(logits.abs().max()) * 1e-4, rtol=0)


@pytest.mark.parametrize("name", ["causal/bloom", "causal/granite", "vision-language/gemma3"])
def test_a_head_is_found_in_half_precision(name: str, tmp_path: Path) -> None:
    registry, _, key = name.partition("/")
    model = build(registry, key)
    nn.Module.to(model, torch.bfloat16)
    assert save_lm_head(model, tmp_path / "head")
    final, logits = final_and_logits(model, LAST[name])
    found = load_lm_head(tmp_path / "head").logits(final)
    torch.testing.assert_close(found, logits, atol=float(logits.abs().max()) * 0.03, rtol=0)


@pytest.mark.parametrize("key", ["gemma3n_text", "qwen4_exp_text", "blt"])
def test_a_head_of_other_parts_is_not_known(key: str, tmp_path: Path) -> None:
    model = build("causal", key)
    assert type(model).__name__ in lm_head_problem(model)
    assert not save_lm_head(model, tmp_path / "head")


def test_a_head_that_is_changed_later_is_looked_at_anew(tmp_path: Path) -> None:
    model = build("causal", "granite")
    assert lm_head_problem(model) == ""
    model.get_submodule("lm_head").register_forward_hook(lambda _m, _a, output: output.square())
    assert "GraniteForCausalLM" in lm_head_problem(model)
    assert not save_lm_head(model, tmp_path / "head")


@pytest.mark.parametrize("name", [*TINY_PAIRS, "whisper"])
def test_a_lens_of_a_decoder_ends_in_the_logits_of_the_model(name: str, tmp_path: Path) -> None:
    """The last point of a logit lens gives the model's own logits; the encoder has none."""
    model = tiny_whisper() if name == "whisper" else TINY_PAIRS[name]()
    assert lm_head_problem(model) == ""
