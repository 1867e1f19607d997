"""The replica inside what a user wrapped: the same object, or a refusal that says what to do."""

from typing import cast

import pytest
import torch
from torch import nn

from residua.capture.runtime.replica import replica_of
from residua.store.base.errors import PlanError


def test_compile_is_taken_off_and_a_plain_model_is_itself() -> None:
    model = nn.Linear(2, 2)
    assert replica_of(model) is model
    assert replica_of(cast("nn.Module", torch.compile(model, backend="eager"))) is model


def test_wrappers_whose_forward_is_needed_are_refused_by_name() -> None:
    class InferenceEngine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    with pytest.raises(PlanError, match=r"wrapped in InferenceEngine.*FSDP2"):
        replica_of(InferenceEngine())
