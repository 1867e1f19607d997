"""Statistics compared with numpy in float64 over all rows at once, on values that need careful sums."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from residua.analysis.stats.site_stats import Stats
from residua.analysis.stats.stats import stats
from residua.analysis.support.cluster import connect
from residua.analysis.support.moments import Moments
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

LENGTHS = (70, 1, 30, 199, 5, 300)
N_ROWS = sum(LENGTHS)
POSITION = np.concatenate([np.arange(n) for n in LENGTHS])


def made_up() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((N_ROWS, 9)) @ rng.standard_normal((9, 9))
    plain[:, 4] *= 40  # an outlier
    plain[:, 6] = 3  # no variance
    heavy = rng.standard_t(3, (N_ROWS, 2, 3))
    heavy[5, 0, 1], heavy[5, 1, 1], heavy[400, 0, 0] = np.nan, np.inf, -np.inf
    return {
        "resid_post.0": plain.astype(np.float32),
        "resid_post.1": rng.normal(1e4, 1e-2, (N_ROWS, 5)),  # float64: a spread of 1e-6 of the mean
        "z.0": heavy.astype(np.float16),
    }


VALUES = made_up()
COLUMNS = ("channel", "mean", "variance", "kurtosis", "min", "max", "rms")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return write_rows(tmp_path_factory.mktemp("stats") / "a.zarr", LENGTHS, VALUES)


@pytest.fixture(scope="module")
def found(archive: Archive) -> Stats:
    return stats(archive, components=3, task_rows=100)


def rows_of(site: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the rows without NaN and infinity, and their positions."""
    rows = VALUES[site].reshape(N_ROWS, -1).astype(np.float64)
    finite = np.isfinite(rows).all(axis=1)
    return rows[finite], POSITION[finite]


def kurtosis(values: npt.NDArray[np.float64], axis: int | None = None) -> Any:
    centred = values - values.mean(axis=axis, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num((centred**4).mean(axis=axis) / (centred**2).mean(axis=axis) ** 2)


@pytest.mark.parametrize("site", VALUES)
def test_channels_are_numpys(found: Stats, site: str) -> None:
    rows, _ = rows_of(site)
    table = {name: found.channels[name].to_numpy()[found.channels["site"].to_numpy() == site] for name in COLUMNS}
    expected = {
        "mean": rows.mean(axis=0),
        "variance": rows.var(axis=0),
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "rms": np.sqrt((rows**2).mean(axis=0)),
    }
    assert table["channel"].tolist() == list(range(rows.shape[1]))
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], values, rtol=1e-10, atol=1e-15, err_msg=name)
    np.testing.assert_allclose(table["kurtosis"], kurtosis(rows, axis=0), rtol=1e-6)


@pytest.mark.parametrize("site", VALUES)
def test_sites_are_numpys(found: Stats, site: str) -> None:
    rows, _ = rows_of(site)
    line = next(line for line in found.sites.to_pylist() if line["site"] == site)
    norms = np.linalg.norm(rows, axis=1)
    expected = {
        "mean": rows.mean(),
        "variance": rows.var(),
        "kurtosis": kurtosis(rows),
        "row_kurtosis": kurtosis(rows, axis=1).mean(),
        "norm_mean": norms.mean(),
        "norm_std": norms.std(),
        "norm_max": norms.max(),
    }
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-6), name
    raw = VALUES[site].reshape(N_ROWS, -1)
    assert line["width"] == raw.shape[1]
    assert line["n_rows"] == N_ROWS
    assert line["n_nonfinite"] == (~np.isfinite(raw)).sum()
    assert line["n_nonfinite_rows"] == N_ROWS - len(rows)
    assert line["outlier_channels"] == ([4] if site == "resid_post.0" else [])


@pytest.mark.parametrize("site", VALUES)
def test_principal_components_are_numpys(found: Stats, site: str) -> None:
    rows, _ = rows_of(site)
    centred = rows - rows.mean(axis=0)
    _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
    line = next(line for line in found.sites.to_pylist() if line["site"] == site)
    np.testing.assert_allclose(line["component_shares"], (lengths**2 / (lengths**2).sum())[:3], rtol=1e-8)
    mine = found.components[site]
    assert (mine[np.arange(3), np.abs(mine).argmax(axis=1)] > 0).all()
    np.testing.assert_allclose(np.abs(mine @ directions[:3].T), np.eye(3), atol=1e-7)


def test_norms_by_position_are_numpys(found: Stats) -> None:
    for site in VALUES:
        rows, positions = rows_of(site)
        norms = np.linalg.norm(rows, axis=1)
        lines = [line for line in found.positions.to_pylist() if line["site"] == site]
        assert [line["position"] for line in lines] == np.unique(positions).tolist()
        for line in lines:
            mine = norms[positions == line["position"]]
            assert line["n_rows"] == len(mine)
            assert line["norm_mean"] == pytest.approx(mine.mean(), rel=1e-12)
            assert line["norm_std"] == pytest.approx(mine.std(), rel=1e-6, abs=1e-9 * mine.mean())


def test_a_filter_selects_rows(archive: Archive) -> None:
    found = stats(archive, "resid_post.0", where="position > 100", components=0, task_rows=100)
    rows, positions = rows_of("resid_post.0")
    np.testing.assert_allclose(found.channels["mean"], rows[positions > 100].mean(axis=0), rtol=1e-10)
    assert found.sites["n_rows"].to_pylist() == [(positions > 100).sum()]
    assert found.components == {}
    assert found.sites["component_shares"].to_pylist() == [None]


def test_a_pattern_means_the_sites_that_a_download_has(archive: Archive, tmp_path: Path) -> None:
    shutil.copytree(archive.path, tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr/sites/resid_post")
    assert stats(tmp_path / "a.zarr", "*").sites["site"].to_pylist() == ["z.0"]


def test_a_site_too_wide_for_the_memory_has_no_components(archive: Archive) -> None:
    with connect("inline", memory_limit=8 * 8 * 7**2) as cluster:
        found = stats(archive, cluster=cluster, task_rows=100)
    assert found.components.keys() == {"resid_post.1", "z.0"}
    assert found.sites["component_shares"].is_null().to_pylist() == [True, False, False]
    assert len(found.channels) == 9 + 5 + 6


def test_it_is_saved(found: Stats, tmp_path: Path) -> None:
    found.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    for name in ("sites", "channels", "positions"):
        assert pq.read_table(folder / f"{name}.parquet").equals(getattr(found, name))
    components = load_file(folder / "components.safetensors")
    assert components.keys() == found.components.keys()
    for site, directions in found.components.items():
        np.testing.assert_array_equal(components[site], directions)


def test_nothing_to_compute_with_is_an_error(archive: Archive) -> None:
    with pytest.raises(AnalysisError, match=r"no row.* filter"):
        stats(archive, "resid_post.0", where="position > 5000")
    with pytest.raises(AnalysisError, match="'postion'"):
        stats(archive, where="postion > 3")


def test_careless_sums_would_not_do() -> None:
    """Sums of squares before the mean is subtracted fail for a mean of 1e4; `Moments` does not."""
    rows = VALUES["resid_post.1"]
    careless = (rows**2).mean(axis=0) - rows.mean(axis=0) ** 2
    assert (np.abs(careless / rows.var(axis=0) - 1) > 1e-6).any()
    moments = Moments(5)
    for start in range(0, N_ROWS, 7):
        moments.add(rows[start : start + 7])
    np.testing.assert_allclose(moments.scatter / N_ROWS, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-13)
