"""Means of the classes of a column, compared with numpy, in finished and in unfinished archives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.store.edits.archive_values import class_members, mean_rows
from residua.store.encoding.codecs import decode_chunk
from residua.store.read import rows_in_shards
from residua.store.read.archive import Archive
from residua.store.selection.tokens import Selection, TokenSelector
from tests.analysis.rows_archive import write_rows

RNG = np.random.default_rng(0)
LENGTHS = tuple(RNG.integers(1, 9, 300).tolist())
N_ROWS, EXAMPLE = sum(LENGTHS), np.repeat(np.arange(300), LENGTHS)
LABEL = RNG.integers(0, 7, 300)
VALUES = RNG.standard_normal((N_ROWS, 6)).astype(np.float16)
SITE = "resid_post.0"


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    columns = {"label": LABEL.tolist()}
    return write_rows(tmp_path / "a.zarr", LENGTHS, {SITE: VALUES}, columns=columns, rows_per_shard=256, sealed=False)


def test_means_of_all_classes_are_those_of_numpy(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    members = class_members(archive.example_table, "label")
    n_decoded = 0

    def counting(*given: Any, **named: Any) -> None:
        nonlocal n_decoded
        n_decoded += 1
        decode_chunk(*given, **named)

    monkeypatch.setattr(rows_in_shards, "decode_chunk", counting)
    found = mean_rows(archive, SITE, list(members.values()))
    for label, mean in zip(members, found, strict=True):
        assert mean is not None
        np.testing.assert_allclose(mean, VALUES[LABEL[EXAMPLE] == label].astype(np.float64).mean(0), rtol=1e-12)
    assert 0 < n_decoded <= -(-N_ROWS // 256)  # a chunk once, and not for every example
    (mean,) = mean_rows(archive, SITE, [None])
    assert mean is not None
    np.testing.assert_allclose(mean, VALUES.astype(np.float64).mean(0), rtol=1e-12, atol=1e-15)


def test_rows_that_are_not_captured_are_left_out(archive: Archive) -> None:
    for shard in (1, 3):
        next((archive.path / "commits").glob(f"{shard:08d}*")).unlink()
    begun = Archive(archive.path)
    is_there = ~np.isin(np.arange(N_ROWS) // 256, (1, 3))
    members = class_members(begun.example_table, "label")
    for label, mean in zip(members, mean_rows(begun, SITE, list(members.values())), strict=True):
        assert mean is not None
        chosen = is_there & (LABEL[EXAMPLE] == label)
        np.testing.assert_allclose(mean, VALUES[chosen].astype(np.float64).mean(0), rtol=1e-12)
    (lost,) = np.unique(EXAMPLE[300:310])[-1:]
    assert mean_rows(begun, SITE, [[int(lost)]]) == [None]


@pytest.mark.parametrize("n_rows", [0, 1, 50, N_ROWS])
def test_many_rows_are_found_in_their_examples(archive: Archive, n_rows: int) -> None:
    wanted = RNG.permutation(N_ROWS)[:n_rows]
    selector = TokenSelector(archive)
    selection = Selection(rows=tuple(wanted.tolist()))
    found = np.concatenate([selector.tokens(selection, example) for example in range(len(LENGTHS))])
    assert np.flatnonzero(found).tolist() == sorted(wanted.tolist())
