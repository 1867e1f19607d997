"""Models that let padding into their rows are found, and no others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

from residua.capture.forward.inputs import forward_arguments
from residua.capture.identity.padding import padding_leaks
from tests.capture.leaking_models import LEAKING
from tests.models.tiny import _SIZES, ODD, TINY, _build

_CONVOLVED: dict[str, Any] = {"conv_kernel_size": 3}  # with a mask

NOT_LEAKING: dict[str, Callable[[], PreTrainedModel]] = {
    **TINY,
    **ODD,
    "mamba": lambda: _build(hf.MambaForCausalLM, hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)),
    "deberta-v2": lambda: _build(
        hf.DebertaV2ForMaskedLM, hf.DebertaV2Config(**_SIZES, relative_attention=True, **_CONVOLVED)
    ),
}


@pytest.mark.parametrize("name", LEAKING)
def test_a_model_that_leaks_is_found_once_and_for_all(name: str) -> None:
    model = LEAKING[name]()
    nn.Module.train(model)
    assert padding_leaks(model)
    assert padding_leaks(model, side="left")
    assert model.training
    ran: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    assert padding_leaks(model)
    handle.remove()
    assert not ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NOT_LEAKING)
def test_rounding_is_no_leak(name: str, dtype: torch.dtype) -> None:
    model = NOT_LEAKING[name]()
    nn.Module.to(model, dtype)
    forward_arguments(model)  # it may run the model to find out about its positions, once
    ran: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    assert not padding_leaks(model)
    handle.remove()
    assert len(ran) == 2
    assert not padding_leaks(model, side="left")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_that_rounding_sends_to_other_experts_are_no_leak(dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {**_SIZES, "num_hidden_layers": 12, "num_key_value_heads": 2, "head_dim": 8}
    experts: dict[str, Any] = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 16}
    model = _build(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**sizes, **experts))
    nn.Module.to(model, dtype)
    assert not padding_leaks(model)
    assert not padding_leaks(model, side="left")


def test_half_precision_hides_only_small_leaks() -> None:
    model = LEAKING["averaged"]()
    nn.Module.to(model, torch.bfloat16)
    assert padding_leaks(model)


def test_padding_on_one_side_may_leak_alone() -> None:
    config = hf.RwkvConfig(vocab_size=97, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    model = _build(hf.RwkvForCausalLM, config)
    assert not padding_leaks(model)
    assert padding_leaks(model, side="left")


def test_a_model_that_cannot_run_on_a_few_tokens_is_not_flagged() -> None:
    assert not padding_leaks(nn.Linear(2, 2))
    model = LEAKING["averaged"]()
    handle = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("needs an image")))
    assert not padding_leaks(model)
    handle.remove()
