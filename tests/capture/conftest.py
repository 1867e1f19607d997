"""Fixtures of every test of `residua.capture`."""

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Forget what other tests compiled: torch stops compiling a function after a number of times."""
    torch.compiler.reset()
