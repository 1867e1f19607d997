"""The opening sections of docs/analysis.md, run as they stand there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from tests.analysis.rows_archive import write_rows
from tests.pages import blocks, run

SECTIONS = ("Choosing rows", "Dask arrays", "Tables", "Batches for training")


def test_every_block_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (20,) * 60
    rows = np.random.default_rng(0).standard_normal((1200, 16)).astype(np.float32)
    columns: dict[str, list[object]] = {"title": ["async", "class"] * 30, "source_index": [*range(60)]}
    write_rows(tmp_path / "acts.zarr", lengths, {"resid_post.2": rows}, columns=columns)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"residua": residua, "torch": torch}
    code = blocks("docs/analysis.md", *SECTIONS)
    assert len(code) == 6
    run(code, names)
    np.testing.assert_allclose(names["covariance"], np.cov(rows.T, bias=True), atol=1e-5)
    chosen = [row for row in range(1200) if row % 20 and row // 20 % 2]
    assert names["table"]["row"].to_pylist() == chosen
    assert names["two"]["row"].to_pylist() == [17, 4]
    assert names["n_rows"] == len(chosen)
    assert len(names["loader"]) == -(-1140 // 128)
    assert names["second"]["row"].tolist() != names["first"]["row"].tolist()
