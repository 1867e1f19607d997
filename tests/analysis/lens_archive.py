"""A small archive with an LM head: random tokens through a tiny model, with examples of several lengths."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from residua.analysis.rows.held_out import held_out_groups
from residua.pipelines.capture.capture import capture_dataset
from residua.store.read.archive import Archive
from tests.models.tiny import TINY, VOCABULARY

N_EXAMPLES = 80


def examples(n_examples: int = N_EXAMPLES) -> list[list[int]]:
    """Return token ids that follow a few rules, so that there is something to predict."""
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 5, (n_examples, 40)).cumsum(1) + rng.integers(0, 90, (n_examples, 1))
    return [(3 + row[: 24 + number % 9] % (VOCABULARY - 3)).tolist() for number, row in enumerate(steps)]


def make_lens_archive(
    path: Path, model: str = "llama", sites: str = "resid_post.*", rows_per_shard: int = 512
) -> Archive:
    """Capture the examples with a tiny model into `path`, and open the archive."""
    capture_dataset(TINY[model](), examples(), out=path, sites=sites, rows_per_shard=rows_per_shard)
    return Archive(path)


def is_late(archive: Archive) -> npt.NDArray[np.bool_]:
    """Return for each row whether a lens uses it: a lens skips the first row of an example."""
    return archive.rows.position[:].astype(np.int64) > 0


def held_out_rows(archive: Archive) -> npt.NDArray[np.int64]:
    """Return the rows that evaluate a lens."""
    is_held = held_out_groups(np.arange(N_EXAMPLES), fraction=0.1)[archive.rows.example[:].astype(np.int64)]
    return np.flatnonzero(is_held & is_late(archive))
