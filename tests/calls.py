"""Counting the calls of a module, but for those over the few tokens by which a model is known again."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from residua.capture.identity.few_tokens import N_EXAMPLES, N_POSITIONS


def count_calls(module: nn.Module, calls: list[int]) -> RemovableHandle:
    """Append 1 to `calls` at each call of `module`; remove the handle to stop."""

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: object) -> None:
        shapes = [tuple(value.shape[:2]) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if (N_EXAMPLES, N_POSITIONS) not in shapes:
            calls.append(1)

    return module.register_forward_hook(note, with_kwargs=True)
