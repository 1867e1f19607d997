"""Hooks: pass the tensors of chosen sites to a callback while the model runs, and take replacements back.

`attached` is the only place that adds hooks to a model, and it removes exactly these, on errors too. Tensors are passed
without a copy: modules may change a tensor in place right after the hook, so a callback that keeps a value copies it
before it returns.

Hooks act only during a forward call of the model itself, and when gradient checkpointing runs a part of it again during
the backward pass (`residua.capture.hooks.forward_call`).
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from residua.capture.hooks.attention import AttentionTap, intercepting
from residua.capture.hooks.forward_call import ForwardCall, SiteTensor
from residua.capture.hooks.site import SiteInfo
from residua.capture.hooks.torch_calls import CALLS, watching_call
from residua.capture.runtime.checkpointing import following
from residua.capture.runtime.module_io import (
    checked_replacement,
    input_item,
    output_item,
    replaced_input,
    replaced_output,
)
from residua.capture.runtime.sharded import is_zero3
from residua.store.base.errors import CaptureError

OnTensor = Callable[[SiteTensor], Tensor | None]
"""Takes a site's tensor; returns its replacement, with the axes that the model gives the site, or None to keep it."""

Emit = Callable[[SiteInfo, Tensor], Tensor | None]
"""Takes a site and its tensor, (batch, positions, ...) unless the site is not per token; returns a replacement of the
same axes, or None to keep it."""

OnProblem = Callable[[SiteInfo, CaptureError], None]
"""Takes a site whose module has no such tensor, and the error that says so."""


def values_of(emit: Emit) -> OnTensor:
    """Return a callback for `attached` that calls ``emit`` with the detached tensor as (batch, positions, ...)."""

    def run(found: SiteTensor) -> Tensor | None:
        tensor = found.tensor.detach()
        value = found.to_site(tensor)
        new = emit(found.info, value)
        return None if new is None else found.to_model(checked_replacement(value, new, found.info.name), tensor)

    return lambda found: found.once(partial(run, found))


@contextmanager
def attached(
    modules: Mapping[str, nn.Module],
    sites: Iterable[SiteInfo],
    on_tensor: OnTensor,
    *,
    on_problem: OnProblem | None = None,
) -> Iterator[ForwardCall]:
    """Call ``on_tensor`` with the tensor of each site whenever the model runs.

    Args:
        modules: The model's modules, as `named_modules` returns them.
        sites: The sites to read. Hooks of one module run in the order of its sites here.
        on_tensor: Called during the forward pass, with a tensor on the model's device.
        on_problem: Called instead where a module has no tensor at the site; by default the error is raised.

    Yields:
        The forward calls that are running.
    """
    call = ForwardCall()
    chosen = tuple(sites)
    # ZeRO-3 gives each module a new input tensor, whose gradient lacks what flows around the module: run before it.
    first = is_zero3(modules[""])
    with ExitStack() as stack:
        for info in chosen:
            if info.via in CALLS:
                reader = _Reader(info, call, on_tensor, on_problem)
                watched = watching_call(modules[info.module], CALLS[info.via], info.index or 0, reader.on_result)
                stack.enter_context(watched)
            elif info.via != "attention":
                handle = _register(modules[info.module], _Reader(info, call, on_tensor, on_problem), first=first)
                stack.callback(handle.remove)
                if not (first and info.via in ("input", "stream")):
                    call.handles.append(handle)
        opened = modules[""].register_forward_pre_hook(call.enter, with_kwargs=True, prepend=True)
        stack.callback(opened.remove)
        call.attention_taps = _attention_taps(modules, chosen, call, on_tensor)
        own = {modules[info.own.module]: info.own for info in chosen if info.own is not None}
        stack.enter_context(intercepting(call.attention_taps, own))
        closed = modules[""].register_forward_hook(call.leave, always_call=True)
        stack.callback(closed.remove)
        call.handles.append(closed)
        stack.enter_context(following(call.begin_part))
        try:
            yield call
        finally:
            call.is_attached = False


def _register(module: nn.Module, reader: "_Reader", *, first: bool) -> torch.utils.hooks.RemovableHandle:
    if reader.info.via in ("input", "stream"):
        return module.register_forward_pre_hook(reader.on_input, with_kwargs=True, prepend=first)
    return module.register_forward_hook(reader.on_output)


