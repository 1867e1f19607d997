"""Whether the head outputs of a block are what its next module takes, or pass a gate or a norm first.

Some models multiply the head outputs by a gate, or normalise them, before the output projection (Qwen3-Next, BitNet).
``z`` is what the heads give all the same; a note says that more is done to it before it reaches the projection.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from residua.capture.hooks.attention import AttentionTap, intercepting

_MATRIX_AXES = 2


class _HeadOutputs(AttentionTap):
    """Keeps the head outputs of one block while it runs.

    Attributes:
        values: (batch, positions, heads, head width); None before the block computes attention.
        is_met: Whether it did.
        is_taken: Whether a linear map took them as they are, heads of a token side by side.
    """

    kinds = frozenset("z")

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self.is_met = False
        self.is_taken = False

    def __call__(self, kind: str, tensor: Tensor) -> None:
        del kind  # it is the only one
        if not tensor.is_meta:
            self.values, self.is_met = tensor.clone(), True

    def before_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compare what a linear map takes; a forward pre-hook."""
        weight = getattr(module, "weight", None)
        if self.values is None or self.is_taken or not isinstance(weight, Tensor) or weight.ndim != _MATRIX_AXES:
            return
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor) and tensor.numel() == self.values.numel():
                self.is_taken |= torch.equal(self.values.reshape(-1), tensor.reshape(-1).to(self.values.dtype))

    def after_block(self, _module: nn.Module, _args: object, _output: object) -> None:
        """Forget the values; a forward hook."""
        self.values = None


class HeadOutputsWatch:
    """Watches blocks while a model runs once inside.

    Args:
        modules: The model's modules by path.
        blocks: Paths of the blocks.
    """

    def __init__(self, modules: Mapping[str, nn.Module], blocks: Iterable[str]) -> None:
        self._modules = modules
        self._found = {path: _HeadOutputs() for path in blocks}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        taps: dict[nn.Module, AttentionTap] = {}
        with ExitStack() as stack:
            for path, found in self._found.items():
                block = self._modules[path]
                for module in block.modules():
                    taps[module] = found
                    stack.callback(module.register_forward_pre_hook(found.before_module, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(found.after_block).remove)
            stack.enter_context(intercepting(taps))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def note(self, path: str) -> str:
        """Return what a reader of a block's head outputs should know; empty if a linear map takes them as they are."""
        found = self._found.get(path)
        if found is None or not found.is_met or found.is_taken:
            return ""
        return (
            "z is what the heads give, and the model does more to it (a gate or a norm) before its output projection "
            "takes it; what the projection takes is its module: site, @input"
        )
