"""A cluster of processes and an archive with an LM head, shared by all tests of the room."""

from collections.abc import Iterator
from typing import Any

import distributed
import pytest

from residua.store.read.archive import Archive
from tests.analysis.lens_archive import make_lens_archive


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """Return the address of a Dask scheduler with two single-threaded worker processes."""
    make: Any = distributed.LocalCluster
    with make(n_workers=2, threads_per_worker=1, memory_limit="2GiB", dashboard_address="127.0.0.1:0") as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="session")
def lens_archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_lens_archive(tmp_path_factory.mktemp("lens") / "a.zarr")
