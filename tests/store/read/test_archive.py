"""Reading an archive: every way to select rows gives what numpy gives on the same rows."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import residua
from residua.pipelines.capture.capture import capture_dataset
from residua.store.base.errors import NotCapturedError, UnknownSiteError
from residua.store.read.archive import Archive
from tests.analysis.large_archive import make_large
from tests.models.tiny import TINY, VOCABULARY
from tests.plain_zarr import plain_array
from tests.stopped import take_back
from tests.store.small_archive import make_archive

N_ROWS = 100


@pytest.fixture(scope="module", params=["raw", "fast"])
def archive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    rng = np.random.default_rng(0)
    data = [rng.integers(3, VOCABULARY, 20).tolist() for _ in range(N_ROWS // 20)]
    out = tmp_path_factory.mktemp(request.param) / "a.zarr"
    options = {"sites": "resid_post.*,z.1", "dtype": "bfloat16", "rows_per_shard": 32, "codec": request.param}
    return capture_dataset(TINY["llama"](), data, out=out, **options).archive


@pytest.fixture(scope="module")
def values(archive: Archive) -> np.ndarray[Any, Any]:
    """All rows of one site by another reader, which is told nothing of bfloat16 but its bits."""
    bits = plain_array(archive.path, "sites/resid_post/1").view(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def same(found: Any, expected: Any) -> bool:
    return found.dtype == expected.dtype and np.array_equal(found.view(np.uint32), expected.view(np.uint32))


selections = st.one_of(
    st.slices(N_ROWS),
    st.lists(st.integers(-N_ROWS, N_ROWS - 1), max_size=30),
    st.lists(st.booleans(), min_size=N_ROWS, max_size=N_ROWS).map(np.array),
    st.integers(-N_ROWS, N_ROWS - 1),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=selections)
def test_rows_are_chosen_as_in_numpy(archive: Archive, values: np.ndarray[Any, Any], rows: Any) -> None:
    wanted = np.array(rows, dtype=int) if isinstance(rows, list) else rows
    assert same(archive["resid_post.1"][rows], values[wanted])


@pytest.mark.parametrize("codec", ["raw", "int8-block32"])
def test_no_rows_may_be_chosen(codec: str, tmp_path: Path) -> None:
    stored = Archive(make_archive(tmp_path / "a.zarr", codec))["q.1"]
    assert stored[[]].shape == stored[0:0].shape == stored[5:3].shape == (0, 2, 4)


def test_further_indices_apply_to_the_rows(archive: Archive, values: np.ndarray[Any, Any]) -> None:
    stored = archive["resid_post.1"]
    assert same(stored[10:20, 3], values[10:20, 3])
    assert same(stored[[5, 1], 2:7], values[[5, 1], 2:7])
    assert same(stored[7, 2:7], values[7, 2:7])
    assert archive["z.1"][4, 2].shape == (8,)


def test_stored_values_bits_and_torch_on_request(archive: Archive, values: np.ndarray[Any, Any]) -> None:
    stored = archive["resid_post.1"]
    assert (stored.dtype, stored.stored_dtype) == (np.float32, ml_dtypes.bfloat16)
    narrow = stored.numpy([3, 1], dtype=stored.stored_dtype)
    assert narrow.dtype == ml_dtypes.bfloat16
    assert np.array_equal(stored.bits([3, 1]), values[[3, 1]].view(np.uint32) >> 16)
    assert np.array_equal(stored.bits([3, 1]), narrow.view(np.uint16))
    assert stored.numpy(7, dtype="float64").dtype == np.float64
    assert stored.torch([3, 1]).dtype == torch.bfloat16
    assert np.array_equal(stored.torch(slice(0, 9), dtype=torch.float32).numpy(), values[:9])
    assert np.array_equal(np.asarray(stored), values)
    with pytest.raises(TypeError, match=r"resid_post\.1 .*bits"):
        stored.numpy([3, 1], dtype="uint16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("codec", ["raw", "fast", "int8-block32"])
def test_sums_over_rows_are_those_of_float64(codec: str, dtype: str, tmp_path: Path) -> None:
    """A thousand rows with a mean of 10 and a channel of 60,000: summed in the stored type, all of this is wrong."""
    rows = np.random.default_rng(1).standard_normal((1024, 64), np.float32) + 10
    rows[:, 33] = 60_000
    stored: Any = {
        "bfloat16": rows.astype(ml_dtypes.bfloat16).view(np.uint16),
        "float16": rows.astype(np.float16),
        "float32": rows,
    }[dtype]
    archive = make_large(tmp_path / "a.zarr", stored, 2, dtype=dtype, codec=codec)
    site = archive["resid_post.0"]
    right = site.torch().double().numpy()
    for found in (site[:], np.asarray(site), site[[5, 3]], site[2000:], site[7], site[5, 3:]):
        assert found.dtype == np.float32
    plain: Any = archive.group["sites/resid_post/0"]
    sums: list[Any] = [site[:]] if codec == "int8-block32" else [site[:], plain[:]]
    for found in sums:
        np.testing.assert_allclose(found.mean(0), right.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.std(0), right.std(0), rtol=1e-3, atol=0.1)
        np.testing.assert_allclose(found.T @ found, right.T @ right, rtol=1e-4)
    assert site.bits().dtype == np.dtype(f"u{stored.itemsize}")


@pytest.mark.parametrize("rows", [[N_ROWS], [-N_ROWS - 1], N_ROWS, [True] * 3, [0.5], "abc", [[1]]])
def test_rows_that_do_not_exist_are_an_index_error(archive: Archive, rows: Any) -> None:
    with pytest.raises(IndexError, match=r"resid_post\.1"):
        archive["resid_post.1"][rows]


def test_an_unknown_site_lists_the_stored_ones(archive: Archive) -> None:
    with pytest.raises(UnknownSiteError, match=r"resid_pots\.1"):
        archive["resid_pots.1"]
    assert "resid_pots.1" not in archive
    assert list(archive) == list(archive.sites)


def test_text_without_a_tokenizer_says_so(archive: Archive) -> None:
    with pytest.raises(residua.ResiduaError, match="no tokenizer"):
        archive.text(3)


@pytest.fixture
def unfinished(tmp_path: Path) -> Archive:
    """An archive whose third shard was never captured."""
    data = [[5 + i] * 20 for i in range(5)]
    out = tmp_path / "a.zarr"
    capture_dataset(TINY["llama"](), data, out=out, sites="embed", rows_per_shard=32)
    take_back(out, 2)
    return Archive(out)


def test_rows_that_are_not_captured_are_never_zeros(unfinished: Archive) -> None:
    assert not unfinished.is_sealed
    assert unfinished.progress == (68, 100, 3, 4)
    assert unfinished["embed"][0:64].shape == (64, 32)
    assert unfinished["embed"][[99, 0]].shape == (2, 32)
    for rows in (slice(60, 65), [70], slice(None), 64):
        with pytest.raises(NotCapturedError, match="not captured yet"):
            unfinished["embed"][rows]


def test_an_example_of_an_open_archive_is_complete_or_not_captured(tmp_path: Path) -> None:
    model, out = TINY["llama"](), tmp_path / "a.zarr"

    def record() -> None:
        with residua.Recorder(model, sites="embed", out=out, rows_per_shard=8), torch.no_grad():
            for _ in range(3):
                model(torch.full((1, 6), 5))
            raise KeyError("the user's own")

    with pytest.raises(KeyError):
        record()
    archive = Archive(out)
    assert archive.n_rows == 16
    assert [len(archive.example(i)["embed"]) for i in (0, 1)] == [6, 6]
    with pytest.raises(NotCapturedError, match=r"example 2 .* rows 12 to 18"):
        archive.example(2)


def test_text_shows_the_token_in_its_context(tmp_path: Path) -> None:
    texts = ["def f(x): return x", "class A: pass"]
    archive = capture_dataset("models/pydoc-1m", texts, out=tmp_path / "a.zarr", sites="resid_post.0").archive
    assert "".join(archive.text(row, context=0).strip("«»") for row in range(archive.n_rows)) == "".join(texts)
    assert archive.text(0, context=100).replace("«", "").replace("»", "") == texts[0]
    with pytest.raises(IndexError, match=rf"row 1,000,000 .* has {archive.n_rows} rows"):
        archive.text(10**6)
