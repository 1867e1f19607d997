"""How good a lens is: what its distribution loses against the model's own, on rows that it was not trained on.

Logits of a few rows at a time are in memory, so that a vocabulary of any size fits.

Axes: `N` rows, `D` width, `V` vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from residua.analysis.lens.decoder import Decoder
from residua.analysis.lens.rows import LensRows, Rows
from residua.analysis.lens.translator import Translator

LOGIT_LENS, MODEL = "logit lens", "model"
_LOGIT_BYTES = 2**26  # of one distribution in memory; four are alive at a time


class Score(NamedTuple):
    """Sums over rows.

    Attributes:
        n_rows: Rows.
        n_labelled: Rows with a next token; none of a masked model.
        kl: KL divergence from the model's distribution, in nats.
        cross_entropy: To the next token, in nats, over rows that have one.
        n_agreeing: Rows where the most probable token is the model's.
    """

    n_rows: int = 0
    n_labelled: int = 0
    kl: float = 0.0
    cross_entropy: float = 0.0
    n_agreeing: int = 0

    def plus(self, other: "Score") -> "Score":
        """Return the sums over both."""
        return Score(
            self.n_rows + other.n_rows,
            self.n_labelled + other.n_labelled,
            self.kl + other.kl,
            self.cross_entropy + other.cross_entropy,
            self.n_agreeing + other.n_agreeing,
        )


class _Target:
    """The model's own distribution of a few rows, and their next tokens."""

    def __init__(self, logits_NV: Tensor, labels: Tensor) -> None:
        self.log = logits_NV.log_softmax(-1)
        self.chances = self.log.exp()
        self.best = self.log.argmax(-1)
        self.negative_entropy = (self.chances * self.log).sum(-1)
        self.labelled = (labels >= 0).nonzero()[:, 0]
        self.labels = labels[self.labelled]

    def score(self, logits_NV: Tensor) -> Score:
        """Compare a distribution with the model's."""
        log = logits_NV.log_softmax(-1)
        crossed = torch.einsum("nv,nv->n", self.chances, log)
        return Score(
            n_rows=len(log),
            n_labelled=len(self.labels),
            kl=(self.negative_entropy - crossed).sum(dtype=torch.float64).item(),
            cross_entropy=-log[self.labelled, self.labels].sum(dtype=torch.float64).item(),
            n_agreeing=int((log.argmax(-1) == self.best).sum().item()),
        )


def judge(
    maps: Mapping[str, Mapping[str, Translator]], final: str, rows: Rows, reader: LensRows, decoder: Decoder
) -> dict[str, dict[str, Score]]:
    """Score lenses on rows.

    Args:
        maps: By site, the maps to compare by name.
        final: Site of the final residual stream.
        rows: The rows.
        reader: Reads them.
        decoder: The head.

    Returns:
        By site, the score of each map, of the logit lens, and of the model itself under the name of its own.
    """
    scores = {site: dict.fromkeys([LOGIT_LENS, MODEL, *named], Score()) for site, named in maps.items()}
    values = {site: reader.read(site, rows) for site in (final, *maps)}
    labels = torch.from_numpy(reader.next_tokens(rows))
    height = max(1, _LOGIT_BYTES // (4 * decoder.unembedding.n_tokens))
    for start in range(0, len(rows), height):
        here = slice(start, start + height)
        target = _Target(decoder.logits(values[final][here].float()), labels[here])
        own = target.score(target.log)
        for site, named in maps.items():
            hidden = values[site][here].float()
            found = {name: target.score(decoder.logits(translator(hidden))) for name, translator in named.items()}
            found |= {MODEL: own, LOGIT_LENS: target.score(decoder.logits(hidden))}
            scores[site] = {name: scores[site][name].plus(score) for name, score in found.items()}
    return scores
