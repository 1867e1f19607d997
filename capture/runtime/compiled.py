"""Compiled models: hooks are no part of compiled code, so what is captured runs without it.

Hooks that are added after the first compiled call are passed over without a word, and those that are added before
break the graph. A capture or a tap therefore runs the very modules that were compiled, uncompiled.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar, cast

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from residua.store.base.errors import CaptureError

ModelT = TypeVar("ModelT", bound=nn.Module)


def uncompiled(model: ModelT) -> ModelT:
    """Return the module that `torch.compile` wrapped, or `model` itself."""
    return cast("ModelT", model._orig_mod) if isinstance(model, OptimizedModule) else model


def is_compiled(model: nn.Module) -> bool:
    """Say whether `model` or a module in it is compiled, by `torch.compile` or in place."""
    return any(
        isinstance(module, OptimizedModule) or module._compiled_call_impl is not None for module in model.modules()
    )


class _Uncompiled:
    """The stance that the process takes while anybody wants it; contexts may end in any order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_wanting = 0
        self._taken = ExitStack()

    def take(self) -> None:
        with self._lock:
            if not self._n_wanting:
                self._taken.enter_context(torch.compiler.set_stance("force_eager"))
            self._n_wanting += 1

    def let_go(self) -> None:
        with self._lock:
            self._n_wanting -= 1
            if not self._n_wanting:
                self._taken.close()


_uncompiled = _Uncompiled()


@contextmanager
def running_uncompiled(model: nn.Module) -> Iterator[bool]:
    """Let compiled modules run as plain ones inside; yields whether there are any."""
    if not is_compiled(model):
        yield False
        return
    _uncompiled.take()
    try:
        yield True
    finally:
        _uncompiled.let_go()


def refuse_compiled(model: nn.Module) -> None:
    """Raise CaptureError if `model` is compiled: a loop that the user owns runs it as it is."""
    if is_compiled(model):
        raise CaptureError(
            "the model is compiled, and hooks are no part of compiled code: record with the model as it was before "
            "torch.compile (model._orig_mod), or build it without compile()"
        )