class _Reader:
    """The hooks of one site: each takes the site's tensor out of a module's input or output, and puts it back."""

    def __init__(self, info: SiteInfo, call: ForwardCall, on_tensor: OnTensor, on_problem: OnProblem | None) -> None:
        self.info = info
        self._call = call
        self._on_tensor = on_tensor
        self._on_problem = on_problem
        self._where = f"Site {info.name!r}, {info.where}"

    def on_output(self, _module: nn.Module, _args: object, output: Any) -> Any:
        if not self._call.is_running(self.info):
            return None
        try:
            index = _logits_index(output, self._where) if self.info.via == "logits" else self.info.index
            tensor = output_item(output, index, self._where)
        except CaptureError as error:
            return self._complain(error)
        new = self._call.call(self._on_tensor, self.info, tensor, heads_first=False)
        return None if new is None else replaced_output(output, index, new)

    def on_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._call.is_running(self.info):
            return None
        try:
            tensor = input_item(args, kwargs, self.info.index, self._where)
        except CaptureError as error:
            return self._complain(error)
        new = self._call.call(self._on_tensor, self.info, tensor, heads_first=False)
        if new is not None and self.info.via == "stream":
            # The block also uses this tensor as its residual: only a change in place reaches both uses.
            tensor.copy_(new)
            return None
        return None if new is None else replaced_input(args, kwargs, self.info.index, new)

    def on_result(self, tensor: Tensor) -> Tensor:
        """Take the result of a call of torch; return what the module goes on with."""
        if not self._call.is_running(self.info):
            return tensor
        new = self._call.call(self._on_tensor, self.info, tensor, heads_first=False)
        return tensor if new is None else new

    def _complain(self, error: CaptureError) -> None:
        if self._on_problem is None:
            raise error
        self._on_problem(self.info, error)


def _logits_index(output: Any, where: str) -> int | None:
    """Return the position of the logits in a model's output: after the loss, if there is one."""
    if isinstance(output, Mapping):
        if "logits" not in output:
            raise CaptureError(f"{where}: the model's output has no logits; it has {', '.join(output)}.")
        return list(output).index("logits")
    has_loss = isinstance(output, tuple) and isinstance(output[0], Tensor) and output[0].ndim == 0
    return 1 if has_loss else None


class _BlockAttentionTap(AttentionTap):
    """Reads the attention sites of one block.

    Differential attention computes attention twice from the same queries and keys, with other values. The queries, the
    keys and the pattern are then met once, and the second call gets the replacements of the first; values and head
    outputs of both calls are one tensor (`AttentionTap.takes_pairs`).
    """

    def __init__(self, sites: dict[str, SiteInfo], call: ForwardCall, on_tensor: OnTensor) -> None:
        self.kinds = frozenset(sites) | (frozenset("qk") if "pattern" in sites else frozenset())
        self.takes_pairs = any(info.is_pair for info in sites.values())
        self._sites = sites
        self._call = call
        self._on_tensor = on_tensor
        self._local = threading.local()

    def __call__(self, kind: str, tensor: Tensor) -> Tensor | None:
        info = self._sites.get(kind)
        if not self._call.is_running(info or next(iter(self._sites.values()))):
            return None
        last = vars(self._local)
        before: tuple[ReferenceType[Tensor], Tensor | None] | None = last.get(kind)
        if kind in ("q", "k"):
            is_same = before is not None and before[0]() is tensor
        else:
            is_same = kind == "pattern" and before is not None and bool(last["q same"] and last["k same"])
        if before is None or not is_same:
            new = None
            if info is not None:
                new = self._call.call(self._on_tensor, info, tensor, heads_first=kind != "z")
            before = ref(tensor), new
        if kind in ("q", "k", "pattern"):
            last |= {kind: before, f"{kind} same": is_same}
        return before[1]

    def end_call(self) -> None:
        vars(self._local).clear()


def _attention_taps(
    modules: Mapping[str, nn.Module], sites: tuple[SiteInfo, ...], call: ForwardCall, on_tensor: OnTensor
) -> dict[nn.Module, _BlockAttentionTap]:
    """Return one tap for each block, under every module in it: one of them computes the attention."""
    by_block: dict[str, dict[str, SiteInfo]] = {}
    for info in sites:
        if info.via == "attention":
            by_block.setdefault(info.module, {})[info.site.kind.removeprefix("cross_")] = info
    taps: dict[nn.Module, _BlockAttentionTap] = {}
    for path, found in by_block.items():
        tap = _BlockAttentionTap(found, call, on_tensor)
        taps |= dict.fromkeys(modules[path].modules(), tap)
    return taps
