"""Compiled models are captured as if they were not compiled, or refused; wrappers come off or are refused."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import residua
from residua.capture.runtime.wrappers import is_compiled, replica_of, running_uncompiled
from residua.store.base.errors import CaptureError, PlanError
from tests.models.tiny import TINY

TOKENS = [list(range(3, 3 + length)) for length in (5, 9, 20, 7)]


def wrapped(model: PreTrainedModel) -> PreTrainedModel:
    return cast("PreTrainedModel", torch.compile(model, backend="eager"))


def in_place(model: PreTrainedModel) -> PreTrainedModel:
    model.compile(backend="eager")
    return model


def block_by_block(model: PreTrainedModel) -> PreTrainedModel:
    for block in model.get_submodule("model.layers").children():
        block.compile(backend="eager")
    return model


def rows(model: PreTrainedModel, out: Path) -> np.ndarray:
    result = residua.capture_dataset(model, TOKENS, out=out, sites="resid_post.*,q.1", batch_tokens=48)
    return np.concatenate([result.archive[site][:].reshape(41, -1) for site in result.archive], axis=1)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "after a compiled call"])
@pytest.mark.parametrize("compile_model", [wrapped, in_place, block_by_block])
def test_a_compiled_model_is_captured_as_the_plain_one(
    compile_model: Callable[[PreTrainedModel], PreTrainedModel], warm: bool, tmp_path: Path
) -> None:
    expected = rows(TINY["llama"](), tmp_path / "plain.zarr")
    model = compile_model(TINY["llama"]())
    if warm:
        with torch.inference_mode():
            model(torch.tensor([TOKENS[0]]))
    assert np.array_equal(rows(model, tmp_path / "a.zarr"), expected)


@pytest.mark.parametrize("compile_model", [wrapped, in_place, block_by_block])
def test_a_loop_of_the_users_own_refuses_it_with_the_reason(
    compile_model: Callable[[PreTrainedModel], PreTrainedModel], tmp_path: Path
) -> None:
    with pytest.raises(CaptureError, match=r"compiled.*model\._orig_mod"):
        residua.Recorder(compile_model(TINY["llama"]()), sites="resid_post.*", out=tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


def run(part: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = part(hidden)
    return found


run_compiled = torch.compile(run, backend="eager")
BY_NAME = {"run": run_compiled}


class CallsFunction(nn.Module):
    """Its forward calls a compiled function of this file, which runs a module with a site."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return run_compiled(self.part, hidden)


class LooksUp(CallsFunction):
    """Its forward finds the compiled function in a dictionary."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return BY_NAME["run"](self.part, hidden)


def with_closure(part: nn.Module) -> nn.Module:
    compiled, holder = torch.compile(lambda hidden: part(hidden), backend="eager"), nn.Module()
    holder.part = part
    holder.forward = lambda hidden: compiled(hidden)
    return holder


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "after a compiled call"])
@pytest.mark.parametrize("wrap", [CallsFunction, LooksUp, with_closure])
def test_compiled_functions_that_a_forward_calls_run_uncompiled(
    wrap: Callable[[nn.Module], nn.Module], warm: bool, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    model, site = TINY["llama"](), "module:model.layers.1.mlp.part@output"
    expected: list[torch.Tensor] = []
    handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *call: expected.append(call[2]))
    ids = torch.tensor([TOKENS[2]])
    with torch.no_grad():
        model(ids)
    handle.remove()
    for block in model.get_submodule("model.layers").children():
        block.mlp = wrap(block.mlp)  # type: ignore[arg-type]  # a module
    if warm:
        with torch.no_grad():
            model(ids)
    seen: list[torch.Tensor] = []
    with residua.Recorder(model, sites=site, out=tmp_path / "b.zarr"), torch.no_grad():
        model(input_ids=ids)
    result = residua.capture_dataset(model, TOKENS, out=tmp_path / "a.zarr", sites=f"resid_post.*,{site}")
    with residua.replay(model, result.archive, examples=[2], at="resid_post.0", keep=site) as run_again:
        seen.append(run_again[site][0])
    with residua.tap(model, site, lambda _site, tensor: seen.append(tensor[0])), torch.no_grad():
        model(ids)
    seen += [torch.tensor(result.archive.example(2)[site]), torch.tensor(residua.open(tmp_path / "b.zarr")[site][:])]
    assert len(seen) == 4
    for found in seen:
        torch.testing.assert_close(found, expected[0][0], rtol=1e-4, atol=1e-4)


def test_flex_attention_stays_compiled_and_what_calls_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def backend(name: str) -> Callable[..., object]:
        def compile_graph(graph: torch.fx.GraphModule, _inputs: object) -> object:
            compiled.append(name)
            return graph.forward

        return compile_graph

    flex = import_module("transformers.integrations.flex_attention")
    inner = torch.compile(lambda x: x + 1, backend=backend("flex"))
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", lambda x: inner(x))
    before = flex.compile_friendly_flex_attention
    outer = torch.compile(lambda x: x * 2, backend=backend("outer"))
    with running_uncompiled(nn.Linear(2, 2)):
        assert flex.compile_friendly_flex_attention(outer(torch.ones(2))).tolist() == [3.0, 3.0]
        assert compiled == ["flex"]
    assert flex.compile_friendly_flex_attention is before
    outer(torch.ones(2))
    assert compiled == ["flex", "outer"]


def test_the_model_is_still_compiled_afterwards() -> None:
    model = in_place(TINY["llama"]())
    with running_uncompiled(model) as was_compiled:
        assert was_compiled
    assert is_compiled(model)
    plain = TINY["llama"]()
    with running_uncompiled(plain) as was_compiled:
        assert not was_compiled


def test_the_replica_is_the_model_inside_compile_or_the_plain_model_itself() -> None:
    model = nn.Linear(2, 2)
    assert replica_of(model) is model
    assert replica_of(cast("nn.Module", torch.compile(model, backend="eager"))) is model


def test_other_wrappers_are_refused_by_name() -> None:
    class InferenceEngine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    with pytest.raises(PlanError, match=r"wrapped in InferenceEngine.*FSDP2"):
        replica_of(InferenceEngine())
