"""Running jobs: in this process here; on processes of their own in test_cluster_processes.py."""

from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from residua.analysis.support.cluster import connect
from residua.store.base.errors import AnalysisError, DamagedArchiveError


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


def test_an_error_of_a_job_comes_up_with_its_cause() -> None:
    with connect("inline") as cluster:
        with pytest.raises(AnalysisError, match="counting squares: job 0 failed: 'three'") as caught:
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
    [({"memory_limit": "4Gibb"}, "4Gibb"), ({"memory_limit": 0}, "limit is 0"), ({"workers": -1}, "-1 workers")],
)
def test_sizes_that_make_no_sense_are_refused(asked: dict[str, Any], quoted: str) -> None:
    with pytest.raises(AnalysisError, match=quoted), connect(**asked):
        pass
