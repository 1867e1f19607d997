"""Attention in a model's own code, found by watching which calls of torch a block makes while it runs.

A product whose result goes, element by element, into a softmax gives the scores: its operands are queries and keys as
they meet. A product that takes what came out of the softmax gives the head outputs: its operands are the pattern and
the values. That the heads lie as they seem to is proved by what follows: the head outputs, with the heads of a token
side by side, must be what a module of the block takes.

Axes: `B` examples, `H` heads, `T` positions, `D` width of a head.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from residua.capture.hooks.attention import eager_attention
from residua.capture.hooks.forward_call import probing
from residua.capture.hooks.own_attention import FUSED, PRODUCTS, SOFTMAX, OwnAttention, fused_operands, is_of_heads
from residua.store.base.errors import CaptureError

_HEADS_AXES = 4  # (B, H, T, D); otherwise (B x H, T, D)


@dataclass(frozen=True, eq=False)
class _Product:
    """A product of matrices: for each module that ran, outer ones first, its number among the products in it."""

    numbers: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class _Softmax:
    """A softmax: the modules that ran, and the products that its input was made of."""

    running: tuple[str, ...]
    products: frozenset[_Product]


@dataclass(frozen=True, eq=False)
class _Outputs:
    """Head outputs: the product or fused call that gave them, the softmax of the weights, and the number of heads."""

    product: _Product
    softmax: _Softmax | None
    n_heads: int
    tensor: Tensor


@dataclass(kw_only=True)
class _BlockCalls:
    """What was seen of one block.

    Attributes:
        shape: (examples, positions) of the run.
        running: The modules that run, outer ones first, each with the number of products in it so far.
        made_of: By the id of a tensor: the tensor, which is kept alive, and what it is made of element by element.
        outputs: The head outputs.
        taken: Those that a module of the block took.
    """

    shape: tuple[int, int]
    running: dict[str, int] = field(default_factory=dict)
    made_of: dict[int, tuple[Tensor, frozenset[_Product | _Softmax]]] = field(default_factory=dict)
    outputs: list[_Outputs] = field(default_factory=list)
    taken: set[_Outputs] = field(default_factory=set)

    def sources(self, tensors: Iterable[Tensor], n_elements: int) -> frozenset[_Product | _Softmax]:
        """Return what those of the tensors that have so many elements are made of."""
        same = (tensor for tensor in tensors if tensor.numel() == n_elements and id(tensor) in self.made_of)
        return frozenset[_Product | _Softmax]().union(*(self.made_of[id(tensor)][1] for tensor in same))

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one call, and note what its result is made of."""
        if is_of_heads(func, args, kwargs):
            return self._product(func, args, kwargs)
        if func is FUSED:
            query, _, value = fused_operands(args, kwargs)
            return self._outputs(FUSED(*args, **kwargs), query, value, None)
        given = list(_tensors((*args, *kwargs.values())))
        sources = {tensor.numel(): self.sources(given, tensor.numel()) for tensor in given}
        result = func(*args, **kwargs)
        for tensor in _tensors((result,)):
            found = sources.get(tensor.numel(), frozenset())
            if func in SOFTMAX:
                products = frozenset(each for each in found if isinstance(each, _Product))
                found = frozenset((_Softmax(tuple(self.running), products),))
            if found:
                self.made_of[id(tensor)] = tensor, found
        return result

    def _product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        first, second = PRODUCTS[func].of(args, kwargs)
        softmaxes = [each for each in self.sources([first], first.numel()) if isinstance(each, _Softmax)]
        result: Tensor = func(*args, **kwargs)
        if softmaxes and first.shape[-2:] == (self.shape[1], self.shape[1]):
            self._outputs(result, first, second, softmaxes[0] if len(softmaxes) == 1 else None)
        else:
            self.made_of[id(result)] = result, frozenset((_Product(dict(self.running)),))
        for path in self.running:
            self.running[path] += 1
        return result

    def _outputs(self, result: Tensor, first: Tensor, second: Tensor, softmax: _Softmax | None) -> Tensor:
        n_heads = self._n_heads(first)
        if n_heads is not None and first.ndim == second.ndim == result.ndim:
            self.outputs.append(_Outputs(_Product(dict(self.running)), softmax, n_heads, result))
        return result

    def _n_heads(self, tensor: Tensor) -> int | None:
        if tensor.ndim == _HEADS_AXES and (tensor.shape[0], tensor.shape[2]) == self.shape:
            return tensor.shape[1]
        is_flat = tensor.ndim == _HEADS_AXES - 1 and tensor.shape[1] == self.shape[1]
        return tensor.shape[0] // self.shape[0] if is_flat and tensor.shape[0] % self.shape[0] == 0 else None

    def taken_by_module(self, tensor: Tensor) -> None:
        """Note which head outputs a module takes, heads of a token side by side."""
        for each in self.outputs:
            if tensor.numel() == each.tensor.numel() and not tensor.is_meta:
                z_BHTD = each.tensor.reshape(self.shape[0], each.n_heads, self.shape[1], -1)
                if torch.equal(z_BHTD.transpose(1, 2).reshape(-1), tensor.reshape(-1).to(z_BHTD.dtype)):
                    self.taken.add(each)

    def found(self, path: str) -> OwnAttention | str:
        """Return where the block computes attention, or why that is not known."""
        if len(self.outputs) != 1:
            return (
                f"{path} computes no attention, neither through transformers' attention interface nor by a softmax "
                "between two products"
                if not self.outputs
                else f"{path} computes attention {len(self.outputs)} times, so which one is meant is not clear"
            )
        (outputs,) = self.outputs
        is_proved = outputs in self.taken or (outputs.tensor.is_meta and outputs.tensor.ndim == _HEADS_AXES)
        if not is_proved:
            return (
                f"{path} computes attention in its own code, and no module in it takes the heads' outputs as they are"
            )
        if outputs.softmax is None:
            return OwnAttention(module=list(outputs.product.numbers)[-1], n_heads=outputs.n_heads)
        products = outputs.softmax.products
        scores = next(iter(products)) if len(products) == 1 else None
        within = [outputs.softmax.running, *([scores.numbers] if scores else [])]
        module = [name for name in outputs.product.numbers if all(name in names for names in within)][-1]
        return OwnAttention(
            module=module,
            n_heads=outputs.n_heads,
            scores=None if scores is None else scores.numbers[module],
            values=outputs.product.numbers[module],
        )


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (each for each in value if isinstance(each, Tensor))


