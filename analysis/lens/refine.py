"""The refinement of a lens: Adam on the KL divergence to the model's own distribution, in whitened coordinates.

Starting at the ridge solution, plain Adam destroys it within ten steps: channels of the residual stream differ a
thousandfold in size. Here the map acts on whitened rows, where one step size suits every direction. Layers go in
lockstep, so that the model's own distribution is computed once for all of them; each layer's numbers are its own, so
they do not depend on which layers go together.

Axes: `N` rows of a batch, `D` width, `V` vocabulary.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from residua.analysis.lens.candidates import Candidates, draw_candidates
from residua.analysis.lens.decoder import Decoder
from residua.analysis.lens.ridge import Ridge
from residua.analysis.lens.rows import LensRows
from residua.analysis.lens.settings import LensSettings
from residua.analysis.lens.translator import Translator
from residua.analysis.lens.unembedding import Unembedding

_MOMENTUM, _MEMORY, _EPSILON = 0.8, 0.99, 1e-12


class _Layer:
    """One layer's map for whitened rows, with Adam's two averages; its bias is the last line."""

    def __init__(self, ridge: Ridge) -> None:
        self._whitening = ridge.whitening
        self._centre = -(ridge.mean @ ridge.whitening)
        self._map = torch.cat([ridge.whitened, ridge.offset[None]])
        self._gradient = torch.zeros_like(self._map)
        self._average = torch.zeros_like(self._map)
        self._square = torch.zeros_like(self._map)
        self._n_steps = 0

    def step(self, hidden_ND: Tensor, descend: "_Descent", rate: float) -> None:
        """Take one step on a batch."""
        white = torch.addmm(self._centre, hidden_ND, self._whitening)
        pull = descend(torch.addmm(self._map[-1], white, self._map[:-1])).div_(len(white))
        torch.mm(white.T, pull, out=self._gradient[:-1])
        torch.sum(pull, 0, out=self._gradient[-1])
        self._n_steps += 1
        self._average.lerp_(self._gradient, 1 - _MOMENTUM)
        self._square.mul_(_MEMORY).addcmul_(self._gradient, self._gradient, value=1 - _MEMORY)
        scale = math.sqrt(1 - _MEMORY**self._n_steps) / (1 - _MOMENTUM**self._n_steps)
        self._map.addcdiv_(self._average, self._square.sqrt().add_(_EPSILON), value=-rate * scale)

    def translator(self) -> Translator:
        """Return the map for rows as they are."""
        weight = self._whitening.double() @ self._map[:-1].double()
        bias = self._map[-1].double() + self._centre.double() @ self._map[:-1].double()
        return Translator(weight.float(), bias.float())


class _Descent:
    """The gradient of one batch, for what a layer makes of it."""

    def __init__(self, decoder: Decoder, target_NV: Tensor, candidates: Candidates | None) -> None:
        self._decoder = decoder
        self._target = target_NV if candidates is None else candidates.restrict(target_NV)
        self._some: Unembedding | None = None
        self._log_weights: Tensor | None = None
        if candidates is not None:
            self._some = decoder.unembedding.of_tokens(candidates.tokens)
            self._log_weights = candidates.weights.log()

    def __call__(self, final_ND: Tensor) -> Tensor:
        return self._decoder.kl_gradient(final_ND, self._target, unembedding=self._some, log_weights=self._log_weights)


def refine(
    ridges: Mapping[str, Ridge],
    final: str,
    reader: LensRows,
    decoder: Decoder,
    settings: LensSettings,
    *,
    n_rows: int,
    row_bytes: int,
    part: int = 0,
    n_parts: int = 1,
) -> dict[str, Translator]:
    """Refine the maps of some sites in lockstep.

    Args:
        ridges: Where each site starts.
        final: Site of the final residual stream.
        reader: The rows.
        decoder: The head.
        settings: How.
        n_rows: Training rows of all parts together, which the cosine is laid over.
        row_bytes: Bytes of one row of a site.
        part: Which share of the rows to use.
        n_parts: Shares.

    Returns:
        The maps by site.
    """
    layers = {site: _Layer(ridge) for site, ridge in ridges.items()}
    generator = torch.Generator().manual_seed(settings.seed * 1009 + part)
    n_left = n_total = max(1, settings.epochs * n_rows // n_parts)
    for values in _batches([final, *layers], reader, settings, generator, row_bytes, part, n_parts):
        target = decoder.logits(next(values).float()).softmax(-1)
        candidates = settings.candidates and draw_candidates(target, settings.candidates, generator)
        descend = _Descent(decoder, target, candidates or None)
        rate = settings.learning_rate * (1 - math.cos(math.pi * max(0.0, n_left / n_total))) / 2
        for layer, hidden in zip(layers.values(), values, strict=True):
            layer.step(hidden.float(), descend, rate)
        n_left -= len(target)
    return {site: layer.translator() for site, layer in layers.items()}


def _batches(
    sites: list[str],
    reader: LensRows,
    settings: LensSettings,
    generator: torch.Generator,
    row_bytes: int,
    part: int,
    n_parts: int,
) -> Iterator[Iterator[Tensor]]:
    """Yield the rows of each batch, site after site, in the type that is stored."""
    for epoch in range(settings.epochs):
        for rows in reader.waves(row_bytes, epoch, part, n_parts):
            values = [reader.read(site, rows) for site in sites]
            order = torch.randperm(len(rows), generator=generator)
            for batch in order.tensor_split(max(1, round(len(rows) / settings.batch_rows))):
                picked = batch.sort().values  # in order, memory is read faster
                yield (whole[picked] for whole in values)
