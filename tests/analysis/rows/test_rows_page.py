"""The sections of docs/analysis.md on probes, statistics and top rows, run as they stand there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.analysis.probes.logistic import Basis, Problem, fit_logistic
from residua.analysis.support.moments import Moments
from tests.analysis.rows_archive import write_rows
from tests.pages import blocks, run

SECTIONS = ("Probes", "Statistics", "Top rows")


def test_every_block_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths, label = (20,) * 60, np.arange(60) % 2
    rows = rng.standard_normal((3, 1200, 16)).astype(np.float32)
    rows[2, :, 3] += 4 * np.repeat(label, 20)
    rows[2, :, 4] += np.tile(np.arange(20), 60)
    sites = {f"resid_post.{layer}": rows[layer] for layer in range(3)}
    write_rows(tmp_path / "acts.zarr", lengths, sites, columns={"title": [["class", "async"][i] for i in label]})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"residua": residua}
    code = blocks("docs/analysis.md", *SECTIONS)
    assert len(code) == 4
    run(code, names)
    assert names["table"]["accuracy"].to_pylist()[2] > 0.9
    assert names["same"].score(names["rows"], names["labels"]) > 0.9
    assert names["ridge"].score(rows[2], np.tile(np.arange(20), 60)) > 0.9
    assert names["found"].components["resid_post.2"].shape == (8, 16)
    assert {int(label[example]) for example in names["best"]["example"].to_pylist()} == {0}


def test_it_takes_as_few_passes_as_the_page_says() -> None:
    """Correlated channels of very different scales, the worst for the plain coordinates."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, 40)) @ rng.standard_normal((40, 40)) * np.exp(3 * rng.standard_normal(40))
    truth = (rows / rows.std(axis=0)) @ rng.standard_normal(40) + rng.standard_normal(3000) * 4 > 0
    moments = Moments(40)
    moments.add(rows)
    n_passes = 0

    def batches() -> Any:
        nonlocal n_passes
        n_passes += 1
        yield rows, truth[:, None].astype(np.int64)

    penalties = [10.0**power for power in range(-5, 2)]
    found = fit_logistic(batches, [Problem(0, 2, penalty) for penalty in penalties], Basis.of(moments), tolerance=1e-7)
    assert all(one.is_converged for one in found)
    assert n_passes <= 40
