"""What a run on a few tokens shows of each block: what enters and leaves the modules in it, and what follows on what.

`BlockWatch` adds hooks for one run. Blocks are looked at one after another, so that only one block's values are kept.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from residua.capture.hooks.attention import AttentionTap, intercepting
from residua.capture.hooks.own_attention import FUSED, SOFTMAX
from residua.capture.hooks.torch_calls import CALLS
from residua.capture.runtime.module_io import input_item, output_item
from residua.store.base.errors import CaptureError

FoundT = TypeVar("FoundT")

_OF_STREAM = ("product", "sum")  # there are many others in a block
_A_ROW_EACH = 2  # axes of a tensor with a row for each token
_MANY = 8  # a longer list of modules in a block holds experts, which see a part of the tokens


@dataclass(frozen=True, kw_only=True)
class Event:
    """A tensor that entered or left a module of a block.

    Attributes:
        time: Its number among the events of the block.
        path: The module, relative to the block.
        values: The tensor with the axes of the block's input, which has as many elements.
        flat: Whether the module has the first two of these axes as one.
    """

    time: int
    path: str
    values: Tensor
    flat: bool


@dataclass(frozen=True, kw_only=True)
class TorchCall:
    """A call of one of `residua.capture.hooks.torch_calls.CALLS` that ran in a block.

    Attributes:
        time: Its number among the events of the block.
        path: The innermost module that was running, relative to the block.
        number: Its number among those of its kind in that module's forward, without those of modules in it.
        taken: What it was applied to.
        values: The result; of a choice, the indices.
    """

    time: int
    path: str
    number: int
    taken: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertsCall:
    """A call of a module that takes tokens, the experts that each of them goes to, and the weights of these.

    Attributes:
        time: Its number among the events of the block.
        path: The module, relative to the block.
        index_place: Which item of its input are the experts.
        weight_place: Which item are the weights.
        index: The experts, whole numbers, (tokens, experts of a token).
        weight: The weights, of the same shape.
    """

    time: int
    path: str
    index_place: int
    weight_place: int
    index: Tensor
    weight: Tensor


@dataclass(kw_only=True)
class BlockRun:
    """One run of one block.

    Attributes:
        path: The block.
        module: The same.
        entered: What the block took.
        left: What it returned.
        inputs: What entered modules in it, as far as it has as many elements as `entered`.
        outputs: What left modules in it, likewise.
        attention: When attention was computed, and in which module: by a call of transformers' attention interface, or
            by a softmax of the module's own over keys.
        values: The values that calls of the interface took, each (examples, heads, positions, width).
        given: What each module gave, of any size.
        shapes: Shape and dtype of what last entered each module in it.
        calls: From each kind of `CALLS` to those in it; of products and sums, those whose result has as many elements
            as `entered`.
        experts: The calls of modules of experts in it.
        running: The modules in it that are running, the innermost last, with the number of calls of each kind of
            `CALLS` in each so far, without those of modules in it.
    """

    path: str
    module: nn.Module
    entered: Tensor
    left: Tensor | None = None
    inputs: list[Event] = field(default_factory=list)
    outputs: list[Event] = field(default_factory=list)
    attention: list[tuple[int, str]] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    given: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    calls: dict[str, list[TorchCall]] = field(default_factory=lambda: {kind: [] for kind in CALLS})
    experts: list[ExpertsCall] = field(default_factory=list)
    running: dict[str, Counter[str]] = field(default_factory=lambda: {"": Counter()})
    _time: int = 0

    def leave_out_repeated(self) -> None:
        """Leave out modules that ran several times: neither tensor alone is what such a module gives."""
        for events in (self.inputs, self.outputs):
            n_times = Counter(event.path for event in events)
            events[:] = [event for event in events if n_times[event.path] == 1]

    def tick(self) -> int:
        """Return the number of the next event."""
        self._time += 1
        return self._time

    def note_call(self, kind: str, taken: object, result: Tensor) -> None:
        """Note a call of one of `CALLS`."""
        path, numbers = next(reversed(self.running.items()))
        number = numbers[kind]
        numbers[kind] += 1
        if isinstance(taken, Tensor) and (kind not in _OF_STREAM or result.numel() == self.entered.numel()):
            both = taken.detach(), result.detach()
            call = TorchCall(time=self.tick(), path=path, number=number, taken=both[0], values=both[1])
            self.calls[kind].append(call)

    def note_input(self, path: str, items: Sequence[object]) -> None:
        """Note what a module takes, if it is a module of experts."""
        tensors = {place: item for place, item in enumerate(items) if isinstance(item, Tensor)}
        if 0 not in tensors or not tensors[0].is_floating_point() or tensors[0].ndim < _A_ROW_EACH:
            return
        for index_place, index in tensors.items():
            if index.dtype not in (torch.int32, torch.int64) or index.ndim < _A_ROW_EACH:
                continue
            for weight_place, weight in tensors.items():
                if weight_place and weight.is_floating_point() and weight.shape == index.shape:
                    call = ExpertsCall(
                        time=self.tick(),
                        path=path,
                        index_place=index_place,
                        weight_place=weight_place,
                        index=index,
                        weight=weight,
                    )
                    self.experts.append(call)
                    return

    def note(self, events: list[Event], path: str, tensor: Tensor) -> None:
        """Keep a copy of a tensor that may be of the residual stream: modules change tensors in place."""
        time = self.tick()
        if tensor.numel() == self.entered.numel() and tensor.is_floating_point():
            flat = tensor.ndim < self.entered.ndim
            values = tensor.detach().clone().reshape(self.entered.shape)
            events.append(Event(time=time, path=path, values=values, flat=flat))


class BlockWatch(Generic[FoundT]):
    """Watches a model's blocks while it runs once inside.

    Args:
        modules: The model's modules by path.
        blocks: Paths of the blocks in order.
        look: Called with each block's run; None to see only what passes from block to block.

    Attributes:
        n_runs: How often each block ran.
        follows: For each block, whether it took what the block before it returned; None if it cannot be compared.
        found: What `look` made of each block's run.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], blocks: Sequence[str], look: Callable[[BlockRun], FoundT] | None
    ) -> None:
        self.n_runs = dict.fromkeys(blocks, 0)
        self.follows: dict[str, bool | None] = {}
        self.found: dict[str, FoundT] = {}
        self._modules = modules
        self._look = look
        self._last: Tensor | None = None
        self._shape: torch.Size | None = None
        self._runs: dict[str, BlockRun] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for path in self.n_runs:
                block = self._modules[path]
                stack.callback(block.register_forward_pre_hook(partial(self._begin, path), with_kwargs=True).remove)
                if self._look is not None:
                    _watch_inside(block, path, self._runs, stack)
                stack.callback(block.register_forward_hook(partial(self._end, path)).remove)
            if self._look is not None:
                stack.enter_context(_CallClock(self._runs))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _begin(self, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.n_runs[path] += 1
        entered = _tensor(lambda: input_item(args, kwargs, None, path))
        if entered is None:
            self.follows[path] = False
            return
        entered = _with_examples(entered)
        if self._last is not None:
            self.follows[path] = _is_same(self._last, entered)
        self._shape = self._shape or entered.shape
        self._runs[path] = BlockRun(path=path, module=block, entered=_copy(entered))

    def _end(self, path: str, _block: nn.Module, _args: object, output: Any) -> None:
        left = _tensor(lambda: output_item(output, None, path))
        self._last = None if left is None else _copy(_with_examples(left))
        run = self._runs.pop(path, None)
        if run is None or self._last is None or self._look is None or self._last.is_meta:
            return
        if self._last.shape == run.entered.shape == self._shape:  # stages of several sizes (Swin) hold no one stream
            run.left = self._last
            run.leave_out_repeated()
            self.found[path] = self._look(run)


def _watch_inside(block: nn.Module, block_path: str, runs: Mapping[str, BlockRun], stack: ExitStack) -> None:
    taps: dict[nn.Module, AttentionTap] = {}
    for path, module in block.named_modules():
        taps[module] = _AttentionClock(block_path, path, runs)
        if path:
            before, after = _around(block_path, path, runs, keeps=not _is_expert(block, path))
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
    stack.enter_context(intercepting(taps))


def _around(
    block: str, path: str, runs: Mapping[str, BlockRun], *, keeps: bool
) -> tuple[Callable[..., None], Callable[..., None]]:
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = _tensor(lambda: input_item(args, kwargs, None, path))
        if block in runs:
            runs[block].running[path] = Counter()
            runs[block].note_input(path, [*args, *kwargs.values()])
        if keeps and tensor is not None and block in runs:
            runs[block].shapes[path] = (tuple(tensor.shape), tensor.dtype)
            runs[block].note(runs[block].inputs, path, tensor)

    def after(_module: nn.Module, _args: object, output: Any) -> None:
        tensor = _tensor(lambda: output_item(output, None, path))
        if block in runs:
            runs[block].running.pop(path, None)
        if keeps and tensor is not None and block in runs:
            runs[block].note(runs[block].outputs, path, tensor)
            runs[block].given[path] = tensor.detach()

    return before, after


def _is_expert(block: nn.Module, path: str) -> bool:
    parents = [path.rpartition(".")[0]]
    while parents[-1]:
        parents.append(parents[-1].rpartition(".")[0])
    found = [block.get_submodule(parent) for parent in parents if parent]
    return any(isinstance(module, nn.ModuleList) and len(module) > _MANY for module in found)


class _AttentionClock(AttentionTap):
    """Notes when a module calls transformers' attention interface."""

    kinds: frozenset[str] = frozenset(("v",))

    def __init__(self, block: str, path: str, runs: Mapping[str, BlockRun]) -> None:
        self._block = block
        self._path = path
        self._runs = runs

    def __call__(self, kind: str, tensor: Tensor) -> None:
        """Keep the values."""
        del kind
        if run := self._runs.get(self._block):
            run.values.append(tensor.detach())

    def note_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Note the time of the call."""
        del arguments
        if run := self._runs.get(self._block):
            run.attention.append((run.tick(), self._path))


class _CallClock(TorchFunctionMode):
    """Notes when a block computes attention by itself, and its linear maps.

    Args:
        runs: The blocks that are running.
    """

    def __init__(self, runs: Mapping[str, BlockRun]) -> None:
        super().__init__()
        self._runs = runs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute as always, and note a softmax over keys, and the calls of `CALLS`."""
        result = func(*args, **(kwargs or {}))
        if func in _FUSED or (func in SOFTMAX and _is_over_keys(result)):
            for run in self._runs.values():
                run.attention.append((run.tick(), next(reversed(run.running))))
        kind = next((kind for kind, functions in CALLS.items() if func in functions), None)
        if kind is not None:
            taken = args[0] if args else (kwargs or {}).get("input")
            for run in self._runs.values():
                run.note_call(kind, taken, result[1] if kind == "choice" else result)
        return result


_FUSED = (FUSED, functional.multi_head_attention_forward)


def _is_over_keys(weights: Tensor) -> bool:
    """Return whether weights are of (batch, heads, queries, keys), or the same with two axes as one."""
    if weights.ndim >= _HEADS_APART:
        return True
    return weights.ndim == _HEADS_APART - 1 and weights.shape[-1] == weights.shape[-2] > 1


_HEADS_APART = 4


def _tensor(take: Callable[[], Tensor]) -> Tensor | None:
    try:
        return take()
    except CaptureError:  # the module has no tensor there
        return None


def _with_examples(tensor: Tensor) -> Tensor:
    """Return a stream as (examples, positions, width): that of one image in a packed tower has no axis of examples."""
    return tensor[None] if tensor.ndim == _A_ROW_EACH and not tensor.is_meta else tensor


def _copy(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.detach().clone()


def _is_same(left: Tensor, entered: Tensor) -> bool | None:
    """Compare by value; tensors without values can only be one and the same."""
    if left.is_meta or entered.is_meta:
        return True if left is entered else None
    return left.shape == entered.shape and torch.equal(left, entered.to(left.device, left.dtype))
