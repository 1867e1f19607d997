"""An archive in xarray, with `to_xarray` and without us: every value equal, and absent rows never zero."""

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from zarr.storage import LocalStore

from residua.store.base.errors import NotCapturedError, PlanError, UnknownSiteError
from residua.store.format.dimensions import dimension_names
from residua.store.format.plan import Plan, SitePlan
from residua.store.read.archive import Archive
from residua.store.sealing.seal import pack
from tests.stopped import take_back
from tests.store.small_archive import HEIGHT, N_ROWS, make_archive

FIXTURES = Path(__file__).parents[2] / "fixtures/format-1.0"
SITES = {"resid_post.0": ("row", "d_model"), "q.1": ("row", "head", "d_head")}


@pytest.mark.parametrize("codec", ["raw", "fast", "bitround10"])
def test_the_dataset_has_every_site_and_the_row_columns(codec: str, tmp_path: Path) -> None:
    archive = Archive(make_archive(tmp_path / "a.zarr", codec))
    found = archive.to_xarray()
    assert {name: found[name].dims for name in found} == SITES
    for name in SITES:
        assert np.array_equal(found[name].values, archive[name][:])
    for name in ("token", "position", "example"):
        column = getattr(archive.rows, name)
        assert np.array_equal(found[name].values, column[:])
    chosen = found.where(found.position == 0, drop=True)
    assert chosen.sizes["row"] == 4
    assert np.array_equal(archive.to_xarray("q.*")["q.1"][20:30, 1], archive["q.1"][20:30, 1])
    assert np.array_equal(found.chunk({"row": archive.plan.rows_per_shard})["q.1"].data.compute(), archive["q.1"][:])
    with pytest.raises(UnknownSiteError):
        archive.to_xarray("z.*")


def test_archives_of_format_1_0_have_named_axes_too() -> None:
    archive = Archive(FIXTURES / "raw.archive")
    found = archive.to_xarray()
    assert all(found[name].dims[0] == "row" for name in archive.sites)
    for name in archive.sites:
        assert found[name].dtype == archive[name].dtype
        assert np.array_equal(found[name].values, archive[name][:])
    with pytest.raises(PlanError, match="codes and scales"):
        Archive(FIXTURES / "int8-block32.archive").to_xarray()


def test_rows_that_are_not_captured_are_an_error_in_the_dataset(tmp_path: Path) -> None:
    path = make_archive(tmp_path / "a.zarr")
    take_back(path, 1)
    found = Archive(path).to_xarray()["q.1"]
    assert np.isfinite(found[:HEIGHT].values).all()
    with pytest.raises(NotCapturedError):
        _ = found[HEIGHT : HEIGHT + 1].values


def test_xarray_opens_groups_and_the_tree_without_us_and_without_a_listing(
    untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Any:
        raise AssertionError("a folder was listed")

    archive = Archive(untouched)
    for method in ("list", "list_dir", "list_prefix"):
        monkeypatch.setattr(LocalStore, method, refuse)
    rows = xarray.open_zarr(untouched, group="rows")
    assert np.array_equal(rows.position.values, archive.rows.position[:])
    site = xarray.open_zarr(untouched, group="sites/resid_post", chunks=None)
    assert site["0"].dims == ("row", "d_model")
    assert np.array_equal(site["0"][5:9].values, archive["resid_post.0"][5:9])
    group: Any = zarr.open_consolidated(untouched)
    assert np.array_equal(group["sites/q/1"][:], archive["q.1"][:])
    tree = xarray.open_datatree(untouched, engine="zarr")
    assert tree["sites/q"].sizes == {"row": N_ROWS, "head": 2, "d_head": 4}
    values: Any = tree["sites/q/1"].values
    assert np.array_equal(values, archive["q.1"][:])


@pytest.mark.parametrize("pipeline", ["zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs.ZarrsCodecPipeline"])
def test_a_stranger_sees_absent_rows_as_nan(pipeline: str, tmp_path: Path) -> None:
    path = make_archive(tmp_path / "a.zarr")
    for file in ("sites/q/1/c/1/0/0", "rows/token/c/1", "rows/example/c/1"):
        (path / file).unlink()
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        found: Any = zarr.open_group(path, mode="r")
        assert np.isnan(found["sites/q/1"][:]).all(axis=(1, 2)).tolist() == [HEIGHT <= i < 32 for i in range(N_ROWS)]
        for name in ("token", "example"):
            assert (found[f"rows/{name}"][HEIGHT:32] == -1).all()
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "sites/q/1")}}
    opened = tensorstore.open(spec, open=True, read=True).result()
    assert np.isnan(opened.read().result()[HEIGHT:32]).all()
    assert opened.domain.labels == ("row", "head", "d_head")


def test_bfloat16_has_nan_too(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    shutil.copytree(FIXTURES / "fast.archive", path)
    pack(path)
    plan = Archive(path).plan
    shutil.rmtree(path / plan.sites[0].path / "c/1")
    array: Any = zarr.open_array(path / plan.sites[0].path, mode="r")
    found = np.asarray(array[:])
    assert found.dtype == ml_dtypes.bfloat16
    lost = np.isnan(found.astype(np.float32)).reshape(len(found), -1).all(axis=1)
    assert lost.tolist() == [i // plan.rows_per_shard == 1 for i in range(len(found))]


def site(name: str, *shape: int, codec: str = "fast") -> SitePlan:
    return SitePlan(name=name, row_shape=shape, dtype="float32", codec=codec)


def test_an_axis_of_one_name_has_one_size() -> None:
    sites = [
        site("resid_post.0", 64),
        site("q.0", 4, 16),
        site("q.1", 8, 16),
        site("k.0", 2, 16, codec="int8-block32"),
        site("pattern.0", 4, 100),
        site("mlp_act.0", 64),
        site("mlp_act.1", 99),
        site("logits", 500),
        site("logits_top8.values", 8),
        site("module:a.b@output", 3, 7),
        site("module:c@output", 9),
    ]
    plan = Plan(model={}, dataset={}, rules={}, sites=tuple(sites), rows_per_shard=8)
    names = dimension_names(plan)
    assert names["sites/q/1"] == ("row", "head_8", "d_head")
    assert names["sites/k/0"] == ("row", "key_head", "d_head")
    assert names["scales/k/0"] == ("row", "key_head", "block_of_d_head")
    assert names["sites/mlp_act/1"] == ("row", "d_mlp_99")
    assert names["sites/module/c@output"] == ("row", "axis_1_9")
    assert names["rows/token"] == ("row",)
    sizes: dict[str, int] = {}
    for spec in plan.arrays:
        assert len(names[spec.path]) == 1 + len(spec.row_shape)
        for name, size in zip(names[spec.path][1:], spec.row_shape, strict=True):
            assert sizes.setdefault(name, size) == size