class _Finder(TorchFunctionMode):
    """Follows the tensors of the block that runs from call to call."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.found: dict[str, OwnAttention | str] = {}
        self._shape = shape
        self._block: _BlockCalls | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one call."""
        del types
        return func(*args, **(kwargs or {})) if self._block is None else self._block.call(func, args, kwargs or {})

    def watch(self, path: str, block: nn.Module, stack: ExitStack) -> None:
        """Add hooks to a block."""
        stack.callback(block.register_forward_pre_hook(self._begin_block).remove)
        for name, module in block.named_modules():
            inside = f"{path}.{name}".rstrip(".")
            stack.callback(module.register_forward_pre_hook(partial(self._begin, inside), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(self._end, inside), always_call=True).remove)
        stack.callback(block.register_forward_hook(partial(self._end_block, path), always_call=True).remove)

    def _begin_block(self, _block: nn.Module, _args: object) -> None:
        self._block = _BlockCalls(shape=self._shape)

    def _end_block(self, path: str, _block: nn.Module, _args: object, _output: object) -> None:
        if self._block is not None:
            self.found[path] = self._block.found(path)
        self._block = None

    def _begin(self, path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._block is not None:
            block, self._block = self._block, None  # what is done here is not the model's
            for tensor in _tensors((*args, *kwargs.values())):
                block.taken_by_module(tensor)
            block.running[path] = 0
            self._block = block

    def _end(self, path: str, _module: nn.Module, _args: object, _output: object) -> None:
        if self._block is not None:
            self._block.running.pop(path, None)


def find_own_attention(
    model: nn.Module, blocks: Mapping[str, nn.Module], shape: tuple[int, int], run: Callable[[], Tensor | None]
) -> dict[str, OwnAttention | str]:
    """Find out where blocks compute attention in their own code.

    Args:
        model: The model; if a block uses torch's fused attention, it runs a second time with eager attention.
        blocks: The blocks by path.
        shape: (examples, positions) of a run.
        run: Runs the model on tokens without padding; returns its output, if it has any.

    Returns:
        For each block that ran, where it computes attention, or why that is not known.
    """
    found, output = _run_once(blocks, shape, run)
    fused = {path: own for path, own in found.items() if isinstance(own, OwnAttention) and own.values is None}
    if fused and isinstance(model, PreTrainedModel):
        try:
            with eager_attention(model):
                eager, same = _run_once({path: blocks[path] for path in fused}, shape, run)
        except CaptureError:  # it has no eager attention, and so no patterns
            return found
        is_alike = output is not None and same is not None and torch.allclose(output, same, rtol=1e-2, atol=1e-2)
        for path, own in fused.items() if is_alike else ():
            other = eager.get(path)
            if isinstance(other, OwnAttention) and other.module == own.module:
                found[path] = other
    return found


def _run_once(
    blocks: Mapping[str, nn.Module], shape: tuple[int, int], run: Callable[[], Tensor | None]
) -> tuple[dict[str, OwnAttention | str], Tensor | None]:
    finder = _Finder(shape)
    with ExitStack() as stack:
        for path, block in blocks.items():
            finder.watch(path, block, stack)
        with probing(), finder:
            output = run()
    return finder.found, output
