"""The refinement of a lens: Adam on the KL divergence to the model's own distribution, in whitened coordinates.

The loss is that of Belrose et al. (2023), arXiv 2303.08112; Adam is that of Kingma and Ba (2015), arXiv 1412.6980. In
the coordinates of the residual stream Adam destroys the ridge solution within ten steps, because some channels are a
thousand times larger than others. So the map acts on whitened rows, where one step size suits all directions. Layers
are refined in lockstep, so that the model's own distribution is computed once for all of them. Each layer's numbers are
its own, so the result does not depend on which layers go together.

Optionally a step uses a few candidate tokens instead of the full vocabulary. The most probable tokens of a batch enter
with weight 1. As many are drawn from the rest, and weighted by their inverse probability (Hansen and Hurwitz 1943). All
rows share the candidates, so the products stay dense. The target's term of the gradient is then unbiased, and the
lens's own term nearly so. Without the drawn tokens, both would be biased. A few batches in a row share the candidates
and one pass over the unembedding, which gives the model's own distribution of all their rows.

Axes: `N` rows of a batch, `D` width, `V` vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from residua.analysis.lens.checkpoint import Translator
from residua.analysis.lens.ridge import Ridge
from residua.analysis.lens.rows import LensRows
from residua.analysis.lens.unembedding import Decoder, softmax_
from residua.analysis.support.device import Batch, on_device

_BETA_1, _BETA_2, _EPSILON = 0.8, 0.99, 1e-12
_BLOCK_COLUMNS = 1024
_TARGET_BYTES = 2**27  # of the model's own distribution of the batches that share candidates
_MOST_BATCHES = 4  # of these: more rows have more tokens that matter
_UNIFORM_SHARE = 0.5  # of the drawn candidates: the lens may believe in tokens that the model does not


def refine_bytes(width: int, n_tokens: int, n_candidates: int, batch_rows: int) -> int:
    """Return the most memory that the refinement of one layer takes in bytes, besides LM head and rows.

    That is six matrices of float32, the model's own distribution, and the candidates with their rows of the
    unembedding, in the stored type and in float32.
    """
    batch_bytes = 4 * batch_rows * n_tokens
    if not n_candidates:
        return 24 * width**2 + 3 * batch_bytes
    return 24 * width**2 + max(batch_bytes, _TARGET_BYTES) + 2 * n_candidates * (8 * width + 12 * batch_rows)


class Candidates(NamedTuple):
    """Some tokens, and how many each stands for.

    Attributes:
        tokens: (candidates,), int64; drawn ones may repeat.
        weights: (candidates,), floating.
    """

    tokens: Tensor
    weights: Tensor

    def restrict(self, target_NV: Tensor) -> Tensor:
        """Return the weighted target on the candidates, (rows, candidates)."""
        return target_NV[:, self.tokens] * self.weights


def draw_candidates(target_NV: Tensor, n_tokens: int, generator: torch.Generator) -> Candidates | None:
    """Choose the `n_tokens` most probable tokens of a batch, and draw as many from the rest.

    Args:
        target_NV: The model's own distribution, (rows, vocabulary).
        n_tokens: Number of tokens of each kind.
        generator: Random generator.

    Returns:
        The candidates, or None if the vocabulary has no more tokens than that.
    """
    if 2 * n_tokens >= target_NV.shape[1]:
        return None
    rest = target_NV.mean(0)
    top = rest.topk(n_tokens).indices
    rest[top] = 0
    chances = (1 - _UNIFORM_SHARE) * rest / rest.sum().clamp_min(1e-30)
    chances += _UNIFORM_SHARE / (len(rest) - n_tokens)
    chances[top] = 0
    drawn = torch.multinomial(chances, n_tokens, replacement=True, generator=generator)
    weights = torch.cat([torch.ones_like(chances[top]), 1 / (n_tokens * chances[drawn] / chances.sum())])
    return Candidates(torch.cat([top, drawn]), weights)


class _LayerMap:
    """The map of one layer for whitened rows, with Adam's two moments. The last row of the matrix is the bias."""

    def __init__(self, ridge: Ridge, device: torch.device) -> None:
        self._whitening = ridge.whitening.to(device)
        self._centre = -(ridge.mean @ ridge.whitening).to(device)
        self._map = ridge.whitened.to(device)
        self._gradient = torch.zeros_like(self._map)
        self._first_moment = torch.zeros_like(self._map)
        self._second_moment = torch.zeros_like(self._map)
        self._n_steps = 0

    def step(
        self, hidden_ND: Tensor, target_NV: Tensor, gradient_of: Callable[[Tensor, Tensor], Tensor], rate: float
    ) -> None:
        """Take one step on a batch, whose loss has the gradient `gradient_of` its estimate and its target."""
        white = torch.addmm(self._centre, hidden_ND, self._whitening)
        gradient = gradient_of(torch.addmm(self._map[-1], white, self._map[:-1]), target_NV).div_(len(white))
        torch.mm(white.T, gradient, out=self._gradient[:-1])
        torch.sum(gradient, 0, out=self._gradient[-1])
        self._n_steps += 1
        self._first_moment.lerp_(self._gradient, 1 - _BETA_1)
        self._second_moment.mul_(_BETA_2).addcmul_(self._gradient, self._gradient, value=1 - _BETA_2)
        scale = math.sqrt(1 - _BETA_2**self._n_steps) / (1 - _BETA_1**self._n_steps)
        deviation = torch.sqrt(self._second_moment, out=self._gradient).add_(_EPSILON)  # its room is free again
        self._map.addcdiv_(self._first_moment, deviation, value=-rate * scale)

    def translator(self) -> Translator:
        """Return the map for rows that are not whitened, in this machine's memory. No step can follow."""
        del self._gradient, self._first_moment, self._second_moment  # four matrices of float32 are enough at a time
        weight = torch.empty_like(self._whitening)
        bias = self._map[-1].double()
        for start in range(0, len(weight), _BLOCK_COLUMNS):
            columns = slice(start, start + _BLOCK_COLUMNS)
            block = self._map[:-1, columns].double()
            bias[columns] += self._centre.double() @ block
            for rows in range(0, len(weight), _BLOCK_COLUMNS):
                part = slice(rows, rows + _BLOCK_COLUMNS)
                weight[part, columns] = (self._whitening[part].double() @ block).float()
        return Translator(weight.cpu(), bias.float().cpu())


