"""What a lens scored, as a table and a picture, and which of its maps is kept at each point."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from residua.analysis.lens.evaluate import LOGIT_LENS, MODEL, Score

RIDGE, REFINED = "ridge", "refined"

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


def best_map(scores: Mapping[str, Score]) -> str:
    """Return the name of the map with the least KL divergence, be it the logit lens."""
    names = [name for name in (LOGIT_LENS, RIDGE, REFINED) if name in scores]
    return min(names, key=lambda name: scores[name].kl)


def report_table(
    sites: Mapping[int, str], scores: Mapping[int, Mapping[str, Score]], penalties: Mapping[int, float]
) -> pa.Table:
    """Return a line a site.

    The columns are those of `REPORT`; kept is ``refined``, ``ridge`` or ``logit lens``. KL
    divergences and cross-entropies are means in nats a token, agreements shares of the rows. The penalty is the
    ridge's, in mean variances of the input. What was not measured is null.
    """
    return pa.Table.from_pylist([_line(depth, site, scores[depth], penalties) for depth, site in sites.items()], REPORT)


def _line(depth: int, site: str, scores: Mapping[str, Score], penalties: Mapping[int, float]) -> dict[str, Any]:
    kept, plain, own = scores[best_map(scores)], scores[LOGIT_LENS], scores[MODEL]
    return {
        "site": site,
        "depth": depth,
        "kept": best_map(scores),
        "rows": plain.n_rows,
        "kl": kept.kl / kept.n_rows,
        "kl_logit_lens": plain.kl / plain.n_rows,
        "kl_ridge": scores[RIDGE].kl / plain.n_rows if RIDGE in scores else None,
        "cross_entropy": _per_label(kept),
        "cross_entropy_logit_lens": _per_label(plain),
        "cross_entropy_model": _per_label(own),
        "agreement": kept.n_agreeing / kept.n_rows,
        "agreement_logit_lens": plain.n_agreeing / plain.n_rows,
        "penalty": penalties.get(depth),
    }


def _per_label(score: Score) -> float | None:
    return score.cross_entropy / score.n_labelled if score.n_labelled else None
