"""Prefetched rows are the ones that are read later, and only a limited number is kept."""

from pathlib import Path

import numpy as np
import pytest
import torch

from residua.capture.edits.action import StoredRows
from residua.store.base.errors import DamagedArchiveError
from residua.store.read.archive import Archive
from tests.store.small_archive import N_ROWS, make_archive

SITE = "resid_post.0"


def test_rows_are_read_as_stored_prefetched_or_not(tmp_path: Path) -> None:
    archive = Archive(make_archive(tmp_path / "a.zarr"))
    rows = StoredRows(archive)
    asked = [np.random.default_rng(seed).integers(0, N_ROWS, 7) for seed in range(12)]
    for one in asked:
        rows.prefetch(SITE, one)
    for one in reversed(asked):  # in another order; the oldest were dropped
        for _ in range(2):
            assert torch.equal(rows.read(SITE, one), torch.from_numpy(np.asarray(archive[SITE], np.float32)[one]))
    rows.close()


def test_a_failure_is_raised_when_the_rows_are_read(tmp_path: Path) -> None:
    archive = Archive(make_archive(tmp_path / "a.zarr"))
    (tmp_path / "a.zarr" / "sites" / "resid_post" / "0" / "c" / "0" / "0").unlink()
    rows = StoredRows(archive)
    rows.prefetch(SITE, np.arange(3))
    with pytest.raises(DamagedArchiveError, match="c/0/0"):
        rows.read(SITE, np.arange(3))
    rows.close()