def _with_gradient(
    decoder: Decoder, targets_NV: Tensor, candidates: Candidates | None
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Return targets, of candidates if there are any, and the gradient of the loss of rows with such targets.

    The gradient is a function of a layer's estimate of the final residual stream, and of the rows' targets.
    """
    if candidates is None:
        return targets_NV, decoder.kl_gradient
    of_candidates = partial(
        decoder.kl_gradient,
        unembedding=decoder.unembedding.of_tokens(candidates.tokens),
        log_weights=candidates.weights.log(),
    )
    return candidates.restrict(targets_NV), of_candidates


def refine(
    ridges: Mapping[str, Ridge],
    final: str,
    reader: LensRows,
    decoder: Decoder,
    *,
    n_rows: int,
    part: int,
    n_parts: int,
) -> dict[str, Translator]:
    """Refine the maps of several sites in lockstep.

    Args:
        ridges: Where each site starts; their `whitened` changes.
        final: Site of the final residual stream.
        reader: The rows.
        decoder: The LM head; where it is, the layers are refined, and batches are copied ahead to a CUDA device.
        n_rows: Number of training rows of all parts together; sets the length of the cosine schedule.
        part: Which of `n_parts` disjoint sets of rows to train on.
        n_parts: Number of these sets.

    Returns:
        The maps by site.
    """
    settings = reader.settings
    n_candidates = settings.n_candidates(decoder.unembedding.n_tokens)
    n_shared = _n_shared(settings.batch_rows, decoder) if n_candidates else 1
    layers = {site: _LayerMap(ridge, decoder.device) for site, ridge in ridges.items()}
    seed = settings.seed * 1009 + part
    draws = torch.Generator(decoder.device).manual_seed(seed)
    n_left = n_total = max(1, settings.epochs * n_rows // n_parts)
    batches = on_device(_batches([final, *layers], reader, seed, part, n_parts), decoder.device)
    while group := list(islice(batches, n_shared)):
        targets = softmax_(decoder.logits(torch.cat([batch[final] for batch in group]).float()))
        candidates = draw_candidates(targets, n_candidates, draws) if n_candidates else None
        targets, gradient_of = _with_gradient(decoder, targets, candidates)
        for batch, target in zip(group, torch.split(targets, [len(batch[final]) for batch in group]), strict=True):
            rate = settings.learning_rate * (1 - math.cos(math.pi * max(0.0, n_left / n_total))) / 2
            for site, layer in layers.items():
                layer.step(batch[site].float(), target, gradient_of, rate)
            n_left -= len(target)
    return {site: layer.translator() for site, layer in layers.items()}


def _n_shared(batch_rows: int, decoder: Decoder) -> int:
    """Return the number of batches that share candidates."""
    batch_bytes = 4 * batch_rows * decoder.unembedding.n_tokens
    return max(1, min(_MOST_BATCHES, _TARGET_BYTES // batch_bytes))


def _batches(sites: list[str], reader: LensRows, seed: int, part: int, n_parts: int) -> Iterator[Batch]:
    """Yield the batches: the values of their rows at the sites, in the stored type."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(reader.settings.epochs):
        for rows in reader.epoch_rows(sites[0], epoch, part, n_parts):
            values = {site: reader.read(site, rows) for site in sites}
            order = torch.randperm(len(rows), generator=generator)
            for batch in order.tensor_split(max(1, round(len(rows) / reader.settings.batch_rows))):
                picked = batch.sort().values  # memory is read faster in order
                yield {site: of_site[picked] for site, of_site in values.items()}
