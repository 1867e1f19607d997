"""Jobs in this process and on a cluster of processes: same results, errors, threads, memory, workers that die."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import distributed
import numpy as np
import pytest
import torch
from dask import config
from threadpoolctl import threadpool_info, threadpool_limits

from residua.analysis.rows.blocks import blocks
from residua.analysis.rows.dask_array import array
from residua.analysis.support.cluster import Cluster, connect
from residua.analysis.support.open_archives import location
from residua.store.base.errors import AnalysisError, DamagedArchiveError, PlanError
from residua.store.base.naming import naming_flags
from residua.store.read.archive import Archive
from tests.analysis import cluster_jobs as jobs
from tests.analysis.large_archive import make_large
from tests.store.small_archive import make_archive

MIB = 2**20


def square(number: int) -> tuple[int, int]:
    if number == 3:
        raise KeyError("three")
    if number == 4:
        raise DamagedArchiveError("shard 4 is damaged: restore it")
    return number * number, torch.get_num_threads()


def test_jobs_run_in_this_process_with_one_torch_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with connect("inline", memory_limit="300MiB") as cluster:
            assert (cluster.n_workers, cluster.memory_limit) == (1, 300 * 2**20)
            assert list(cluster.map(square, range(3), label="squares")) == [(0, (0, 1)), (1, (1, 1)), (2, (4, 1))]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def blas_threads(_: int) -> list[int]:
    return [int(library["num_threads"]) for library in threadpool_info() if library["user_api"] == "blas"]


def test_jobs_run_with_one_thread_of_numpys_blas() -> None:
    with threadpool_limits(2), connect("inline") as cluster:
        before = blas_threads(0)
        found = [threads for _, threads in cluster.map(blas_threads, range(2), label="threads")]
        assert found == [[1] * len(before)] * 2
        assert blas_threads(0) == before == [2] * len(before) != []


def test_an_error_in_this_process_is_raised_with_its_cause() -> None:
    with connect("inline") as cluster:
        with pytest.raises(AnalysisError, match=r"counting squares: job 0 .*three") as caught:
            list(cluster.map(square, [3], label="counting squares"))
        assert isinstance(caught.value.__cause__, KeyError)
        with pytest.raises(DamagedArchiveError, match="shard 4 is damaged"):
            list(cluster.map(square, [4], label="squares"))


def test_a_bar_shows_its_label(capsys: pytest.CaptureFixture[str]) -> None:
    with connect("inline", shown=True) as cluster:
        assert len(list(cluster.map(square, range(3), label="counting squares"))) == 3
    assert "counting squares:   0%" in capsys.readouterr().err
    with connect("inline") as cluster:
        list(cluster.map(square, range(3), label="counting squares"))
    assert not capsys.readouterr().err


def test_an_address_without_a_scheduler_is_an_error() -> None:
    with pytest.raises(AnalysisError, match=r"tcp://127.0.0.1:1"), connect("tcp://127.0.0.1:1", timeout=1):
        pass


@pytest.mark.parametrize(
    ("asked", "quoted"),
    [({"memory_limit": "4Gibb"}, "4Gibb"), ({"memory_limit": 0}, "memory_limit=0"), ({"workers": -1}, "-1 workers")],
)
def test_impossible_sizes_are_refused(asked: dict[str, Any], quoted: str) -> None:
    with pytest.raises((AnalysisError, PlanError), match=quoted), connect(**asked):
        pass


@pytest.fixture(scope="module")
def cluster(scheduler: str) -> Iterator[Cluster]:
    with connect(scheduler) as found:
        yield found


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(make_archive(tmp_path_factory.mktemp("cluster") / "acts.zarr"))


def test_a_cluster_has_its_workers_and_memory(cluster: Cluster) -> None:
    assert (cluster.n_workers, cluster.memory_limit) == (2, 2048 * MIB)


def test_jobs_name_settings_as_who_sent_them_does(cluster: Cluster) -> None:
    assert list(cluster.map(jobs.say, [0], label="said")) == [(0, "memory_limit=")]
    with naming_flags():
        assert list(cluster.map(jobs.say, [0], label="said")) == [(0, "--memory-limit")]
    assert list(cluster.map(jobs.say, [0], label="said")) == [(0, "memory_limit=")]


def test_jobs_give_the_same_as_in_this_process(cluster: Cluster, archive: Archive) -> None:
    job = partial(jobs.gram, location(archive))
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
    found = dict(cluster.map(partial(jobs.kill_worker_once, str(tmp_path)), range(6), label="squares"))
    assert found == {number: number * number for number in range(6)}
    assert (tmp_path / "killed").exists()


@pytest.mark.parametrize("n_leaves", [1, 7, 100])
def test_sums_come_back_in_order_although_a_worker_was_killed(cluster: Cluster, tmp_path: Path, n_leaves: int) -> None:
    folder, shares = cluster.send(str(tmp_path)), list[float]()
    asked: dict[str, Any] = {"merge": jobs.joined, "label": "leaves", "bar": shares.append}
    assert cluster.sum(jobs.leaf_or_kill, [folder], n_leaves, **asked) == list(range(n_leaves))
    assert cluster.sum(jobs.leaf_or_kill, [folder], n_leaves, term_bytes=2**40, **asked) == list(range(n_leaves))
    assert (tmp_path / "killed").exists() == (n_leaves > 5)
    assert sum(shares) == pytest.approx(2)


@pytest.mark.parametrize("is_remote", [True, False])
def test_jobs_report_their_progress(cluster: Cluster, is_remote: bool) -> None:
    heard: list[tuple[int, tuple[float, ...]]] = []
    have_all = Event()

    def hear(number: int, report: tuple[float, ...]) -> None:
        heard.append((number, report))
        if len(heard) == 6:
            have_all.set()

    with connect("inline") as inline:
        found = (cluster if is_remote else inline).map(jobs.report, [5, 6, 7], label="reports", on_report=hear)
        assert sorted(next(found) for _ in range(3)) == [(0, 5), (1, 6), (2, 7)]
        assert have_all.wait(60)
        assert list(found) == []
    assert sorted(heard) == [(number, (step, number + 5)) for number in range(3) for step in (0, 1)]


def test_an_error_in_a_leaf_comes_up(cluster: Cluster) -> None:
    with connect("inline") as inline:
        for one in (cluster, inline):
            with pytest.raises(DamagedArchiveError, match="shard 1 is damaged"):
                one.sum(jobs.leaf_that_fails, ["x"], 40, merge=jobs.joined, label="leaves")


def test_every_job_begins_with_one_torch_thread(cluster: Cluster) -> None:
    assert [found for _, found in cluster.map(jobs.threads_seen, range(6), label="threads")] == [1] * 6


def test_an_error_on_a_worker_is_raised_with_its_cause(cluster: Cluster) -> None:
    with pytest.raises(AnalysisError, match=r"squares: job 0 .*three") as caught:
        list(cluster.map(jobs.fail, [3], label="squares"))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(DamagedArchiveError, match="shard 1 is damaged"):
        list(cluster.map(jobs.fail, [1], label="squares"))


def test_the_bar_of_a_cluster_has_its_label(
    scheduler: str, archive: Archive, capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(scheduler, shown=True) as cluster:
        list(cluster.map(partial(jobs.gram, location(archive)), blocks(archive), label="adding up Gram matrices"))
    assert "adding up Gram matrices:   0%" in capfd.readouterr().err


def test_a_scheduler_must_have_workers_soon() -> None:
    make: Any = distributed.LocalCluster
    with make(n_workers=0, dashboard_address="127.0.0.1:0", threads_per_worker=1) as empty:
        address = empty.scheduler_address
        with pytest.raises(AnalysisError, match=f"{address} .*dask worker"), connect(address, timeout=1):
            pass
        empty.scale(1)
        with connect(address, timeout=60) as cluster:
            assert cluster.n_workers == 1
            assert len(list(cluster.map(jobs.kept_here, range(5), label="looking"))) == 5


SCHEDULER = """
import sys
from distributed import LocalCluster
with LocalCluster(n_workers=1, processes=False, protocol="tcp", dashboard_address=None) as cluster:
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""


