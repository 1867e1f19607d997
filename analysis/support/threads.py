"""One thread for a job: every core has a worker, and sums do not depend on the number of cores.

torch, its MKL and OpenMP keep one number for each thread of the process, and torch one more for threads that come
later; numpy's BLAS keeps one for the process. Jobs of a user's Dask worker run side by side with each other and with
other work. So each job changes the numbers of its own thread only, and the last one gives back that of the process.

Jobs that use torch import it before they start, with their modules. In other processes it stays unloaded: it would take
some 140 MiB of a worker's memory.
"""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

from threadpoolctl import ThreadpoolController


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch, OpenMP and numpy's BLAS to one thread inside the ``with`` block; afterwards all is as before."""
    of_torch: AbstractContextManager[object] = _one_thread_of_torch() if "torch" in sys.modules else nullcontext()
    with of_torch, _libraries("openmp", len(sys.modules)).limit(limits=1), _blas:
        yield


@contextmanager
def _one_thread_of_torch() -> Iterator[None]:
    import torch  # waits where another thread still imports it

    before = torch.get_num_threads()  # and so that torch, at its first use in a thread, does not set it later
    _set_threads_here(1)
    try:
        yield
    finally:
        _set_threads_here(before)


def _set_threads_here(n: int) -> None:
    """Set torch's number for this thread, and leave that for later threads as it is."""
    import torch

    with _setting, ThreadPoolExecutor(1) as later:
        of_later = later.submit(torch.get_num_threads).result()
        torch.set_num_threads(n)
        later.submit(torch.set_num_threads, of_later).result()


@lru_cache(maxsize=2)
def _libraries(user_api: str, _n_modules: int) -> Any:
    """Return the loaded libraries that have threads; once modules were imported, they are looked for again (3 ms)."""
    return ThreadpoolController().select(user_api=user_api)


class _Blas:
    """The limit of numpy's BLAS, which belongs to the process: the first job sets it, the last one takes it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_jobs = 0
        self._before: list[tuple[Any, int]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._n_jobs:
                found = _libraries("blas", len(sys.modules)).lib_controllers
                self._before = [(library, library.num_threads) for library in found]
                for library, _ in self._before:
                    _set_blas(library, 1)
            self._n_jobs += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_jobs -= 1
            if not self._n_jobs:
                for library, number in self._before:
                    _set_blas(library, number)


def _set_blas(library: Any, number: int) -> None:
    """Set the number of a BLAS library, although another thread may have set it first.

    From threadpoolctl 3.8 on, `set_num_threads` of any other thread does nothing, without a word.
    """
    getattr(library, "_real_set_num_threads", library.set_num_threads)(number)


_setting = threading.Lock()
_blas = _Blas()
