"""Exported rows, read with the programs that they are for."""

from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

import residua
from residua.pipelines.cli.main import main
from residua.pipelines.copies.export import VECTOR
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from tests.store.small_archive import N_ROWS, make_archive

FROZEN = Path(__file__).parents[2] / "fixtures/format-1.0"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(make_archive(tmp_path_factory.mktemp("source") / "a.zarr"))


export = partial(residua.export, batch_bytes=2000, part_bytes=3000)


def keep_of(archive: Archive, rows: str | None) -> Any:
    position: Any = archive.rows.position[:]
    return np.flatnonzero(position > 2) if rows else np.arange(archive.n_rows)


@pytest.mark.parametrize("rows", [None, "position > 2"])
def test_parquet_of_one_site_has_one_vector_column(rows: str | None, source: Archive, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    out = export(
        source, tmp_path / "a.parquet", to="parquet", sites="resid_post.0", rows=rows, on_row=lambda *s: steps.append(s)
    )
    found, keep = pq.read_table(out), keep_of(source, rows)
    assert np.array_equal(np.stack(found[VECTOR].to_numpy()), source["resid_post.0"][keep])
    assert found["row"].to_pylist() == keep.tolist()
    assert found["token"].to_pylist() == source.rows.token[keep].tolist()
    assert found["token_text"][0].as_py().startswith("w")
    assert set(found["label"].to_pylist()) <= {f"example {i}" for i in range(4)}
    assert steps[-1] == (len(keep), len(keep))
    assert len(steps) > 2


def test_parquet_of_several_sites_names_them(source: Archive, tmp_path: Path) -> None:
    found = pq.read_table(export(source, tmp_path / "a.parquet", to="parquet"))
    assert np.array_equal(np.array(found["q.1"].to_pylist(), np.float32), source["q.1"][:])
    assert "resid_post.0" in found.column_names


def test_a_folder_for_datasets(source: Archive, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out = Path(export(source, tmp_path / "d", to="hf", sites="resid_post.0", rows="position > 2"))
    found = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(list((out / "data").iterdir())) > 1
    assert np.array_equal(np.array(found[VECTOR], np.float32), source["resid_post.0"][keep_of(source, "x")])
    assert source.plan.digest in (out / "README.md").read_text()


@pytest.mark.parametrize("name", ["raw", "int8-block32"])
def test_safetensors_keep_the_stored_type(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = Archive(FROZEN / f"{name}.archive")
    out = export(source, tmp_path / "a.safetensors", to="safetensors", rows="position > 2")
    keep = keep_of(source, "x")
    with safe_open(out, "pt") as file:
        for site in source.sites:
            assert torch.equal(file.get_tensor(site), source[site].torch(keep))
        assert file.get_tensor("row").tolist() == keep.tolist()
        assert file.get_tensor("token").tolist() == source.rows.token[keep].tolist()
        assert file.metadata() == {"plan": source.plan.digest}


@pytest.mark.parametrize("rows", [None, "position > 2"])
def test_npy_opens_as_a_memory_map(rows: str | None, tmp_path: Path) -> None:
    source = Archive(FROZEN / "raw.archive")
    out, keep = Path(export(source, tmp_path / "d", to="npy", rows=rows)), keep_of(source, rows)
    for site in source.sites:
        found = np.load(out / f"{site}.npy", mmap_mode="r", allow_pickle=False)
        assert np.array_equal(found, source[site][keep])
        stored = source[site].stored_dtype
        assert found.dtype == (np.float32 if stored == ml_dtypes.bfloat16 else stored)
    assert np.array_equal(np.load(out / "position.npy"), source.rows.position[keep])


def test_what_cannot_be_written_is_refused(source: Archive, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError):
        export(source, tmp_path / "there", to="npy")
    with pytest.raises(PlanError, match="parquet, safetensors"):
        export(source, tmp_path / "x", to="csv")  # type: ignore[arg-type]  # the mistake
    with pytest.raises(PlanError, match="another condition"):
        export(source, tmp_path / "x", to="npy", rows="position > 99")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_command(source: Archive, tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    words = ["export", str(source.path), "--out", str(out), "--to", "parquet", "--sites", "q.1"]
    assert main(words) == 0
    assert pq.read_metadata(out).num_rows == N_ROWS
    assert main(words) == 2
