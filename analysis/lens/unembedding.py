"""The LM head for lenses: logits, and the gradient of the KL divergence to the model's own distribution.

Norm, projection and unembedding are differentiated by hand, which needs one buffer of logits instead of five. The dense
layer of BERT's head, small compared with its vocabulary, is left to autograd.

At width 4,096 and 128k tokens the unembedding takes 2 GiB in float32. A large one stays in the model's own type. It is
converted block by block when it is used, so that a worker of 4 GiB has room for the rest. A small one is converted
once.

Axes: `N` rows, `D` width of the residual stream, `I` inner width (input of the unembedding), `V` vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from residua.analysis.lens.lm_head import LMHead

Backward = Callable[[Tensor], Tensor]


def softmax_(logits_NV: Tensor) -> Tensor:
    """Turn logits into probabilities in their own memory, (rows, tokens)."""
    logits_NV.sub_(logits_NV.amax(-1, keepdim=True)).exp_()
    return logits_NV.div_(logits_NV.sum(-1, keepdim=True))


class Unembedding:
    """Maps hidden vectors to logits, and gradients back.

    Args:
        weight: (vocabulary, inner width), floating.
        bias: (vocabulary,), or None.
        scale: Factor on the logits.
        softcap: Bound that the logits approach, or None.
        dtype: Type to compute in.
        most_bytes: A weight that takes more bytes in that type is converted block by block.
        block_bytes: Bytes of one such block.
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
        block_bytes: int = 64 * 2**20,
    ) -> None:
        self.is_converted = weight.dtype == dtype or weight.numel() * dtype.itemsize <= most_bytes
        self._weight = weight.to(dtype) if self.is_converted else weight
        self._bias = None if bias is None else bias.to(dtype)
        self._scale, self._softcap, self._dtype = scale, softcap, dtype
        self.n_tokens, width = weight.shape
        self._block_height = max(1, block_bytes // (width * dtype.itemsize))

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._weight.device

    def of_tokens(self, tokens: Tensor) -> "Unembedding":
        """Return the unembedding that gives the logits of `tokens` only, (tokens,), repeats allowed."""
        bias = None if self._bias is None else self._bias[tokens]
        weight = self._weight[tokens].to(self._dtype)
        return Unembedding(weight, bias, scale=self._scale, softcap=self._softcap, dtype=self._dtype)

    def logits(self, hidden_NI: Tensor) -> Tensor:
        """Return (rows, vocabulary) for (rows, inner width)."""
        if self.is_converted:
            logits = hidden_NI @ self._weight.T
        else:
            logits = hidden_NI.new_empty(len(hidden_NI), self.n_tokens)
            for tokens, weight in self._blocks():
                torch.mm(hidden_NI, weight.T, out=logits[:, tokens])
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
            logits_NV: Result of `logits`.
        """
        if self._softcap is not None:
            gradient_NV *= 1 - (logits_NV / self._softcap).square_()
        if self._scale != 1.0:
            gradient_NV *= self._scale
        if self.is_converted:
            return gradient_NV @ self._weight
        found = gradient_NV.new_zeros(len(gradient_NV), self._weight.shape[1])
        for tokens, weight in self._blocks():
            found.addmm_(gradient_NV[:, tokens], weight)
        return found

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the converted blocks of the weight; each is there until the next one."""
        block = self._weight.new_empty(
            (min(self._block_height, self.n_tokens), *self._weight.shape[1:]), dtype=self._dtype
        )
        for start in range(0, self.n_tokens, self._block_height):
            found = self._weight[start : start + self._block_height]
            yield slice(start, start + len(found)), block[: len(found)].copy_(found)


class Decoder:
    """Decodes residual streams with an LM head, forward and backward.

    Args:
        head: The head.
        dtype: Type to compute in.
        most_bytes: An unembedding that takes more bytes in that type is converted block by block.
        device: Where to compute; None: where the LM head is.
    """

    def __init__(
        self,
        head: LMHead,
        *,
        dtype: torch.dtype = torch.float32,
        most_bytes: int = 2**63,
        device: torch.device | None = None,
    ) -> None:
        spec = head.spec
        parameters = {name: tensor.to(device) for name, tensor in head.parameters.items()}
        self.unembedding = Unembedding(
            parameters["unembed.weight"],
            parameters.get("unembed.bias"),
            scale=spec.logit_scale,
            softcap=spec.softcap,
            dtype=dtype,
            most_bytes=most_bytes,
        )
        others = {name: tensor.to(dtype) for name, tensor in parameters.items() if "unembed" not in name}
        self._head = LMHead(spec, others)
        weight = others.get("norm.weight")
        self._norm_weight = None if weight is None else weight + spec.weight_offset
        self._norm_bias = others.get("norm.bias")
        self._projection = others.get("project_out.weight")

    @property
    def device(self) -> torch.device:
        """Where rows must be."""
        return self.unembedding.device

    def normalise(self, final_ND: Tensor) -> Tensor:
        """Apply the final norm without its parameters."""
        return self._normalise(final_ND)[0]

    def logits(self, final_ND: Tensor) -> Tensor:
        """Return (rows, vocabulary) for (rows, width)."""
        return self.unembedding.logits(self._hidden(final_ND)[0])

    def kl_gradient(
        self,
        final_ND: Tensor,
        target_NV: Tensor,
        *,
        unembedding: Unembedding | None = None,
        log_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of the KL divergence, summed over rows, for the decoded residual streams.

        Args:
            final_ND: Residual streams to decode, (rows, width).
            target_NV: The target distribution, (rows, tokens).
            unembedding: Unembedding of some tokens; by default of all.
            log_weights: Logarithm of the weight of each token, (tokens,); by default every weight is 1.
        """
        hidden, backward = self._hidden(final_ND)
        unembedding = unembedding or self.unembedding
        logits = unembedding.logits(hidden)
        gradient = torch.softmax(logits if log_weights is None else logits + log_weights, -1).sub_(target_NV)
        return backward(unembedding.backward(gradient, logits))

    def _hidden(self, final_ND: Tensor) -> tuple[Tensor, Backward]:
        """Return the input of the unembedding, and the function that takes gradients back."""
        if self._head.spec.activation is not None:
            return self._hidden_by_autograd(final_ND)
        hidden, norm_backward = self._normalise(final_ND)
        if self._norm_weight is not None:
            hidden = hidden * self._norm_weight
        if self._norm_bias is not None:
            hidden = hidden + self._norm_bias
        if self._projection is not None:
            hidden = hidden @ self._projection.T

        def backward(gradient: Tensor) -> Tensor:
            if self._projection is not None:
                gradient = gradient @ self._projection
            return norm_backward(gradient if self._norm_weight is None else gradient * self._norm_weight)

        return hidden, backward

    def _normalise(self, final_ND: Tensor) -> tuple[Tensor, Backward]:
        norm, eps = self._head.spec.norm, self._head.spec.eps
        if norm == "none":
            return final_ND, lambda gradient: gradient
        centred = final_ND - final_ND.mean(-1, keepdim=True) if norm == "layer" else final_ND
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        normalised = centred * inverse

        def backward(gradient: Tensor) -> Tensor:
            removed = normalised * (gradient * normalised).mean(-1, keepdim=True)
            if norm == "layer":
                removed += gradient.mean(-1, keepdim=True)
            return (gradient - removed).mul_(inverse)

        return normalised, backward

    def _hidden_by_autograd(self, final_ND: Tensor) -> tuple[Tensor, Backward]:
        with torch.enable_grad():
            leaf = final_ND.detach().requires_grad_()
            hidden = self._head.hidden(leaf)
        return hidden.detach(), lambda gradient: torch.autograd.grad(hidden, leaf, gradient)[0]