def kill_during_a_job(process: "subprocess.Popen[str]", address: str) -> None:
    with connect(address, timeout=30) as cluster:
        for _ in cluster.map(jobs.kept_here, range(10_000), label="looking"):
            process.kill()


def test_a_lost_scheduler_is_one_error(caplog: pytest.LogCaptureFixture) -> None:
    command = [sys.executable, "-c", SCHEDULER]
    soon = {"distributed.comm.timeouts.connect": "1s", "distributed.comm.retry.count": 0}
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        config.set(soon),
    ):
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with pytest.raises(AnalysisError, match=f"{address} was lost.*again"):
            kill_during_a_job(process, address)
    assert not [record for record in caplog.records if record.name == "distributed.client"]


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
            result for _, result in one.map(partial(jobs.gram, location(archive)), blocks(archive), label="Gram")
        )
        np.testing.assert_allclose(total, expected, rtol=1e-12)
        np.testing.assert_allclose((acts.T @ acts).compute(), expected, rtol=1e-4, atol=300)
        after = dict(one.map(jobs.state_of_worker, [0], label="looking"))
        assert after[0].process == before[0].process  # no worker was ended for its memory
        assert after[0].mapped_bytes <= limit // 8
        assert after[0].spilled_bytes == 0
        with pytest.raises(AnalysisError, match=r"taking: job 0 .* memory"):
            list(one.map(jobs.take_memory, [32 * MIB], label="taking"))


@pytest.mark.parametrize("limit", [4, "1000", "4KiB"])
def test_a_limit_that_no_worker_can_start_with_is_refused(limit: int | str) -> None:
    with pytest.raises(AnalysisError, match=r"bytes.*64 MiB.*GiB"), connect(workers=1, memory_limit=limit):
        pass
