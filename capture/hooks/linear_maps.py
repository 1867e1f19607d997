"""Results of linear maps inside a module's forward, read and replaced as torch computes them.

A router of a mixture of experts multiplies by its weights, chooses experts, and returns both: what it returns as logits
comes too late to change the choice. A `TorchFunctionMode` sees the product itself, while the module runs.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LINEAR: frozenset[Callable[..., Any]] = frozenset(
    (functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
)
"""Torch's functions that are counted, in the order in which a forward calls them."""


class _Watch(TorchFunctionMode):
    """Passes on the result of one call of one forward.

    Args:
        number: Number of the call, from 0.
        pass_on: Takes its result; returns what to go on with.
    """

    def __init__(self, number: int, pass_on: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._number = number
        self._pass_on = pass_on
        self._n_calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one call, with its result passed on if it is the one."""
        del types
        result = func(*args, **(kwargs or {}))
        if func not in LINEAR:
            return result
        number, self._n_calls = self._n_calls, self._n_calls + 1
        return self._pass_on(result) if number == self._number else result


@contextmanager
def watching_linear(module: nn.Module, number: int, pass_on: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Call ``pass_on`` with the result of a linear map whenever the module runs.

    Args:
        module: The module in whose forward the map is, or in that of a module in it.
        number: Number of the map among those of one forward, from 0.
        pass_on: Takes the result; returns what the module goes on with.
    """
    local = threading.local()

    def begin(_module: nn.Module, _args: object) -> None:
        watch = _Watch(number, pass_on)
        watch.__enter__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        vars(local).setdefault("running", []).append(watch)

    def end(_module: nn.Module, _args: object, _output: object) -> None:
        if vars(local).get("running"):  # empty if another pre-hook failed before `begin`
            local.running.pop().__exit__(None, None, None)

    handles = (module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
