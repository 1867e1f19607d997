"""Results of calls of torch inside a module's forward, read and replaced as they are computed.

A router of a mixture of experts multiplies by its weights, chooses experts, and returns both: what it returns as logits
comes too late to change the choice. A gate multiplies what a shared expert gives, and no module returns the product. A
`TorchFunctionMode` sees such calls while the module runs.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ModeT = TypeVar("ModeT", bound=TorchFunctionMode)

LINEAR: frozenset[Callable[..., Any]] = frozenset(
    (functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
)
"""Torch's linear maps."""

MULTIPLICATIONS: frozenset[Callable[..., Any]] = frozenset(
    (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply, torch.Tensor.__mul__, torch.Tensor.__rmul__)
)
"""Torch's multiplications element by element."""

CHOICES: frozenset[Callable[..., Any]] = frozenset((torch.topk, torch.Tensor.topk))
"""Torch's choices of the largest; what is read and replaced are the indices, and the values follow."""

SOFTMAXES: frozenset[Callable[..., Any]] = frozenset((functional.softmax, torch.softmax, torch.Tensor.softmax))
"""Torch's softmaxes."""

SUMS: frozenset[Callable[..., Any]] = frozenset(
    (torch.sum, torch.Tensor.sum, torch.index_add, torch.Tensor.index_add, torch.Tensor.index_add_)
)
"""Torch's sums along an axis, and by index."""

CALLS: Mapping[str, frozenset[Callable[..., Any]]] = {
    "linear": LINEAR,
    "product": MULTIPLICATIONS,
    "choice": CHOICES,
    "softmax": SOFTMAXES,
    "sum": SUMS,
}
"""The functions of each way to read a site that is the result of a call; see `residua.capture.hooks.site.Via`."""


def passed_on(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    result: Any,
    pass_on: Callable[[Tensor], Tensor],
) -> Any:
    """Return the result of a call after its tensor was passed on; of a choice, that are the indices."""
    if func not in CHOICES:
        return pass_on(result)
    values, index = result
    new = pass_on(index)
    if new is not index:
        taken = args[0] if args else kwargs["input"]
        values = taken.gather(args[2] if len(args) > _AXIS else kwargs.get("dim", -1), new)
    return type(result)((values, new))


_AXIS = 2  # place of the axis among the arguments of a choice


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
        if number != self._number:
            return result
        return passed_on(func, args, kwargs or {}, result, self._pass_on)


class ModuleMode(Generic[ModeT]):
    """A mode that a module runs in: another one for each forward, since threads may run the module at once.

    Args:
        module: The module.
        make: Makes the mode of one forward.

    Attributes:
        handles: What to remove when the module is to run without.
    """

    def __init__(self, module: nn.Module, make: Callable[[], ModeT]) -> None:
        self._make = make
        self._local = threading.local()
        self.handles = [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        ]

    @property
    def running(self) -> list[ModeT]:
        """The modes of the forwards that run in this thread; the innermost is the last."""
        running: list[ModeT] = vars(self._local).setdefault("running", [])
        return running

    def _begin(self, _module: nn.Module, _args: object) -> None:
        mode = self._make()
        mode.__enter__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self.running.append(mode)

    def _end(self, _module: nn.Module, _args: object, _output: object) -> None:
        if self.running:  # empty if another pre-hook failed before `_begin`
            self.running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # see above


@contextmanager
def watching_call(
    module: nn.Module, functions: frozenset[Callable[..., Any]], number: int, pass_on: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Call ``pass_on`` with the result of a call whenever the module runs.

    Args:
        module: The module in whose own forward the call is.
        functions: `LINEAR`, `MULTIPLICATIONS`, `CHOICES`, `SOFTMAXES` or `SUMS`.
        number: Number of the call among those of these functions in one forward, from 0.
        pass_on: Takes the result; returns what the module goes on with.
    """
    watched = ModuleMode(module, partial(_Watch, functions, number, pass_on))

    def go_in(_module: nn.Module, _args: object) -> None:
        for watch in watched.running[-1:]:
            watch.depth += 1

    def come_out(_module: nn.Module, _args: object, _output: object) -> None:
        for watch in watched.running[-1:]:
            watch.depth -= 1

    handles = watched.handles
    for inner in module.modules():
        if inner is not module:
            handles.append(inner.register_forward_pre_hook(go_in))
            handles.append(inner.register_forward_hook(come_out, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
