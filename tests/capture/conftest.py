"""What every test of this room begins with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Forget what other tests compiled: torch stops compiling a function that it compiled often enough."""
    torch.compiler.reset()
