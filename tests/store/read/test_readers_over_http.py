"""Archives on a plain web server, read without Residua: zarr-python, xarray, Dask, tensorstore and zarrs."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import xarray
import zarr
from obstore.store import HTTPStore
from zarr.storage import ObjectStore

from residua.store.read.archive import Archive
from tests.servers.files import FileServer, serving_files
from tests.store.small_archive import make_archive

pytestmark = pytest.mark.timeout(120)

CODECS = ("raw", "fast", "small", "bitround10")
WITH_ZARRS = """
import sys, numpy, zarr
from obstore.store import HTTPStore
from zarr.storage import ObjectStore
assert "residua" not in sys.modules
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True})
url, out, *nodes = sys.argv[1:]
store = ObjectStore(HTTPStore.from_url(url, client_options={"allow_http": True}), read_only=True)
numpy.savez(out, **{node: zarr.open_array(store, path=node, mode="r")[:] for node in nodes})
"""  # in a process of its own, for it keeps the interpreter's lock while it waits for the server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    folder = tmp_path_factory.mktemp("served")
    for codec in CODECS:
        make_archive(folder / codec, codec, nonfinite=True)
    with serving_files(folder) as server:
        yield server


def store_at(url: str) -> Any:
    return ObjectStore(HTTPStore.from_url(url, client_options={"allow_http": True}), read_only=True)


def with_zarr_python(url: str, node: str) -> Any:
    group: Any = zarr.open_group(store_at(url), mode="r")
    return group[node][:]


def with_tensorstore(url: str, node: str) -> Any:
    base, _, folder = url.rpartition("/")
    spec = {"driver": "zarr3", "kvstore": {"driver": "http", "base_url": base, "path": f"/{folder}/{node}/"}}
    return tensorstore.open(spec, open=True, read=True).result().read().result()


def with_xarray(url: str, node: str) -> Any:
    group, _, name = node.rpartition("/")
    return xarray.open_zarr(store_at(url), group=group, chunks=None)[name].values


def with_xarray_and_dask(url: str, node: str) -> Any:
    group, _, name = node.rpartition("/")
    opened: Any = xarray.open_zarr(store_at(url), group=group)[name]
    return opened.data.compute(scheduler="synchronous")


def nodes_of(archive: Archive) -> dict[str, npt.NDArray[Any]]:
    """Return every array of an archive by its path, as Residua reads it in the folder."""
    found = {archive.plan.site(name).path: archive[name][:] for name in archive.sites}
    return found | {column.name: column[:] for column in archive.rows if column is not None}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("reader", [with_zarr_python, with_tensorstore, with_xarray, with_xarray_and_dask])
def test_every_value_is_equal(server: FileServer, codec: str, reader: Callable[[str, str], Any]) -> None:
    for node, values in nodes_of(Archive(server.folder / codec)).items():
        found = np.asarray(reader(f"{server.url}/{codec}", node))
        assert found.shape == values.shape
        if found.dtype == ml_dtypes.bfloat16:
            found = found.astype(np.float32)
        assert np.array_equal(found, values, equal_nan=found.dtype.kind == "f"), node


def test_zarrs_reads_it_too(server: FileServer, tmp_path: Path) -> None:
    expected = nodes_of(Archive(server.folder / "fast"))
    url = f"{server.url}/fast"
    words = [sys.executable, "-W", "ignore", "-c", WITH_ZARRS, url, str(tmp_path / "found.npz"), *expected]
    subprocess.run(words, check=True, timeout=100)
    with np.load(tmp_path / "found.npz") as found:
        for node, values in expected.items():
            assert np.array_equal(found[node], values, equal_nan=values.dtype.kind == "f"), node


def test_nothing_is_listed_and_a_row_takes_its_shard_alone(server: FileServer) -> None:
    server.forget()
    array: Any = zarr.open_consolidated(store_at(f"{server.url}/raw"), zarr_format=3, mode="r")["sites/q/1"]
    assert array.metadata.dimension_names == ("row", "head", "d_head")
    assert server.requests == {"/raw/zarr.json": 1}, "the root's metadata have those of all arrays"
    assert np.isfinite(array[5]).all()
    assert [name for name in server.requests if name != "/raw/zarr.json"] == ["/raw/sites/q/1/c/0/0/0"]
