"""The heat map of a sweep: which sites and positions bring the answer back, mean over pairs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from residua.analysis.plots import heat_map
from residua.capture.pairs import Pair


def draw_sweep(
    path: Path, cells: pa.Table, title: str, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Draw the mean over pairs; positions count from the start of each.

    Args:
        path: The picture.
        cells: One line a cell of every pair, with its site, position and recovered.
        title: Its title, without the number of pairs.
        pairs: The pairs.
        tokenizer: Tells what stands at each position, where there is one pair.
    """
    lines = cells.select(["site", "position", "recovered"]).to_pylist()
    columns = sorted({line["position"] for line in lines})
    sites = list(dict.fromkeys(line["site"] for line in lines))
    sums, counts = np.zeros((2, len(sites), len(columns)))
    for line in lines:
        if line["recovered"] is not None:
            place = sites.index(line["site"]), columns.index(line["position"])
            sums[place] += line["recovered"]
            counts[place] += 1
    values = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    names = _names(pairs, tokenizer, columns)
    heat_map(
        path,
        values,
        title=f"{title}, {'one pair' if len(pairs) == 1 else f'{len(pairs)} pairs'}",
        x_name="position (token of the corrupted example)" if names else "position",
        y_name="site",
        value_name="share recovered",
        x_ticks=names or [str(column) for column in columns],
        y_ticks=sites,
        centred=True,
    )


def _names(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase | None, columns: list[int]) -> list[str]:
    """Return what stands at each position, where there is one pair and a tokenizer to tell."""
    if len(pairs) > 1 or tokenizer is None:
        return []
    ids = pairs[0].corrupted
    return [f"{column} {_safe(str(tokenizer.decode([ids[column]])))}" for column in columns]


def _safe(text: str) -> str:
    """Keep control characters out of the picture, and dollars, which would begin a formula."""
    return (repr(text)[1:-1] if text.strip() else repr(text)[:6])[:14].replace("$", r"\$")
