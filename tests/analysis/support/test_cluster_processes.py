"""Jobs and arrays on a cluster of processes: the same results, deaths survived, memory kept, threads counted."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
from dask import config

from residua.analysis.rows.blocks import blocks
from residua.analysis.rows.dask_array import array
from residua.analysis.support.cluster import Cluster, connect
from residua.analysis.support.open_archives import address
from residua.store.base.errors import AnalysisError, DamagedArchiveError
from residua.store.read.archive import Archive
from tests.analysis import cluster_jobs as jobs
from tests.analysis.large_archive import make_large
from tests.store.small_archive import make_archive

MIB = 2**20


@pytest.fixture(scope="module")
def cluster(scheduler: str) -> Iterator[Cluster]:
    with connect(scheduler) as found:
        yield found


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(make_archive(tmp_path_factory.mktemp("cluster") / "acts.zarr"))


def test_a_cluster_says_how_large_it_is(cluster: Cluster) -> None:
    assert (cluster.n_workers, cluster.memory_limit) == (2, 2048 * MIB)


def test_jobs_give_the_same_as_in_this_process(cluster: Cluster, archive: Archive) -> None:
    job = partial(jobs.gram, address(archive))
    with connect("inline") as inline:
        expected = dict(inline.map(job, blocks(archive), label="Gram"))
    found = dict(cluster.map(job, blocks(archive), label="Gram"))
    assert expected.keys() == found.keys() == {0, 1, 2}
    for number, matrix in expected.items():
        np.testing.assert_array_equal(found[number], matrix)


def test_arrays_give_the_same_as_with_threads(scheduler: str, archive: Archive) -> None:
    acts: Any = array(archive, "resid_post.0", dtype=np.float64)
    results = [acts.T @ acts, acts[3:30:5], (acts**2).sum(axis=0)]
    expected = [result.compute(scheduler="threads") for result in results]
    make: Any = distributed.Client
    with make(scheduler, set_as_default=False) as client:
        found = [future.result() for future in client.compute(results)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-14)


def test_a_job_whose_worker_was_killed_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    found = dict(cluster.map(partial(jobs.die_once, str(tmp_path)), range(6), label="squares"))
    assert found == {number: number * number for number in range(6)}
    assert (tmp_path / "died").exists()


def test_every_job_begins_with_one_torch_thread(cluster: Cluster) -> None:
    assert [found for _, found in cluster.map(jobs.threads_seen, range(6), label="threads")] == [1] * 6


def test_an_error_comes_up_with_its_cause(cluster: Cluster) -> None:
    with pytest.raises(AnalysisError, match=r"squares: job 0 failed: 'three'") as caught:
        list(cluster.map(jobs.fail, [3], label="squares"))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(DamagedArchiveError, match="shard 1 is damaged"):
        list(cluster.map(jobs.fail, [1], label="squares"))


def test_a_bar_shows_its_label(scheduler: str, archive: Archive, capfd: pytest.CaptureFixture[str]) -> None:
    with connect(scheduler, shown=True) as cluster:
        list(cluster.map(partial(jobs.gram, address(archive)), blocks(archive), label="adding up Gram matrices"))
    assert "adding up Gram matrices:   0%" in capfd.readouterr().err


def test_a_scheduler_must_have_workers_soon() -> None:
    make: Any = distributed.LocalCluster
    with make(n_workers=0, dashboard_address="127.0.0.1:0", threads_per_worker=1) as empty:
        address = empty.scheduler_address
        with pytest.raises(AnalysisError, match=f"{address} has no workers.*dask worker"), connect(address, timeout=1):
            pass
        empty.scale(1)
        with connect(address, timeout=60) as cluster:
            assert cluster.n_workers == 1
            assert len(list(cluster.map(jobs.threads_seen, range(5), label="threads"))) == 5


def test_a_worker_needs_less_memory_than_the_archive_has(tmp_path: Path) -> None:
    limit, height, n_shards = 512 * MIB, 2**18, 24
    values = np.random.default_rng(0).standard_normal((height, 32), np.float32)
    archive = make_large(tmp_path / "acts.zarr", values, n_shards)
    assert n_shards * values.nbytes == 1.5 * limit
    acts: Any = array(archive, "resid_post.0")
    wide = values.astype(np.float64)
    expected = n_shards * (wide.T @ wide)
    with config.set({"distributed.scheduler.allowed-failures": 0}), connect(workers=1, memory_limit=limit) as one:
        before = dict(one.map(jobs.state_of_worker, [0], label="looking"))
        total = sum(
            result for _, result in one.map(partial(jobs.gram, address(archive)), blocks(archive), label="Gram")
        )
        np.testing.assert_allclose(total, expected, rtol=1e-12)
        np.testing.assert_allclose((acts.T @ acts).compute(), expected, rtol=1e-4, atol=300)
        after = dict(one.map(jobs.state_of_worker, [0], label="looking"))
        assert after[0].process == before[0].process  # no worker was ended for its memory
        assert after[0].mapped_bytes <= limit // 8
        assert after[0].spilled_bytes == 0
        with pytest.raises(AnalysisError, match=r"taking: job 0 was given up, .* took more memory than allowed"):
            list(one.map(jobs.take_memory, [32 * MIB], label="taking"))
