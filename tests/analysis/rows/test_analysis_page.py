"""The code of the pages about analyses, run as it stands there."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

import residua
from tests.analysis.rows_archive import write_rows
from tests.pages import blocks, run


def test_rows_arrays_tables_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (20,) * 60
    rows = np.random.default_rng(0).standard_normal((1200, 16)).astype(np.float32)
    columns: dict[str, list[object]] = {"title": ["async", "class"] * 30, "source_index": [*range(60)]}
    write_rows(tmp_path / "acts.zarr", lengths, {"resid_post.2": rows}, columns=columns)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    run(blocks("docs/analysis.md"), names)
    run(blocks("docs/loader.md"), names)
    np.testing.assert_allclose(names["covariance"], np.cov(rows.T, bias=True), atol=1e-5)
    selected = [row for row in range(1200) if row % 20 and row // 20 % 2]
    assert names["table"]["row"].to_pylist() == selected
    assert names["two"]["row"].to_pylist() == [17, 4]
    assert names["n_rows"] == len(selected)
    assert len(names["loader"]) == -(-1140 // 128)
    assert names["second"]["row"].tolist() != names["first"]["row"].tolist()


def test_the_page_of_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    columns: dict[str, list[object]] = {"source_index": [i // 2 for i in range(80)]}
    write_rows(tmp_path / "acts.zarr", (5,) * 80, {"resid_post.2": rows}, columns=columns)
    lines = [f"{i},{i % 2 == 0},{i / 40}" for i in range(40)]
    (tmp_path / "judge.csv").write_text("\n".join(["source_index,toxic,judge_score", *lines]))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"residua": residua, "pandas": pandas}
    code = blocks("docs/labels.md")
    assert len(code) == 2
    run(code, names)
    assert names["table"]["toxic"].to_pylist() == [i // 10 % 2 == 0 for i in range(210, 400)]
    assert names["best"]["judge_score"].to_pylist() == [row // 10 / 40 for row in names["best"]["row"].to_pylist()]


def test_probes_statistics_and_top_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths, label = (20,) * 60, np.arange(60) % 2
    rows = rng.standard_normal((3, 1200, 16)).astype(np.float32)
    rows[2, :, 3] += 4 * np.repeat(label, 20)
    rows[2, :, 4] += np.tile(np.arange(20), 60)
    sites = {f"resid_post.{layer}": rows[layer] for layer in range(3)}
    write_rows(tmp_path / "acts.zarr", lengths, sites, columns={"title": [["class", "async"][i] for i in label]})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    run(blocks("docs/probes.md"), names)
    run(blocks("docs/stats.md"), names)
    assert names["table"]["accuracy"].to_pylist()[2] > 0.9
    assert names["same"].score(names["rows"], names["labels"]) > 0.9
    assert names["ridge"].score(rows[2], np.tile(np.arange(20), 60)) > 0.9
    assert names["found"].components["resid_post.2"].shape == (8, 16)
    assert {int(label[example]) for example in names["best"]["example"].to_pylist()} == {0}
