"""The heat map of a sweep: which sites, positions and heads bring the answer back, mean over pairs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from residua.analysis.support.plots import heat_map
from residua.capture.patching.pairs import Pair


def draw_sweep(
    path: Path, cells: pa.Table, title: str, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Draw the mean over pairs; positions count from the start of each.

    Sites are the rows and positions the columns; with heads, each head of a site is a row, or, where all positions are
    patched together, a column.

    Args:
        path: The picture.
        cells: One line a cell of every pair, with its site, position, head if any, and recovered.
        title: Its title, without the number of pairs.
        pairs: The pairs.
        tokenizer: Tells what stands at each position, where there is one pair.
    """
    lines = cells.to_pylist()
    together = all(line["position"] is None for line in lines)
    by_head = "head" in cells.column_names
    x, y = "head" if by_head and together else "position", ("site", "head") if by_head and not together else ("site",)
    columns = list(dict.fromkeys(line[x] for line in lines))
    columns = columns if None in columns else sorted(columns)
    rows = list(dict.fromkeys(tuple(line[name] for name in y) for line in lines))
    sums, counts = np.zeros((2, len(rows), len(columns)))
    for line in lines:
        if line["recovered"] is not None:
            place = rows.index(tuple(line[name] for name in y)), columns.index(line[x])
            sums[place] += line["recovered"]
            counts[place] += 1
    values = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    names = [] if together else _names(pairs, tokenizer, columns)
    heat_map(
        path,
        values,
        title=f"{title}, {'one pair' if len(pairs) == 1 else f'{len(pairs)} pairs'}",
        x_name="position (token of the corrupted example)" if names else x,
        y_name=" and ".join(y),
        value_name="share recovered",
        x_ticks=names or ["all" if column is None else str(column) for column in columns],
        y_ticks=[" ".join(map(str, row)) for row in rows],
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
