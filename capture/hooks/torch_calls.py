"""Results of calls of torch inside a module's forward, read and replaced as they are computed.

A router of a mixture of experts multiplies by its weights, chooses experts, and returns both: what it returns as logits
comes too late to change the choice. A gate multiplies what a shared expert gives, and no module returns the product. A
`TorchFunctionMode` sees such calls while the module runs.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LINEAR: frozenset[Callable[..., Any]] = frozenset(
    (functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
)
"""Torch's linear maps."""

MULTIPLICATIONS: frozenset[Callable[..., Any]] = frozenset(
    (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply, torch.Tensor.__mul__, torch.Tensor.__rmul__)
)
"""Torch's multiplications element by element."""


class _Watch(TorchFunctionMode):
    """Passes on the result of one call of one forward, without those of modules in it.

    How many calls there are in other modules may depend on the tokens: experts that no token goes to make none.

    Args:
        functions: The functions that are counted.
        number: Number of the call, from 0.
        pass_on: Takes its result; returns what to go on with.

    Attributes:
        depth: How many modules in it are running.
    """

    def __init__(
        self, functions: frozenset[Callable[..., Any]], number: int, pass_on: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self._functions = functions
        self._number = number
        self._pass_on = pass_on
        self._n_calls = 0
        self.depth = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one call, with its result passed on if it is the one."""
        del types
        result = func(*args, **(kwargs or {}))
        if self.depth or func not in self._functions:
            return result
        number, self._n_calls = self._n_calls, self._n_calls + 1
        return self._pass_on(result) if number == self._number else result


class _Hooks:
    """The hooks of one module that is watched; each thread has its own calls.

    Args:
        make: Makes the watch of one forward.
    """

    def __init__(self, make: Callable[[], _Watch]) -> None:
        self._make = make
        self._local = threading.local()

    @property
    def _running(self) -> list[_Watch]:
        running: list[_Watch] = vars(self._local).setdefault("running", [])
        return running

    def begin(self, _module: nn.Module, _args: object) -> None:
        watch = self._make()
        watch.__enter__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self._running.append(watch)

    def end(self, _module: nn.Module, _args: object, _output: object) -> None:
        if self._running:  # empty if another pre-hook failed before `begin`
            self._running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # see above

    def go_in(self, _module: nn.Module, _args: object) -> None:
        for watch in self._running[-1:]:
            watch.depth += 1

    def come_out(self, _module: nn.Module, _args: object, _output: object) -> None:
        for watch in self._running[-1:]:
            watch.depth -= 1


@contextmanager
def watching_call(
    module: nn.Module, functions: frozenset[Callable[..., Any]], number: int, pass_on: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Call ``pass_on`` with the result of a call whenever the module runs.

    Args:
        module: The module in whose own forward the call is.
        functions: `LINEAR` or `MULTIPLICATIONS`.
        number: Number of the call among those of these functions in one forward, from 0.
        pass_on: Takes the result; returns what the module goes on with.
    """
    hooks = _Hooks(partial(_Watch, functions, number, pass_on))
    handles = [module.register_forward_pre_hook(hooks.begin), module.register_forward_hook(hooks.end, always_call=True)]
    for inner in module.modules():
        if inner is not module:
            handles.append(inner.register_forward_pre_hook(hooks.go_in))
            handles.append(inner.register_forward_hook(hooks.come_out, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
