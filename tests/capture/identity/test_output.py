"""The output of a model on a few tokens: equal again, other by rounding, or another model's."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from residua.capture.identity.output import OutputSample, compare_outputs, output_sample
from residua.store.base.errors import CaptureError
from tests.models.tiny import TINY


def sample(model: nn.Module) -> OutputSample:
    found = output_sample(model)
    assert isinstance(found, OutputSample)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "mixtral"])
def test_a_model_gives_the_same_output_again(name: str) -> None:
    model = TINY[name]()
    first = sample(model)
    model.train()
    assert sample(model) == first
    assert model.training
    assert OutputSample.from_json(json.loads(json.dumps(first.to_json()))) == first
    assert compare_outputs(first, sample(TINY[name]()), same_conditions=True).is_equal


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_not_another_model(dtype: torch.dtype) -> None:
    model = nn.Module.to(TINY["llama"](), dtype)
    first = sample(model)
    part = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    signs = [1 if number % 2 else -1 for number in range(len(first.values))]
    rounded = [value * (1 + part * sign) for value, sign in zip(first.values, signs, strict=True)]
    near = replace(first, sha256="another", values=tuple(rounded))
    for same in (True, False):
        found = compare_outputs(first, near, same_conditions=same)
        assert not found.is_equal
        assert not found.is_other
        assert found.text


def test_what_is_allowed_depends_on_the_conditions() -> None:
    first = sample(TINY["llama"]())
    changed = TINY["llama"]()
    changed.get_parameter("model.norm.weight").data.mul_(1.0003)
    assert compare_outputs(first, sample(changed), same_conditions=True).is_other
    assert not compare_outputs(first, sample(changed), same_conditions=False).is_other
    changed.get_submodule("model.layers.0.self_attn").scaling = 0.5  # type: ignore[assignment]  # a float, no tensor
    assert compare_outputs(first, sample(changed), same_conditions=False).is_other


def test_a_model_that_runs_on_other_inputs_or_not_at_all_has_a_reason() -> None:
    assert "model of transformers" in str(output_sample(nn.Linear(2, 2)))
    broken = TINY["llama"]()
    broken.get_submodule("model.layers.1").register_forward_hook(lambda *_: 1 / 0)
    assert "ZeroDivisionError" in str(output_sample(broken))
    assert OutputSample.from_json("a reason") is None


NO_MEMORY = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
)


@pytest.mark.parametrize("error", NO_MEMORY)
def test_no_memory_is_an_error(error: Exception) -> None:
    model = TINY["llama"]()

    def fail(*_: object) -> None:
        raise error

    model.get_submodule("model.layers.1").register_forward_hook(fail)
    with pytest.raises(CaptureError, match="memory"):
        output_sample(model)


@pytest.mark.parametrize("values", [["x"], [float("nan")], [1.0] * 20_000, {"a": 1}, None])
def test_a_forged_sample_is_none(values: object) -> None:
    good = sample(TINY["llama"]()).to_json()
    assert OutputSample.from_json({**good, "values": values}) is None
    assert OutputSample.from_json({**good, "shape": ["a"]}) is None
