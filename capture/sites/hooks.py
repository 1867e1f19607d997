"""Hooks that carry the tensors of chosen sites out of a model, and replacements back in.

`attached` is the one place where a model is touched. It adds hooks and takes exactly these away again, on
errors too. What it hands out is not copied: modules may change a tensor in place right after the hook, so
whoever wants to keep a value copies it before returning.

Only what happens inside a call of the model itself counts. Gradient checkpointing runs blocks once more
during the backward pass; those runs are passed over.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from residua.capture.runtime.sharded import is_zero3
from residua.capture.sites.attention import AttentionTap, intercepting
from residua.capture.sites.module_io import (
    checked_replacement,
    input_item,
    output_item,
    replaced_input,
    replaced_output,
)
from residua.capture.sites.site import SiteInfo


@dataclass(frozen=True, kw_only=True)
class SiteTensor:
    """One tensor on its way through a model, met at a site.

    Attributes:
        info: The site.
        tensor: What the model holds there, live: in its own layout and part of autograd's graph.
        batch_shape: (batch, positions) of the call; None where the model takes no token ids.
        heads_first: Whether the model has it as (batch, heads, positions, ...).
    """

    info: SiteInfo
    tensor: Tensor
    batch_shape: tuple[int, int] | None
    heads_first: bool = False

    def shown(self, tensor: Tensor) -> Tensor:
        """Lay out the site's tensor, or one of its shape such as its gradient, as sites are promised."""
        if self.heads_first:
            return tensor.transpose(1, 2)
        if self.info.flat and self.batch_shape is not None:
            return tensor.reshape(*self.batch_shape, *tensor.shape[1:])
        return tensor

    def restored(self, tensor: Tensor) -> Tensor:
        """Lay out as the model has it what `shown` laid out as promised."""
        return tensor.transpose(1, 2) if self.heads_first else tensor.reshape(self.tensor.shape)

    def without_values(self) -> "SiteTensor":
        """Return the same with a tensor of the same shape on meta, which keeps no memory and no graph alive."""
        return replace(self, tensor=torch.empty(self.tensor.shape, device="meta"))


Meet = Callable[[SiteTensor], Tensor | None]
"""Takes what was met; what it gives back, laid out as the model has it, replaces the tensor unless it is None."""

Emit = Callable[[SiteInfo, Tensor], Tensor | None]
"""Takes a site and its tensor, (batch, positions, ...) unless the site is not per token; what it gives back
replaces the site's value unless it is None."""


def values_of(emit: Emit) -> Meet:
    """Let ``emit`` have the detached values of what is met, laid out as sites are promised."""

    def meet(met: SiteTensor) -> Tensor | None:
        shown = met.shown(met.tensor.detach())
        new = emit(met.info, shown)
        return None if new is None else met.restored(checked_replacement(shown, new, met.info.name))

    return meet


