"""Evaluation of a lens on held-out rows: how far its distribution is from the model's own, as sums and as a report.

Logits of a few rows at a time are in memory, so a vocabulary of any size fits. The measures are those of Belrose et al.
(2023), arXiv 2303.08112.

Axes: `N` rows, `D` width, `V` vocabulary.
"""

from collections.abc import Mapping
from operator import add
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from residua.analysis.lens.checkpoint import Translator
from residua.analysis.lens.rows import LensRows, Rows
from residua.analysis.lens.unembedding import Decoder

LOGIT_LENS, RIDGE, REFINED, MODEL = "logit lens", "ridge", "refined", "model"
_LOGIT_BYTES = 2**26  # one distribution in memory; four exist at a time

REPORT = pa.schema(
    [
        ("site", pa.string()),
        ("depth", pa.int64()),
        ("kept", pa.string()),
        ("rows", pa.int64()),
        ("kl", pa.float64()),
        ("kl_logit_lens", pa.float64()),
        ("kl_ridge", pa.float64()),
        ("cross_entropy", pa.float64()),
        ("cross_entropy_logit_lens", pa.float64()),
        ("cross_entropy_model", pa.float64()),
        ("agreement", pa.float64()),
        ("agreement_logit_lens", pa.float64()),
        ("penalty", pa.float64()),
    ]
)


class Score(NamedTuple):
    """Sums over rows.

    Attributes:
        n_rows: Number of rows.
        n_labelled: Number of rows with a next token; 0 for a masked model.
        kl: KL divergence from the model's distribution, in nats.
        cross_entropy: Cross-entropy to the next token, in nats, over the rows that have one.
        n_agreeing: Number of rows whose most probable token is the model's.
    """

    n_rows: int = 0
    n_labelled: int = 0
    kl: float = 0.0
    cross_entropy: float = 0.0
    n_agreeing: int = 0

    def plus(self, other: "Score") -> "Score":
        """Return the sums over the rows of both."""
        return Score._make(map(add, self, other))


class _Target:
    """The model's own distribution of a few rows, and their next tokens."""

    def __init__(self, logits_NV: Tensor, labels: Tensor) -> None:
        self.log = logits_NV.log_softmax(-1)
        self.probabilities = self.log.exp()
        self.best = self.log.argmax(-1)
        self.negative_entropy = (self.probabilities * self.log).sum(-1)
        self.labelled = (labels >= 0).nonzero()[:, 0]
        self.labels = labels[self.labelled]

    def score(self, logits_NV: Tensor) -> Score:
        """Compare a distribution with the model's."""
        log = logits_NV.log_softmax(-1)
        negative_cross_entropy = torch.einsum("nv,nv->n", self.probabilities, log)
        return Score(
            n_rows=len(log),
            n_labelled=len(self.labels),
            kl=(self.negative_entropy - negative_cross_entropy).sum(dtype=torch.float64).item(),
            cross_entropy=-log[self.labelled, self.labels].sum(dtype=torch.float64).item(),
            n_agreeing=int((log.argmax(-1) == self.best).sum().item()),
        )


def evaluate(
    maps: Mapping[str, Mapping[str, Translator]], final: str, rows: Rows, reader: LensRows, decoder: Decoder
) -> dict[str, dict[str, Score]]:
    """Score maps on rows.

    Args:
        maps: By site, the maps to compare by name.
        final: Site of the final residual stream.
        rows: The rows.
        reader: Reads them.
        decoder: The head.

    Returns:
        By site, the score of each map, of the logit lens, and of the model itself, by name.
    """
    scores = {site: dict.fromkeys([LOGIT_LENS, MODEL, *named], Score()) for site, named in maps.items()}
    values = {site: reader.read(site, rows).to(decoder.device) for site in (final, *maps)}
    moved = {
        site: {name: Translator(*(each.to(decoder.device) for each in one)) for name, one in named.items()}
        for site, named in maps.items()
    }
    labels = torch.from_numpy(reader.next_tokens(rows))
    has_no_logit = labels >= decoder.unembedding.n_tokens
    labels = labels.masked_fill(has_no_logit, -1).to(decoder.device)
    height = max(1, _LOGIT_BYTES // (4 * decoder.unembedding.n_tokens))
    for start in range(0, len(rows), height):
        here = slice(start, start + height)
        target = _Target(decoder.logits(values[final][here].float()), labels[here])
        own = target.score(target.log)
        for site, named in moved.items():
            hidden = values[site][here].float()
            found = {name: target.score(decoder.logits(translator(hidden))) for name, translator in named.items()}
            found |= {MODEL: own, LOGIT_LENS: target.score(decoder.logits(hidden))}
            scores[site] = {name: scores[site][name].plus(score) for name, score in found.items()}
    return scores


def best_map(scores: Mapping[str, Score]) -> str:
    """Return the name of the map with the least KL divergence, which may be the logit lens."""
    names = [name for name in (LOGIT_LENS, RIDGE, REFINED) if name in scores]
    return min(names, key=lambda name: scores[name].kl)


def report_table(
    sites: Mapping[int, str], scores: Mapping[int, Mapping[str, Score]], penalties: Mapping[int, float]
) -> pa.Table:
    """Return the report: a line per site, with the columns of `REPORT`.

    `depth` is the layer in the lens, and `kept` is ``refined``, ``ridge`` or ``logit lens``. KL divergences and
    cross-entropies are means in nats per token, agreements are shares of the rows. `penalty` is that of the ridge
    regression, in units of the mean variance of the input. Values that were not measured are null.

    Args:
        sites: Sites by layer.
        scores: By layer, the score of each map by name.
        penalties: By layer.
    """
    lines = [_report_line(layer, site, scores[layer], penalties[layer]) for layer, site in sites.items()]
    return pa.Table.from_pylist(lines, REPORT)


def _report_line(layer: int, site: str, scores: Mapping[str, Score], penalty: float) -> dict[str, Any]:
    kept, logit_lens = scores[best_map(scores)], scores[LOGIT_LENS]
    return {
        "site": site,
        "depth": layer,
        "kept": best_map(scores),
        "rows": logit_lens.n_rows,
        "kl": kept.kl / kept.n_rows,
        "kl_logit_lens": logit_lens.kl / logit_lens.n_rows,
        "kl_ridge": scores[RIDGE].kl / logit_lens.n_rows,
        "cross_entropy": _per_label(kept),
        "cross_entropy_logit_lens": _per_label(logit_lens),
        "cross_entropy_model": _per_label(scores[MODEL]),
        "agreement": kept.n_agreeing / kept.n_rows,
        "agreement_logit_lens": logit_lens.n_agreeing / logit_lens.n_rows,
        "penalty": penalty,
    }


def _per_label(score: Score) -> float | None:
    return score.cross_entropy / score.n_labelled if score.n_labelled else None
