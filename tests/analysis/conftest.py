"""One cluster of processes for all tests of the room: starting one takes seconds."""

from collections.abc import Iterator
from typing import Any

import distributed
import pytest


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """Return the address of a Dask scheduler with two workers, processes of one thread each."""
    make: Any = distributed.LocalCluster
    with make(n_workers=2, threads_per_worker=1, memory_limit="2GiB", dashboard_address="127.0.0.1:0") as cluster:
        yield cluster.scheduler_address
