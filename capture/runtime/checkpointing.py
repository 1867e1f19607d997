"""Gradient checkpointing: parts of a model that run again in the backward pass.

Checkpointing drops what a part of a model computed, and the backward pass runs the part again. Both kinds of torch's
`checkpoint` (reentrant or not) are followed here, and so is what calls it: transformers, the wrappers for FSDP, a
model's own code. Whoever follows them learns when a part runs first and when it runs again.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from torch.utils import checkpoint as torch_checkpoint

from residua.capture.runtime.compat import NOT_REENTRANT


class Part(Protocol):
    """What a follower does around one part."""

    def first(self) -> AbstractContextManager[None]:
        """Return the context of the part's run in the forward pass."""
        ...

    def again(self) -> AbstractContextManager[None]:
        """Return the context of a run in the backward pass; there may be several, in other threads."""
        ...


_lock = threading.Lock()
_followers: list[Callable[[], Part]] = []
_originals: list[tuple[Any, Any]] = []  # torch's own functions, while they are replaced


@contextmanager
def following(begin: Callable[[], Part]) -> Iterator[None]:
    """Call `begin` whenever a checkpointed part begins to run for the first time, in any thread."""
    with _lock:
        if not _followers:
            _originals.append((torch_checkpoint.CheckpointFunction.forward, getattr(torch_checkpoint, NOT_REENTRANT)))
            _replace(*_followed(*_originals[0]))
        _followers.append(begin)
    try:
        yield
    finally:
        with _lock:
            _followers.remove(begin)
            if not _followers:
                _replace(*_originals.pop())


def _replace(reentrant: Any, not_reentrant: Any) -> None:
    setattr(torch_checkpoint.CheckpointFunction, "forward", staticmethod(reentrant))  # noqa: B010 - mypy allows no other way
    setattr(torch_checkpoint, NOT_REENTRANT, not_reentrant)


def _followed(reentrant: Any, not_reentrant: Any) -> tuple[Any, Any]:
    """Return the two functions of torch, with the parts of our followers around what they run."""

    def forward(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        parts, runs = _begin(), iter([True])

        def run(*run_args: Any) -> Any:
            is_first = next(runs, False)
            with ExitStack() as stack:
                for part in parts:
                    stack.enter_context(part.first() if is_first else part.again())
                return function(*run_args)

        return reentrant(ctx, run, *args)

    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
        parts = _begin()

        def run_again(*run_args: Any, **run_kwargs: Any) -> Any:
            with ExitStack() as stack:
                for part in parts:
                    stack.enter_context(part.again())
                return function(*run_args, **run_kwargs)

        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.first())
            yield from not_reentrant(run_again, *args, **kwargs)

    return forward, generator


def _begin() -> list[Part]:
    return [begin() for begin in tuple(_followers)]
