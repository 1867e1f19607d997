"""The unembedding of a head, applied block by block of the vocabulary, and its backward by hand.

At width 4,096 and 128k tokens the matrix alone has 2 GiB in float32. It stays in the model's own type, and each
block is converted when its turn comes, so that a worker of 4 GiB has room for the rest. Small ones are converted once.

Axes: `N` rows, `I` inner width, `V` vocabulary.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from residua.analysis.lens.lm_head import Head

_BLOCK_BYTES = 64 * 2**20


class Unembedding:
    """From hidden vectors to logits, and back.

    Args:
        weight: (vocabulary, inner width), floating.
        bias: (vocabulary,), or None.
        scale: Factor on the logits.
        softcap: Bound that the logits approach, or None.
        dtype: Type to compute in.
        most_bytes: A weight that takes more in that type is converted block by block.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        dtype: torch.dtype = torch.float32,
        most_bytes: int = 2**63,
    ) -> None:
        self.is_whole = weight.dtype == dtype or prod(weight.shape) * dtype.itemsize <= most_bytes
        self._weight = weight.to(dtype) if self.is_whole else weight
        self._bias = None if bias is None else bias.to(dtype)
        self._scale, self._softcap, self._dtype = scale, softcap, dtype
        self.n_tokens, width = weight.shape
        self._height = self.n_tokens if self.is_whole else max(1, _BLOCK_BYTES // (width * dtype.itemsize))

    @classmethod
    def of(cls, head: Head, *, dtype: torch.dtype = torch.float32, most_bytes: int = 2**63) -> "Unembedding":
        """Return the unembedding of `head`."""
        weight, bias = head.parameters["unembed.weight"], head.parameters.get("unembed.bias")
        spec = head.spec
        return cls(weight, bias, scale=spec.logit_scale, softcap=spec.softcap, dtype=dtype, most_bytes=most_bytes)

    def of_tokens(self, tokens: Tensor) -> "Unembedding":
        """Return the unembedding that gives the logits of `tokens` only, (tokens,), repeats allowed."""
        bias = None if self._bias is None else self._bias[tokens]
        weight = self._weight[tokens].to(self._dtype)
        return Unembedding(weight, bias, scale=self._scale, softcap=self._softcap, dtype=self._dtype)

    def logits(self, hidden_NI: Tensor) -> Tensor:
        """Return (rows, vocabulary) for (rows, inner width)."""
        if self.is_whole:
            logits = hidden_NI @ self._weight.T
        else:
            logits = hidden_NI.new_empty(len(hidden_NI), self.n_tokens)
            for tokens, weight in self._blocks():
                logits[:, tokens] = hidden_NI @ weight.T
        if self._bias is not None:
            logits += self._bias
        if self._scale != 1.0:
            logits *= self._scale
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits

    def backward(self, gradient_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """Return the gradient for the hidden vectors, (rows, inner width).

        Args:
            gradient_NV: Gradient for the logits; overwritten.
            logits_NV: What `logits` returned.
        """
        if self._softcap is not None:
            gradient_NV *= 1 - (logits_NV / self._softcap).square_()
        if self._scale != 1.0:
            gradient_NV *= self._scale
        if self.is_whole:
            return gradient_NV @ self._weight
        found = gradient_NV.new_zeros(len(gradient_NV), self._weight.shape[1])
        for tokens, weight in self._blocks():
            found.addmm_(gradient_NV[:, tokens], weight)
        return found

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.n_tokens, self._height):
            tokens = slice(start, start + self._height)
            yield tokens, self._weight[tokens].to(self._dtype)
