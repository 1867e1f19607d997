"""Compiled models are captured as if they were not compiled, or refused; wrappers come off or are refused."""

from collections.abc import Callable
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