class ForwardCall:
    """Which calls of the model are under way: in each thread its own, and calls inside calls.

    A callback may call the model itself, and several threads may share a model; neither ends what another runs.

    Attributes:
        n_calls: Number of forward calls that were entered.
    """

    def __init__(self) -> None:
        self.n_calls = 0
        self._local = threading.local()

    @property
    def _under_way(self) -> list[tuple[int, int] | None]:
        """The batch shapes of this thread's calls, the innermost last."""
        shapes: list[tuple[int, int] | None] = vars(self._local).setdefault("shapes", [])
        return shapes

    @property
    def is_running(self) -> bool:
        """Whether this thread has entered the model's forward and not yet left it."""
        return bool(self._under_way)

    @property
    def batch_shape(self) -> tuple[int, int] | None:
        """(batch, positions) of the call under way; only known for models that take token ids."""
        return self._under_way[-1]

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that the model is entered; a forward pre-hook."""
        self.n_calls += 1
        tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds", next(iter(args), None)))
        shape = tokens.shape if isinstance(tokens, Tensor) else ()
        self._under_way.append((shape[0], shape[1]) if len(shape) >= 2 else None)

    def leave(self, _module: nn.Module, _args: object, _output: object) -> None:
        """Note that the model is left, by an exception too; a forward hook."""
        del self._under_way[-1:]  # nothing is there if another's pre-hook failed before `enter`


@contextmanager
def attached(parts: Mapping[str, nn.Module], sites: Iterable[SiteInfo], meet: Meet) -> Iterator[ForwardCall]:
    """Call ``meet`` with the tensor of each site whenever the model runs.

    Args:
        parts: The model's modules, as `named_modules` gives them; they are left exactly as they were.
        sites: Where to read. Sites of one module are served in the order given.
        meet: Called during the forward pass, on the model's device.

    Yields:
        What is known of the call under way.
    """
    call = ForwardCall()
    chosen = tuple(sites)
    # ZeRO-3 gives every module an input of its own, whose gradient lacks what flows around the module: be before it.
    first = is_zero3(parts[""])
    with ExitStack() as stack:
        for info in chosen:
            if info.via != "attention":
                handle = _register(parts[info.module], info, call, meet, first=first)
                stack.callback(handle.remove)
        opened = parts[""].register_forward_pre_hook(call.enter, with_kwargs=True, prepend=True)
        stack.callback(opened.remove)
        stack.enter_context(intercepting(_attention_taps(parts, chosen, call, meet)))
        closed = parts[""].register_forward_hook(call.leave, always_call=True)
        stack.callback(closed.remove)
        yield call


def _register(
    module: nn.Module, info: SiteInfo, call: ForwardCall, meet: Meet, *, first: bool
) -> torch.utils.hooks.RemovableHandle:
    if info.via in ("input", "stream"):
        return module.register_forward_pre_hook(_input_hook(info, call, meet), with_kwargs=True, prepend=first)
    return module.register_forward_hook(_output_hook(info, call, meet))


def _output_hook(info: SiteInfo, call: ForwardCall, meet: Meet) -> Callable[..., Any]:
    where = f"Site {info.name!r}, {info.where}"

    def on_output(_module: nn.Module, _args: object, output: Any) -> Any:
        if not call.is_running:
            return None
        index = _logits_index(output) if info.via == "logits" else info.index
        tensor = output_item(output, index, where)
        new = meet(SiteTensor(info=info, tensor=tensor, batch_shape=call.batch_shape))
        return None if new is None else replaced_output(output, index, new)

    return on_output


def _input_hook(info: SiteInfo, call: ForwardCall, meet: Meet) -> Callable[..., Any]:
    where = f"Site {info.name!r}, {info.where}"

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not call.is_running:
            return None
        tensor = input_item(args, kwargs, info.index, where)
        new = meet(SiteTensor(info=info, tensor=tensor, batch_shape=call.batch_shape))
        if new is not None and info.via == "stream":
            # The block holds this same tensor as its residual: only a change in place reaches both.
            tensor.copy_(new)
            return None
        return None if new is None else replaced_input(args, kwargs, info.index, new)

    return on_input


def _logits_index(output: Any) -> int | None:
    """Where the logits stand in what a model gives: behind the loss, if there is one."""
    if isinstance(output, Mapping):
        return list(output).index("logits")
    has_loss = isinstance(output, tuple) and isinstance(output[0], Tensor) and output[0].ndim == 0
    return 1 if has_loss else None


class _BlockAttentionTap(AttentionTap):
    """Serves the attention sites of one block."""

    def __init__(self, sites: dict[str, SiteInfo], call: ForwardCall, meet: Meet) -> None:
        self.parts = frozenset(sites)
        self._sites = sites
        self._call = call
        self._meet = meet

    def __call__(self, part: str, tensor: Tensor) -> Tensor | None:
        if not self._call.is_running:
            return None
        shape = self._call.batch_shape
        return self._meet(SiteTensor(info=self._sites[part], tensor=tensor, batch_shape=shape, heads_first=part != "z"))


def _attention_taps(
    parts: Mapping[str, nn.Module], sites: tuple[SiteInfo, ...], call: ForwardCall, meet: Meet
) -> dict[nn.Module, _BlockAttentionTap]:
    """One tap for each block, under every module in it: whichever of them does the attention is met."""
    by_block: dict[str, dict[str, SiteInfo]] = {}
    for info in sites:
        if info.via == "attention":
            by_block.setdefault(info.module, {})[info.site.kind] = info
    taps: dict[nn.Module, _BlockAttentionTap] = {}
    for path, found in by_block.items():
        tap = _BlockAttentionTap(found, call, meet)
        taps |= dict.fromkeys(parts[path].modules(), tap)
    return taps
