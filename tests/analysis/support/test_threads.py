"""Jobs have one thread; what runs beside them and after them has what it had."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from residua.analysis.support.threads import one_thread

N = 2


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads of everything, as on a machine with two cores, whatever the environment says."""
    _ = np.ones((2, 2)) @ np.ones((2, 2))
    before = torch.get_num_threads()
    with threadpool_limits(N):
        torch.set_num_threads(N)
        yield
    torch.set_num_threads(before)


def numbers() -> set[int]:
    """Every number of threads that holds here: torch's, its OpenMP's and the BLAS's.

    Other packages that are loaded (scikit-learn, sentencepiece) may have an OpenMP of their own, which in new threads
    follows the environment.
    """
    of_torch = torch.get_num_threads()  # first, for it sets OpenMP's at its first use in a thread
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas" or "/torch/" in pool["filepath"]]
    return {of_torch, *(pool["num_threads"] for pool in pools)}


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_limits_end_with_the_job(in_main_thread: bool) -> None:
    def job() -> None:
        for _ in range(2):
            with one_thread():
                assert numbers() == {1}
                with one_thread():
                    assert numbers() == {1}
                assert numbers() == {1}
            assert numbers() == {N}

    if in_main_thread:
        job()
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(job).result()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(numbers).result() == {N}


def test_an_error_ends_the_limits() -> None:
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = 1 / 0
    assert numbers() == {N}


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_jobs_side_by_side(first_ends_first: bool) -> None:
    """As on a Dask worker with several threads: one job starts while another runs, and outlives it."""
    started, end = (threading.Event(), threading.Event()), (threading.Event(), threading.Event())
    found: dict[str, set[int]] = {}

    def job(number: int) -> None:
        with one_thread():
            started[number].set()
            assert end[number].wait(10)
            found[f"job {number}"] = numbers()

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other, ThreadPoolExecutor(1) as beside:
        first = one.submit(job, 0)
        assert started[0].wait(10)
        assert beside.submit(torch.get_num_threads).result() == N
        second = other.submit(job, 1)
        assert started[1].wait(10)
        order = ((0, first), (1, second)) if first_ends_first else ((1, second), (0, first))
        for number, future in order:
            end[number].set()
            future.result()
        assert found == {"job 0": {1}, "job 1": {1}}
        for pool in (one, other, beside):
            assert pool.submit(numbers).result() == {N}
    assert numbers() == {N}


def test_torchs_own_first_use_in_a_thread_does_not_lift_the_limit() -> None:
    def job() -> None:
        with one_thread():
            _ = torch.ones(300, 300) @ torch.ones(300, 300)
            assert numbers() == {1}
            assert "mkl_get_max_threads() : 2" not in torch.__config__.parallel_info()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(job).result()
