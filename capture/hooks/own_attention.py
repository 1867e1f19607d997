"""Attention in a model's own code: the matrix products inside a module's forward, read and replaced as they are called.

Some models call no attention function of transformers, but multiply queries and keys, take the softmax, and multiply
by the values themselves. Each of these is a call of torch, which a `TorchFunctionMode` sees while the module runs.
Which call is which is found out once (`residua.capture.blocks.own_attention`); `OwnAttention` keeps their numbers. Only
modules with sites that were asked for are watched, and only while they run.

Axes: `B` examples, `H` heads, `T` or `Q` query positions, `K` key positions, `D` width of a head. Some models have
examples and heads as one axis, (B x H).
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from residua.capture.hooks.torch_calls import ModuleMode
from residua.store.base.errors import CaptureError


@dataclass(frozen=True, kw_only=True)
class OwnAttention:
    """The calls that compute a module's attention.

    Attributes:
        module: Path of the module in whose forward they are.
        n_heads: Number of heads of the weights.
        scores: Number of the product of queries and keys, among the products of batches of matrices in one forward of
            the module, from 0; None if it is not known, or if scores are the sum of several products.
        values: Number of the product of weights and values; None if it is not known.
    """

    module: str
    n_heads: int
    scores: int | None = None
    values: int | None = None


class Operands(NamedTuple):
    """Where a function takes two tensors: place among its arguments, and their names."""

    places: tuple[int, int]
    names: tuple[tuple[str, ...], tuple[str, ...]]

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the two tensors of a call."""
        one, other = (
            args[place] if place < len(args) else next(kwargs[name] for name in names if name in kwargs)
            for place, names in zip(self.places, self.names, strict=True)
        )
        return one, other

    def replaced(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with other tensors."""
        new_args, new_kwargs = list(args), dict(kwargs)
        for place, names, tensor in zip(self.places, self.names, tensors, strict=True):
            if place < len(args):
                new_args[place] = tensor
            else:
                new_kwargs[next(name for name in names if name in kwargs)] = tensor
        return tuple(new_args), new_kwargs


_PLAIN = Operands((0, 1), (("input", "self"), ("other", "mat2", "tensor2")))
_ADDED = Operands((1, 2), (("batch1",), ("batch2",)))

PRODUCTS: Mapping[Callable[..., Any], Operands] = {
    torch.matmul: _PLAIN,
    torch.Tensor.matmul: _PLAIN,
    torch.Tensor.__matmul__: _PLAIN,
    torch.bmm: _PLAIN,
    torch.Tensor.bmm: _PLAIN,
    torch.baddbmm: _ADDED,
    torch.Tensor.baddbmm: _ADDED,
}
"""Torch's products of batches of matrices."""

SOFTMAX: frozenset[Callable[..., Any]] = frozenset((functional.softmax, torch.softmax, torch.Tensor.softmax))
FUSED = functional.scaled_dot_product_attention
_FUSED_NAMES = ("query", "key", "value")

_HEADS_AXES = 4  # (B, H, T, D); otherwise (B x H, T, D)

PassOn = Callable[[str, Tensor], Tensor]
"""Gives a tensor of a kind to its readers, (B, H, T, ...), but (B, T, H, D) for ``z``; returns what to go on with."""


def is_of_heads(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call is a product of two batches of matrices, and not one with a matrix of weights."""
    return func in PRODUCTS and all(tensor.ndim >= _HEADS_AXES - 1 for tensor in PRODUCTS[func].of(args, kwargs))


def fused_operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of a call of torch's fused attention."""
    query, key, value = (args[place] if place < len(args) else kwargs[name] for place, name in enumerate(_FUSED_NAMES))
    return query, key, value


class _Watch(TorchFunctionMode):
    """Sees the calls of one forward of one module.

    Args:
        own: Which calls to look at.
        kinds: The kinds of tensors that are read.
        pass_on: Called with each of these.
    """

    def __init__(self, own: OwnAttention, kinds: frozenset[str], pass_on: PassOn) -> None:
        super().__init__()
        self._own = own
        self._kinds = kinds
        self._pass_on = pass_on
        self._n_products = 0
        self._n_softmax = 0
        self._is_done = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one call, with its operands and result passed on if it is one of the attention's."""
        del types
        kwargs = kwargs or {}
        if func is FUSED:
            return self._fused(args, kwargs)
        self._n_softmax += func in SOFTMAX
        operands = PRODUCTS.get(func)
        if operands is None or self._is_done or not is_of_heads(func, args, kwargs):
            return func(*args, **kwargs)
        number, self._n_products = self._n_products, self._n_products + 1
        if number == self._own.scores:
            self._n_softmax = 0
            query, key = operands.of(args, kwargs)
            both = self._heads("q", query), self._heads("k", key.transpose(-1, -2)).transpose(-1, -2)
            args, kwargs = operands.replaced(args, kwargs, both)
        if number != self._own.values:
            return func(*args, **kwargs)
        self._check()
        weights, value = operands.of(args, kwargs)
        args, kwargs = operands.replaced(args, kwargs, (self._heads("pattern", weights), self._heads("v", value)))
        self._is_done = True
        return self._outputs(func(*args, **kwargs))

    def _check(self) -> None:
        if self._own.scores is not None and self._n_softmax != 1:
            raise CaptureError(
                f"{self._own.module} computes its attention in other steps than when its sites were found "
                f"({self._n_softmax} softmax between the products instead of 1): do not change its settings meanwhile"
            )

    def _fused(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if "pattern" in self._kinds:
            raise CaptureError(
                f"a pattern of {self._own.module} was asked for, and it computes its attention by one fused call, "
                "which gives none: do not change the model's attention implementation while patterns are read"
            )
        tensors = [self._heads(kind, each) for kind, each in zip("qkv", fused_operands(args, kwargs), strict=True)]
        self._is_done = True
        new_args, new_kwargs = list(args), dict(kwargs)
        for place, tensor in enumerate(tensors):
            if place < len(args):
                new_args[place] = tensor
            else:
                new_kwargs[_FUSED_NAMES[place]] = tensor
        return self._outputs(FUSED(*new_args, **new_kwargs))

    def _heads(self, kind: str, tensor: Tensor) -> Tensor:
        """Pass on a tensor of heads as (B, H, T, ...); the one that returns has the axes that came."""
        if kind not in self._kinds:
            return tensor
        if tensor.ndim == _HEADS_AXES:
            return self._pass_on(kind, tensor)
        return self._pass_on(kind, self._by_heads(tensor)).reshape(tensor.shape)

    def _outputs(self, output: Tensor) -> Tensor:
        if "z" not in self._kinds:
            return output
        z_BHTD = output if output.ndim == _HEADS_AXES else self._by_heads(output)
        return self._pass_on("z", z_BHTD.transpose(1, 2)).transpose(1, 2).reshape(output.shape)

    def _by_heads(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, self._own.n_heads, *tensor.shape[1:])


class _Watched(ModuleMode[_Watch]):
    """One module that is watched, for as long as somebody reads it."""

    n_users = 0


_lock = threading.Lock()
_watched: dict[int, _Watched] = {}  # by id of the module, which the model keeps alive


@contextmanager
def watching(
    own: Mapping[nn.Module, OwnAttention], readers: Callable[[nn.Module], tuple[frozenset[str], PassOn]]
) -> Iterator[None]:
    """Watch these modules while they run; several contexts may watch one module, which sees each call once.

    Args:
        own: For each module, which calls compute its attention.
        readers: Called when a module runs: the kinds that are read in it, and who takes them.
    """

    def watch(module: nn.Module, calls: OwnAttention) -> _Watch:
        return _Watch(calls, *readers(module))

    with _lock:
        for module, calls in own.items():
            if id(module) not in _watched:
                _watched[id(module)] = _Watched(module, partial(watch, module, calls))
            _watched[id(module)].n_users += 1
    try:
        yield
    finally:
        with _lock:
            for module in own:
                _watched[id(module)].n_users -= 1
                if not _watched[id(module)].n_users:
                    for handle in _watched.pop(id(module)).handles:
                        handle.remove()
