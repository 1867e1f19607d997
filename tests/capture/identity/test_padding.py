"""Models that let padding into their rows are found, and no others."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

from residua.capture.forward.inputs import forward_arguments
from residua.capture.identity.padding import Side, padding_leaks
from tests.capture.leaking_models import LEAKING
from tests.models.tiny import _SIZES, ODD, TINY, _build

SIDES: tuple[Side, ...] = ("right", "left")
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
    assert len(ran) == (2 if dtype == torch.float32 else 4)
    assert not padding_leaks(model, side="left")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_that_rounding_sends_to_other_experts_are_no_leak(dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {**_SIZES, "num_hidden_layers": 12, "num_key_value_heads": 2, "head_dim": 8}
    experts: dict[str, Any] = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 16}
    model = _build(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**sizes, **experts))
    nn.Module.to(model, dtype)
    assert not padding_leaks(model)
    assert not padding_leaks(model, side="left")


def slight(size: float, layer: int = 0) -> PreTrainedModel:
    """Return a model in which one block adds a small part of the mean over all positions, padding included."""
    model = TINY["llama"]()

    def leak(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output + size * output.mean(1, keepdim=True)

    model.get_submodule(f"model.layers.{layer}").register_forward_hook(leak)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [*LEAKING.values(), partial(slight, 0.01), partial(slight, 0.003, 1)])
def test_half_precision_hides_no_leak(make: Callable[[], PreTrainedModel], dtype: torch.dtype) -> None:
    model = make()
    nn.Module.to(model, dtype)
    weights = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    n_hooks = sum(len(module._forward_hooks) for module in model.modules())
    for side in SIDES:
        assert padding_leaks(model, side=side)
    assert sum(len(module._forward_hooks) for module in model.modules()) == n_hooks
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == weights[name][0]
        assert torch.equal(tensor, weights[name][1])


def test_a_model_that_does_not_run_in_float32_is_compared_as_it_is() -> None:
    """Its upper blocks only show in half precision, and so does all of one that insists on its type."""
    model = slight(0.01)
    nn.Module.to(model, torch.bfloat16)

    def insist(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].dtype != torch.bfloat16:
            raise TypeError("bfloat16 only")

    model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(insist)
    assert not padding_leaks(model)
    model = LEAKING["averaged"]()
    nn.Module.to(model, torch.bfloat16)
    model.get_submodule("layers.0").register_forward_pre_hook(insist)
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
