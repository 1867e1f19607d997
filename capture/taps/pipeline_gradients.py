"""Gradients across the stages of transformers' own pipelines.

In transformers 5.23 a stage receives its input in a new tensor (`PipelineStage.communicate`), and every stage receives
the logits of the last one in a new tensor (`PipelineStage.broadcast_from_last`). So no gradient gets from one stage to
another, and only the last stage has any. Inside `carrying_gradients` both operations are parts of autograd's graph, and
gradients go the opposite way.

A scalar without meaning, the tie, goes along with them. It connects every stage's logits to what that stage sent, so
that the same ``loss.backward()`` on every rank is one backward pass through all stages.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from residua.capture.runtime.compat import pipeline_stage_of
from residua.capture.runtime.process_groups import pipeline_group
from residua.capture.runtime.wrappers import core_of


@contextmanager
def carrying_gradients(model: nn.Module) -> Iterator[None]:
    """Let gradients get from stage to stage of transformers' pipeline; any other model stays as it is."""
    stage = pipeline_stage_of(core_of(model))
    if stage is None or pipeline_group(model) is None or "communicate" in vars(stage):  # an outer context is active
        yield
        return
    links = _Links(stage)
    stage.communicate, stage.broadcast_from_last = links.communicate, links.broadcast_from_last
    try:
        yield
    finally:
        del stage.communicate, stage.broadcast_from_last


_ends: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


def end_here(model: nn.Module) -> tuple[Tensor, ...]:
    """Return the tie with which a model's last forward pass with gradients began on this stage; empty elsewhere.

    Callers that take gradients with respect to chosen tensors (`torch.autograd.grad`) have to add this tensor, on
    every stage. Otherwise other stages, whose gradients pass through this one, wait for ever.
    """
    stage = pipeline_stage_of(core_of(model))
    return (_ends[stage],) if stage is not None and stage in _ends else ()


class _Links:
    """Replaces a stage's two operations; without gradients it calls the original ones.

    Args:
        stage: transformers' `PipelineStage` of this process.
    """

    def __init__(self, stage: Any) -> None:
        self._stage = stage
        self._communicate: Callable[..., Tensor | None] = stage.communicate
        self._broadcast: Callable[..., Tensor] = stage.broadcast_from_last
        self._end = self._tie = _new_tie()

    def communicate(self, operation: str, *, tensor: Tensor | None = None, **how: Any) -> Tensor | None:
        """Receive from the previous stage, or send to the next one."""
        original = partial(self._communicate, operation, **how)
        if not torch.is_grad_enabled():
            return original(tensor=tensor)
        if tensor is None:
            hidden, self._tie = _apply(_Received, self._end, original, self._send_back)
            return hidden  # type: ignore[no-any-return]  # autograd functions have no types
        self._tie = _apply(_Sent, tensor, self._tie, original, self._receive_back)
        return None

    def broadcast_from_last(self, tensor: Tensor | None, **how: Any) -> Tensor:
        """Return the last stage's logits, on every stage."""
        if not torch.is_grad_enabled():
            return self._broadcast(tensor, **how)
        tie, _ends[self._stage] = self._tie, self._end
        self._end = self._tie = _new_tie()
        return _apply(_Shared, tensor, tie, partial(self._broadcast, **how))  # type: ignore[no-any-return]  # as above

    def _send_back(self, gradient: Tensor) -> None:
        """Send the gradient of what was received to the previous stage."""
        there = gradient.to("cpu") if self._stage.comm_on_cpu else gradient
        dist.send(there.contiguous(), group=self._stage.pp_group, group_dst=self._stage.pp_prev_rank)

    def _receive_back(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the gradient of what was sent to the next stage."""
        gradient = torch.empty(shape, dtype=dtype, device="cpu" if self._stage.comm_on_cpu else device)
        dist.recv(gradient, group=self._stage.pp_group, group_src=self._stage.pp_next_rank)
        return gradient.to(device)


def _new_tie() -> Tensor:
    return torch.zeros((), requires_grad=True)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch has no types here


class _Received(torch.autograd.Function):
    """Receives the previous stage's output; the backward pass sends its gradient back."""

    @staticmethod
    def forward(
        ctx: Any, tie: Tensor, receive: Callable[[], Tensor], send_back: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        ctx.send_back = send_back
        return receive(), tie.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.send_back(gradients[0])
        return gradients[1], None, None


class _Sent(torch.autograd.Function):
    """Sends to the next stage and returns the tie; the backward pass receives the gradient of what was sent."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tie: Tensor, send: Callable[..., None], receive_back: Callable[..., Tensor]
    ) -> Tensor:
        send(tensor=hidden)
        ctx.receive_back, ctx.like = receive_back, (hidden.shape, hidden.dtype, hidden.device)
        return tie.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return ctx.receive_back(*ctx.like), gradients[0], None, None


class _Shared(torch.autograd.Function):
    """Gives every stage the last stage's logits; every stage knows their gradient, and the last stage uses its own."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor | None, tie: Tensor, share: Callable[[Tensor | None], Tensor]) -> Tensor:
        ctx.is_last, ctx.no_gradient = logits is not None, torch.zeros_like(tie)
        return share(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        return gradients[0] if ctx.is_last else None, ctx.no_gradient, None
