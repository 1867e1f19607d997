"""An archive that an autoencoder can learn: every row is a sum of a few directions out of twenty-four."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

LENGTH, N_EXAMPLES = 10, 160
N_ROWS = LENGTH * N_EXAMPLES
WIDE, NARROW = "resid_post.0", "mlp_out.0"
WIDTHS: Mapping[str, int] = {WIDE: 16, NARROW: 8}


def make_trained(path: Path, seed: int = 0, dtype: str = "float32", widths: Mapping[str, int] = WIDTHS) -> Archive:
    """Write sites of `widths`; the rows at position 0 are a thousand times as long, as those of BOS are."""
    rng = np.random.default_rng(seed)
    active = (rng.random((N_ROWS, 24)) < 0.1) * rng.uniform(0.5, 2, (N_ROWS, 24))
    values = {}
    for site, width in widths.items():
        directions = rng.normal(size=(24, width))
        values[site] = active @ (directions / np.linalg.norm(directions, axis=1, keepdims=True)) * 7 + 0.1
        values[site][::LENGTH] *= 1000
    return write_rows(
        path,
        [LENGTH] * N_EXAMPLES,
        {site: rows.astype(dtype) for site, rows in values.items()},
        columns={"source_index": list(range(N_EXAMPLES))},
        rows_per_shard=512,
        codec="raw",
    )
