"""The opening sections of docs/analysis.md, run as they stand there."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from tests.analysis.rows_archive import write_rows

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"
SECTIONS = ("Choosing rows", "Dask arrays", "Tables", "Batches for training")


def blocks_of(section: str) -> list[str]:
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_every_block_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (20,) * 60
    rows = np.random.default_rng(0).standard_normal((1200, 16)).astype(np.float32)
    columns: dict[str, list[object]] = {"label": ["prose", "code"] * 30, "label_number": [0, 1] * 30}
    write_rows(tmp_path / "acts.zarr", lengths, {"resid_post.2": rows}, columns=columns)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"residua": residua, "torch": torch}
    blocks = [block for section in SECTIONS for block in blocks_of(section)]
    for block in blocks:
        exec(block, names)  # noqa: S102  # the page's own code is what is tested
    assert len(blocks) == 6
    np.testing.assert_allclose(names["covariance"], np.cov(rows.T, bias=True), atol=1e-5)
    chosen = [row for row in range(1200) if row % 20 and row // 20 % 2]
    assert names["table"]["row"].to_pylist() == chosen
    assert names["two"]["row"].to_pylist() == [17, 4]
    assert names["n_rows"] == len(chosen)
    assert len(names["loader"]) == -(-1140 // 128)
    assert names["second"]["row"].tolist() != names["first"]["row"].tolist()
