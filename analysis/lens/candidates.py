"""A shared candidate vocabulary: a step of the refinement that looks at some tokens instead of all.

The most probable tokens of a batch enter with weight 1. As many are drawn from the rest, and each stands for all those
that it was drawn from, by its inverse probability. All rows share them, so the products stay dense. That is unbiased
for the target's part of the gradient, and nearly so for the lens's own; leaving the tail out altogether is neither.

Axes: `N` rows, `V` vocabulary, `C` candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_UNIFORM = 0.5  # share of the draws that are blind: a lens may believe in tokens that the model does not


class Candidates(NamedTuple):
    """Tokens, and how many each stands for.

    Attributes:
        tokens: (candidates,), int64; drawn ones may repeat.
        weights: (candidates,), float.
    """

    tokens: Tensor
    weights: Tensor

    def restrict(self, target_NV: Tensor) -> Tensor:
        """Return the target on the candidates, weighted, (rows, candidates)."""
        return target_NV[:, self.tokens] * self.weights


def draw_candidates(target_NV: Tensor, n_tokens: int, generator: torch.Generator) -> Candidates | None:
    """Choose the `n_tokens` most probable tokens of a batch, and draw as many from the rest.

    Args:
        target_NV: The model's own distribution, (rows, vocabulary).
        n_tokens: Tokens of each sort.
        generator: Source of the draws.

    Returns:
        None if the vocabulary is no larger than that.
    """
    if 2 * n_tokens >= target_NV.shape[1]:
        return None
    rest = target_NV.mean(0)
    top = rest.topk(n_tokens).indices
    rest[top] = 0
    chances = (1 - _UNIFORM) * rest / rest.sum().clamp_min(1e-30)
    chances += _UNIFORM / (len(rest) - n_tokens)
    chances[top] = 0
    drawn = torch.multinomial(chances, n_tokens, replacement=True, generator=generator)
    weights = torch.cat([torch.ones_like(chances[top]), 1 / (n_tokens * chances[drawn] / chances.sum())])
    return Candidates(torch.cat([top, drawn]), weights)
