"""Sites as Dask arrays, compared with numpy over the same rows."""

import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from dask import array as da

import residua
from residua.analysis.rows.dask_array import array
from residua.store.base.errors import NotCapturedError, UnknownSiteError
from residua.store.read.archive import Archive
from tests.analysis.large_archive import make_empty, make_large
from tests.stopped import take_back
from tests.store.small_archive import N_ROWS, make_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(make_archive(tmp_path_factory.mktemp("arrays") / "acts.zarr"))


def compute(values: Any) -> Any:
    return values.compute(scheduler="threads", num_workers=2)


@pytest.mark.parametrize("site", ["resid_post.0", "q.1"])
def test_an_array_is_the_site(archive: Archive, site: str) -> None:
    lazy, stored = residua.analysis.array(archive, site), archive[site]
    assert isinstance(lazy, da.Array)
    assert lazy.shape == stored.shape
    assert lazy.dtype == stored.dtype
    assert lazy.chunks == ((16, 16, 6), *((size,) for size in stored.shape[1:]))
    np.testing.assert_array_equal(compute(lazy), stored[:])
    np.testing.assert_array_equal(compute(lazy[10:35:3]), stored[10:35:3])
    np.testing.assert_array_equal(compute(lazy[[30, 2, 2]]), stored[[30, 2, 2]])


def test_a_gram_matrix_is_that_of_numpy(archive: Archive) -> None:
    acts: Any = array(archive, "resid_post.0", dtype=np.float64)
    values = archive["resid_post.0"][:].astype(np.float64)
    np.testing.assert_allclose(compute(acts.T @ acts), values.T @ values, rtol=1e-13)
    np.testing.assert_allclose(compute(acts.mean(axis=0)), values.mean(axis=0), rtol=1e-13, atol=1e-15)


def test_bfloat16_becomes_float32_unless_asked_for(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((64, 8), np.float32).astype(ml_dtypes.bfloat16)
    archive = make_large(tmp_path / "acts.zarr", values.view(np.uint16), 2, dtype="bfloat16")
    wide, narrow = (array(archive, "resid_post.0", dtype=dtype) for dtype in (None, ml_dtypes.bfloat16))
    assert (wide.dtype, narrow.dtype) == (np.float32, archive["resid_post.0"].stored_dtype)
    expected = np.concatenate([values, values])
    np.testing.assert_array_equal(compute(wide), expected.astype(np.float32))
    np.testing.assert_array_equal(compute(narrow).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_moments_of_a_hundred_thousand_rows_are_those_of_float64(dtype: str, tmp_path: Path) -> None:
    """A mean far from zero, where sums in half precision stop growing or overflow."""
    rng = np.random.default_rng(2)
    values = rng.standard_normal((4096, 8)).astype(np.float32) * [1, 1, 3, 3, 100, 100, 0.01, 2] + [
        5,
        60,
        0,
        9,
        0,
        900,
        0,
        1,
    ]
    narrow = values.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else values.astype(dtype)
    stored = narrow.view(np.uint16) if dtype == "bfloat16" else narrow
    archive = make_large(tmp_path / "acts.zarr", stored, 25, codec="raw", dtype=dtype)
    acts: Any = residua.analysis.array(archive, "resid_post.0")
    assert (acts.dtype, len(acts)) == (np.float32, 102_400)
    right = np.tile(narrow.astype(np.float64), (25, 1))
    np.testing.assert_allclose(compute(acts.mean(axis=0)), right.mean(0), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(compute(acts.std(axis=0)), right.std(0), rtol=1e-4)
    np.testing.assert_allclose(compute(acts.sum(axis=0)), right.sum(0), rtol=1e-4, atol=50)
    centred = acts - acts.mean(axis=0)
    covariance, expected = compute(centred.T @ centred) / len(acts), np.cov(right.T, bias=True)
    np.testing.assert_allclose(covariance, expected, atol=1e-4 * expected.max())


def test_ten_thousand_shards_make_a_small_graph_that_reads_nothing(tmp_path: Path) -> None:
    archive = make_empty(tmp_path / "acts.zarr", 10_000)
    acts: Any = array(archive, "resid_post.0")
    gram = acts.T @ acts
    assert (acts.npartitions, acts.dtype, gram.shape) == (10_000, np.float32, (512, 512))
    assert len(pickle.dumps(acts)) < 100_000
    assert not list(archive.path.glob("sites/**/c"))  # there is no shard that could have been read


def test_rows_that_are_not_captured_raise_on_computing_only(tmp_path: Path) -> None:
    path = make_archive(tmp_path / "acts.zarr")
    take_back(path, 1)
    acts = array(Archive(path), "q.1")
    assert acts.shape == (N_ROWS, 2, 4)
    assert compute(acts[:16]).shape == (16, 2, 4)
    with pytest.raises(NotCapturedError, match=r"16 "):
        compute(acts)


def test_a_site_must_be_one_of_the_archive(archive: Archive) -> None:
    with pytest.raises(UnknownSiteError):
        array(archive, "resid_post.7")


def test_arrays_of_other_content_have_other_names(tmp_path: Path) -> None:
    first, second = (Archive(make_archive(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 1)))
    names = {array(archive, site).name for archive in (first, second) for site in archive}
    names |= {array(first, "q.1", dtype="float64").name, array(Archive(first.path), "q.1").name}
    assert len(names) == 5
