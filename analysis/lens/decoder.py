"""A head that also goes backward: logits, and the gradient of the KL divergence to the model's own distribution.

Norm, projection and unembedding are differentiated by hand, which keeps one buffer of logits instead of five. Only the
dense layer of BERT's head, small beside its vocabulary, is left to autograd.

Axes: `N` rows, `D` width of the residual stream, `I` inner width, `V` vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from residua.analysis.lens.lm_head import Head, load_head
from residua.analysis.lens.unembedding import Unembedding

Backward = Callable[[Tensor], Tensor]


class Decoder:
    """Decodes residual streams with a head, forward and backward.

    Args:
        head: The head.
        dtype: Type to compute in.
        most_bytes: An unembedding that takes more in that type is converted block by block.
    """

    def __init__(self, head: Head, *, dtype: torch.dtype = torch.float32, most_bytes: int = 2**63) -> None:
        self.unembedding = Unembedding.of(head, dtype=dtype, most_bytes=most_bytes)
        small = {name: tensor.to(dtype) for name, tensor in head.parameters.items() if "unembed" not in name}
        self._head = Head(head.spec, small)
        gain = small.get("norm.weight")
        self._gain = None if gain is None else gain + head.spec.weight_offset
        self._shift = small.get("norm.bias")
        self._project = small.get("project_out.weight")

    def unit(self, final_ND: Tensor) -> Tensor:
        """Return the residual stream as the final norm sees it: without what the norm takes away."""
        return self._unit(final_ND)[0]

    def logits(self, final_ND: Tensor) -> Tensor:
        """Return (rows, vocabulary) for (rows, width)."""
        return self.unembedding.logits(self._forward(final_ND)[0])

    def kl_gradient(
        self,
        final_ND: Tensor,
        target_NV: Tensor,
        *,
        unembedding: Unembedding | None = None,
        log_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of the KL divergence, summed over rows, for what is decoded.

        Args:
            final_ND: Residual streams that are decoded, (rows, width).
            target_NV: The distribution to come close to, (rows, tokens).
            unembedding: Of some tokens; by default of all.
            log_weights: Logarithm of how many tokens each of them stands for, (tokens,); by default one.
        """
        hidden, backward = self._forward(final_ND)
        unembedding = unembedding or self.unembedding
        logits = unembedding.logits(hidden)
        gradient = torch.softmax(logits if log_weights is None else logits + log_weights, -1).sub_(target_NV)
        return backward(unembedding.backward(gradient, logits))

    def _forward(self, final_ND: Tensor) -> tuple[Tensor, Backward]:
        if self._head.spec.activation is not None:
            return self._by_autograd(final_ND)
        hidden, unit_backward = self._unit(final_ND)
        if self._gain is not None:
            hidden = hidden * self._gain
        if self._shift is not None:
            hidden = hidden + self._shift
        if self._project is not None:
            hidden = hidden @ self._project.T

        def backward(gradient: Tensor) -> Tensor:
            if self._project is not None:
                gradient = gradient @ self._project
            return unit_backward(gradient if self._gain is None else gradient * self._gain)

        return hidden, backward

    def _unit(self, final_ND: Tensor) -> tuple[Tensor, Backward]:
        """Apply the final norm without its parameters."""
        norm, eps = self._head.spec.norm, self._head.spec.eps
        if norm == "none":
            return final_ND, lambda gradient: gradient
        centred = final_ND - final_ND.mean(-1, keepdim=True) if norm == "layer" else final_ND
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        unit = centred * inverse

        def backward(gradient: Tensor) -> Tensor:
            along = unit * (gradient * unit).mean(-1, keepdim=True)
            if norm == "layer":
                along += gradient.mean(-1, keepdim=True)
            return (gradient - along).mul_(inverse)

        return unit, backward

    def _by_autograd(self, final_ND: Tensor) -> tuple[Tensor, Backward]:
        with torch.enable_grad():
            leaf = final_ND.detach().requires_grad_()
            hidden = self._head.hidden(leaf)
        return hidden.detach(), lambda gradient: torch.autograd.grad(hidden, leaf, gradient)[0]


def load_decoder(folder: Path, *, memory_limit: int) -> Decoder:
    """Load the head in `folder` for a process that may take `memory_limit` bytes.

    Raises:
        DamagedArchiveError: The head is missing or cut short.
        UnsafeArchiveError: The files do not describe a head.
    """
    return Decoder(load_head(folder), most_bytes=memory_limit // 8)
