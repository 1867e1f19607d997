"""Statistics, probes and top rows are the same in this process and on a cluster of processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.analysis.probes.probe import probe
from residua.analysis.stats.stats import stats
from residua.analysis.stats.top import top
from residua.analysis.support.cluster import connect
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

LENGTHS = (40,) * 40


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    rng = np.random.default_rng(0)
    sites = {f"resid_post.{layer}": rng.standard_normal((1600, 24)).astype(np.float32) for layer in range(3)}
    sites["resid_post.2"][:, 5] += np.arange(1600) // 40 % 2
    return write_rows(tmp_path / "a.zarr", LENGTHS, sites, columns={"odd": [i % 2 == 1 for i in range(40)]})


def test_a_cluster_finds_what_this_process_finds(archive: Archive, scheduler: str, tmp_path: Path) -> None:
    here, there = (everything(archive, scheduler, tmp_path / scheduler[:3]) for scheduler in ("inline", scheduler))
    assert here.keys() == there.keys()
    for name, found in here.items():
        assert found.equals(there[name]), name
    assert here["probe"]["accuracy"].to_pylist()[2] > 0.6
    files = [sorted(tmp_path.glob(f"{place}/**/probe.safetensors")) for place in ("inl", "tcp")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert len(files[0]) == 3


def everything(archive: Archive, scheduler: str, folder: Path) -> dict[str, Any]:
    with connect(scheduler) as cluster:
        found = stats(archive, cluster=cluster, task_rows=120)  # several tasks a site
        return {
            "sites": found.sites,
            "channels": found.channels,
            "positions": found.positions,
            "probe": probe(archive, "odd", save=folder, cluster=cluster),
            "position": probe(archive, "position", cluster=cluster),
            "top": top(archive, "resid_post.2", channel=5, cluster=cluster, task_rows=200),
        }
