"""How well a loader mixes compared with a full shuffle, as `docs/loader.md` claims.

The worst case for a block shuffle is a dataset that changes so slowly that all rows of a block are alike. With K blocks
in the buffer and batches of B rows, the mean of a batch then varies as the mean of B rows drawn from K random blocks:
about 1 + B/K times the variance of a full shuffle.
"""

import numpy as np
import numpy.typing as npt
import pytest

from residua.analysis.loader.loader import Loader
from residua.store.read.archive import Archive
from tests.analysis.large_archive import make_large

N_ROWS = 2**15
WIDTH = 8
BLOCK = 16
SIZE = 128
EPOCHS = 8
REGIONS = 8  # equal pieces of the archive, used as classes


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    values = np.zeros((N_ROWS // 4, WIDTH), np.float32)
    return make_large(tmp_path_factory.mktemp("mixing") / "acts.zarr", values, 4)


def make(archive: Archive, *, share: float, shuffle: bool = True) -> Loader:
    """Return a loader whose buffer holds `share` of the archive, in blocks of 16 rows."""
    buffer_bytes = int(share * N_ROWS) * (4 * WIDTH + 16)
    return archive.loader(
        "resid_post.0",
        batch_size=SIZE,
        shuffle=shuffle,
        buffer_bytes=buffer_bytes,
        raw_block_bytes=BLOCK * 4 * WIDTH,
    )


def epochs(loader: Loader) -> npt.NDArray[np.int64]:
    """Return the row numbers of some epochs: (epochs, batches, rows of a batch)."""
    found = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        found.append(np.stack([batch["row"].numpy() for batch in loader]))
    return np.stack(found)


def variance_ratio(rows: npt.NDArray[np.int64]) -> float:
    """Return the variance of batch means of the row number, in units of that of a full shuffle."""
    of_rows = (N_ROWS**2 - 1) / 12
    full = of_rows / SIZE * (1 - (SIZE - 1) / (N_ROWS - 1))
    return float(((rows.mean(axis=-1) - (N_ROWS - 1) / 2) ** 2).mean() / full)


def class_ratio(rows: npt.NDArray[np.int64]) -> float:
    """Return the chi-squared statistic of the classes in a batch, over its degrees of freedom."""
    regions = rows // (N_ROWS // REGIONS)
    counts = (regions[..., None] == np.arange(REGIONS)).sum(axis=-2)
    expected = SIZE / REGIONS
    return float(((counts - expected) ** 2 / expected).sum(axis=-1).mean() / (REGIONS - 1))


def correlations(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return for each epoch the correlation of the row numbers with their places in the epoch."""
    places = np.arange(N_ROWS)
    return np.array([np.corrcoef(places, epoch.reshape(-1))[0, 1] for epoch in rows])


@pytest.mark.parametrize("share", [1, 1 / 8, 1 / 32])
def test_batches_vary_as_the_formula_says(archive: Archive, share: float) -> None:
    rows = epochs(make(archive, share=share))
    n_blocks = N_ROWS // BLOCK
    in_buffer = share * n_blocks
    expected = 1 + SIZE / in_buffer * (1 - in_buffer / n_blocks)
    assert variance_ratio(rows) == pytest.approx(expected, rel=0.15)
    assert class_ratio(rows) == pytest.approx(expected, rel=0.15)
    assert np.abs(correlations(rows)).max() < 4 / np.sqrt(n_blocks)


def test_without_shuffling_the_same_figures_are_far_off(archive: Archive) -> None:
    rows = epochs(make(archive, share=1 / 8, shuffle=False))
    assert variance_ratio(rows) > 100
    assert class_ratio(rows) > 100
    assert correlations(rows).min() > 0.99
