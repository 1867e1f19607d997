"""Archives at an address read as in their folder, and what a server does wrong is an error or asked for again."""

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest

import residua
from residua.store.base.errors import (
    DamagedArchiveError,
    NotCapturedError,
    PlanError,
    ResiduaError,
    StorageError,
    UnsafeArchiveError,
)
from residua.store.encoding.codecs import PRESETS
from residua.store.format.archive_metadata import ROOT, read_metadata, write_metadata
from residua.store.format.stacks import create_stacks
from residua.store.read.archive import Archive
from residua.store.read.remote import RemoteChunks, RemoteReader
from residua.store.read.remote_archive import RemoteArchive
from residua.store.read.rows_in_shards import Following
from residua.store.read.stacks import open_archive
from residua.store.sealing.packed_index import INDEX
from residua.store.storage.disk_cache import DiskCache
from residua.store.storage.objects import ObjectFolder
from residua.store.verification.verify import verify
from tests.servers.files import FileServer, serving_files
from tests.store.samples import make_spec
from tests.store.small_archive import HEIGHT, LENGTHS, N_ROWS, make_archive

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    make_archive(tmp_path / "a.zarr")
    with serving_files(tmp_path) as server:
        yield server


def opened(server: FileServer, cache: DiskCache | bool = False) -> RemoteArchive:
    return RemoteArchive(f"{server.url}/a.zarr", cache=cache)


@pytest.mark.parametrize("codec", PRESETS)
def test_everything_reads_as_in_the_folder(codec: str, tmp_path: Path) -> None:
    here = Archive(make_archive(tmp_path / "a.zarr", codec, nonfinite=codec != "int8-block32"))
    rows = np.random.default_rng(1).integers(0, N_ROWS, 50)
    with serving_files(tmp_path) as server:
        there = opened(server)
        assert there.sites == here.sites
        assert (there.plan, there.provenance, there.progress) == (here.plan, here.provenance, here.progress)
        for site in here.sites:
            assert np.array_equal(there[site].bits(slice(None)), here[site].bits(slice(None)))
            assert np.array_equal(there[site].bits(rows), here[site].bits(rows))
            assert np.array_equal(there[site].bits([5]), here[site].bits([5]))
        for mine, theirs in zip(here.rows, there.rows, strict=True):
            assert (theirs is None) == (mine is None)
            assert mine is None or theirs is None or np.array_equal(theirs[:], mine[:])
        assert there.examples.equals(here.examples)
        assert there.text(3) == here.text(3)
        assert there.side_file("head/lm_head.json") == here.side_file("head/lm_head.json")
        for example in range(len(LENGTHS)):
            assert [values.tobytes() for values in there.example(example).values()] == [
                values.tobytes() for values in here.example(example).values()
            ]


def test_opening_takes_two_requests_and_nothing_of_the_rows(server: FileServer) -> None:
    there = opened(server)
    assert server.requests == {f"/a.zarr/{ROOT}": 1, f"/a.zarr/{INDEX}": 1}
    assert there.n_rows == N_ROWS
    assert there.is_sealed
    assert server.requests.total() == 2


def test_rows_take_at_most_a_request_a_shard_here(server: FileServer) -> None:
    there = opened(server)
    there["resid_post.0"][:1]  # with the page of the index that all arrays share
    server.forget()
    there["resid_post.0"][[0, 3, HEIGHT, N_ROWS - 1]]
    assert server.requests.total() == 3
    server.forget()
    there["q.1"][2:5]
    assert server.requests.total() == 1
    assert there["q.1"][5:5].shape == (0, *there["q.1"].shape[1:])
    assert server.requests.total() == 1


class Tables:
    """Shards of 16 chunks of 100 bytes."""

    digest = "0" * 64

    def __contains__(self, shard: object) -> bool:
        return True

    def chunk_table(self, key: str, shard: int) -> Any:
        return np.full((16, 2), 100, np.int64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[0, 1, 5, 15], [16], [40], [79]]),
        ({"join_gap_bytes": 0}, [[0, 1], [5], [15], [16], [40], [79]]),
        ({"join_gap_bytes": 300}, [[0, 1, 5], [15], [16], [40], [79]]),
        ({"request_bytes": 600}, [[0, 1, 5], [15], [16], [40], [79]]),
        ({"request_bytes": 1}, [[0], [1], [5], [15], [16], [40], [79]]),
    ],
)
def test_gap_and_size_of_requests_are_parameters(
    settings: dict[str, Any], expected: list[list[int]], server: FileServer
) -> None:
    spec = make_spec("raw", "float32", (5,), rows_per_shard=16, rows_per_chunk=1)
    chunks: Any = pickle.loads(pickle.dumps(RemoteChunks(ObjectFolder(server.url), Tables(), **settings)))  # noqa: S301
    assert [request.chunks for request in chunks._requests(spec, [0, 1, 5, 15, 16, 40, 79])] == expected
    there = residua.open(f"{server.url}/a.zarr", cache=False, **settings)
    assert np.array_equal(there["q.1"][:], Archive(server.folder / "a.zarr")["q.1"][:])


def test_windows_that_are_read_ahead_give_the_same_rows(server: FileServer) -> None:
    here, there = Archive(server.folder / "a.zarr"), opened(server)
    spec = next(spec for spec in there.arrays if spec.path == "sites/resid_post/0")
    rows = here["resid_post.0"][:]
    for window_bytes in (1, 3000, 10_000):
        reader = RemoteReader(there.chunks, spec, N_ROWS, window_bytes=window_bytes)
        assert np.array_equal(reader.read(3, N_ROWS - 2), rows[3:-2])
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(reader.take, [range(N_ROWS)] * 4):
                assert np.array_equal(found, rows)


def test_a_scan_fetches_the_next_rows_ahead_and_nothing_twice(server: FileServer) -> None:
    here, there = Archive(server.folder / "a.zarr"), opened(server)
    for site in here.sites:
        there[site][:1]  # with the index's page
        server.forget()
        found = [there[site][start : start + HEIGHT] for start in range(0, N_ROWS, HEIGHT)]
        assert np.array_equal(np.concatenate(found), here[site][:])
        shards = [
            path.stat().st_size for path in (server.folder / "a.zarr/sites").glob(f"{site.replace('.', '/')}/c/*/*")
        ]
        assert server.n_bytes <= sum(shards)
        assert set(server.requests.values()) <= {1}


PIECES: list[Any] = [range(20, 30), np.array([3, 37]), range(5), range(7, N_ROWS), np.array([37, 3, 3])]


def filled(archive: Archive, site: str, pieces: list[Any], following: Following | None = None) -> Any:
    """Return the bits of pieces of rows that are read together."""
    array = archive[site]
    out = np.empty((sum(map(len, pieces)), *array.shape[1:]), array.stored_dtype)
    array.fill(out, pieces, following)
    return out.view(f"<u{array.stored_dtype.itemsize}")


@pytest.mark.parametrize("step_bytes", [1, 4000, 10**6])
@pytest.mark.parametrize("codec", ["raw", "fast", "int8-block32"])
def test_pieces_that_are_read_together_are_the_same_rows(
    codec: str, step_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("residua.store.read.rows_in_shards._STEP_BYTES", step_bytes)
    here = Archive(make_archive(tmp_path / "a.zarr", codec))
    rows = np.concatenate([np.asarray(piece) for piece in PIECES])
    with serving_files(tmp_path) as server:
        for archive in (here, opened(server)):
            for site in here.sites:
                found = filled(archive, site, PIECES)
                assert np.array_equal(found, here[site].bits(rows))
                if codec != "int8-block32":
                    stored: Any = here.group[f"sites/{site.replace('.', '/')}"]  # as zarr-python reads it
                    assert np.array_equal(found, np.asarray(stored[:]).view(found.dtype)[rows])
            assert not filled(archive, "q.1", [range(3, 3)]).size


def test_pieces_that_follow_come_once_and_together(server: FileServer) -> None:
    here, there = Archive(server.folder / "a.zarr"), opened(server)
    following: list[Any] = [range(8, 16), np.array([1, 30])]
    for most_bytes in (0, 3000, 10**6):
        for site in here.sites:
            there[site][:1]  # with the page of the index
            server.forget()
            for pieces, later in ((PIECES, following), (following, [])):
                rows = np.concatenate([np.asarray(piece) for piece in pieces])
                assert np.array_equal(filled(there, site, pieces, Following(later, most_bytes)), here[site].bits(rows))
            assert set(server.requests.values()) <= {1, 2}  # a shard's chunks of each of the two together
    for outside in (range(N_ROWS + 1), np.array([3, -1])):
        with pytest.raises(IndexError, match=r"q\.1"):
            filled(there, "q.1", [range(5), outside])
    with pytest.raises(ValueError, match="C-contiguous"):
        there["q.1"].fill(np.empty((4, *there["q.1"].shape[1:]), there["q.1"].stored_dtype), [range(5)])


def test_what_was_fetched_ahead_and_is_not_used_goes(server: FileServer) -> None:
    here, there = Archive(server.folder / "a.zarr"), opened(server)
    there.chunks.held_bytes = 4000
    for site in here.sites:
        filled(there, site, [range(1)], Following([range(N_ROWS)], 10**6))
        assert np.array_equal(there[site][:], here[site][:])
    assert len(there.chunks._held) <= 2  # chunks that fit into it


def test_a_forked_child_is_told_to_be_started_otherwise(server: FileServer) -> None:
    """Its parent's threads, which wait for answers, are not there: a request would wait for ever."""
    there = opened(server)
    with multiprocessing.get_context("fork").Pool(1, initializer=_SHARED.update, initargs=({"a": there},)) as pool:
        message = pool.apply_async(_why_not).get(60)
    assert f"{there.place} " in message
    assert "forkserver" in message


_SHARED: dict[str, RemoteArchive] = {}


def _why_not() -> str:
    with pytest.raises(StorageError) as caught:
        _SHARED["a"]["q.1"][[0, 37]]
    return str(caught.value)


def test_the_group_and_the_dataset_are_those_of_the_folder(server: FileServer) -> None:
    here, there = Archive(server.folder / "a.zarr"), opened(server)
    for path in ("sites/resid_post/0", "sites/q/1", "rows/token"):
        mine: Any = here.group[path]
        theirs: Any = there.group[path]
        assert (theirs.shape, theirs.dtype, theirs.metadata.dimension_names) == (
            mine.shape,
            mine.dtype,
            mine.metadata.dimension_names,
        )
        assert np.array_equal(theirs[3:30], mine[3:30])
        assert np.array_equal(theirs.oindex[[0, 37]], mine.oindex[[0, 37]])
        again: Any = pickle.loads(pickle.dumps(theirs))  # noqa: S301  # as Dask sends it
        assert np.array_equal(again[:], mine[:])
        from_zarr: Any = dask.array.from_zarr  # its functions have no types
        lazy = from_zarr(theirs)
        assert np.array_equal(lazy.compute(scheduler="synchronous"), mine[:])
    assert sorted(there.group["sites"]) == sorted(here.group["sites"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="opened for reading"):
        there.group["rows/token"][0] = 1  # type: ignore[index]
    assert there.to_xarray().attrs["archive"] == there.place
    assert there.to_xarray().drop_attrs().equals(here.to_xarray().drop_attrs())
    (server.folder / "a.zarr/sites/q/1/c/1/0/0").unlink()
    with pytest.raises(DamagedArchiveError, match=r"sites/q/1/c/1/0/0 is missing"):
        opened(server).group["sites/q/1"][:]  # type: ignore[index]


def test_archives_of_several_stacks_open_by_the_address_around_them(tmp_path: Path) -> None:
    create_stacks(tmp_path / "m.zarr", ("encoder", "decoder"))
    make_archive(tmp_path / "m.zarr" / "encoder", stack="encoder")
    make_archive(tmp_path / "m.zarr" / "decoder", stack="decoder", seed=1)
    here = open_archive(tmp_path / "m.zarr")
    with serving_files(tmp_path) as server:
        there = open_archive(f"{server.url}/m.zarr/", cache=False)
        assert (there.place, there.sites, there.progress) == (f"{server.url}/m.zarr", here.sites, here.progress)
        for site in here.sites:
            assert np.array_equal(there[site][:], here[site][:])
        with pytest.raises(PlanError, match=f"{server.url}/m.zarr holds encoder and decoder"):
            there.n_rows  # noqa: B018  # the look-up is the test
        (tmp_path / "m.zarr" / "decoder" / ROOT).unlink()
        with pytest.raises(FileNotFoundError, match=r"m\.zarr/decoder is not an archive"):
            open_archive(f"{server.url}/m.zarr", cache=False)


def test_an_archive_pickles_as_its_readers_do(server: FileServer) -> None:
    there = opened(server)
    spec = next(spec for spec in there.arrays if spec.path == "sites/q/1")
    again = pickle.loads(pickle.dumps(RemoteReader(there.chunks, spec, N_ROWS)))  # noqa: S301
    assert np.array_equal(again.read(0, 9), there["q.1"][:9])
    whole = pickle.loads(pickle.dumps(there))  # noqa: S301
    assert (whole.place, whole.options) == (there.place, there.options)
    assert np.array_equal(whole["q.1"][:9], there["q.1"][:9])


def test_an_altered_answer_is_asked_for_again(server: FileServer) -> None:
    there = opened(server)
    good = there["resid_post.0"][:]
    server.forget()
    server.altered_once = {"0"}
    assert np.array_equal(there["resid_post.0"][:], good)
    assert server.requests.total() > 3


def test_what_stays_altered_is_an_error_that_names_it(server: FileServer) -> None:
    there = opened(server)
    server.altered = {"0"}  # the name of every shard file
    with pytest.raises(DamagedArchiveError, match=r"a\.zarr/sites/resid_post/0/c/0/0.*rows 0 to"):
        there["resid_post.0"][:3]


@pytest.mark.parametrize("name", [ROOT, INDEX])
def test_altered_metadata_are_errors_or_change_nothing(name: str, server: FileServer) -> None:
    """A byte may be one that nobody reads, such as a space."""
    path = server.folder / "a.zarr" / name
    rows, messages = opened(server)["resid_post.0"][:], []
    size = path.stat().st_size
    for at in range(0, size, max(1, size // 60)):
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.write_bytes(data)
        try:
            found = opened(server)["resid_post.0"][:]
        except (ResiduaError, FileNotFoundError) as error:
            messages.append(str(error))
        else:
            assert np.array_equal(found, rows)
        data[at] ^= 4
        path.write_bytes(data)
    assert len(messages) > 10
    assert all(server.url in message for message in messages)


def test_missing_files_are_named(server: FileServer) -> None:
    there = opened(server)
    (server.folder / "a.zarr" / "sites" / "q" / "1" / "c" / "1" / "0" / "0").unlink()
    (server.folder / "a.zarr" / "tokenizer" / "tokenizer.json").unlink()
    (server.folder / "a.zarr" / "examples" / "part-00000.parquet").unlink()
    with pytest.raises(DamagedArchiveError, match="sites/q/1/c/1/0/0"):
        there["q.1"][:]
    assert there["q.1"][:HEIGHT].shape == (HEIGHT, 2, 4)
    with pytest.raises(DamagedArchiveError, match=r"http://.*tokenizer\.json"):
        _ = there.tokenizer
    with pytest.raises(DamagedArchiveError, match=r"http://.*part-00000"):
        _ = there.examples


def test_an_address_without_an_archive(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.zarr is not an archive"):
        RemoteArchive(f"{server.url}/nothing.zarr")
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "b.zarr" / ROOT).write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(UnsafeArchiveError, match=r"http://.*b\.zarr"):
        RemoteArchive(f"{server.url}/b.zarr")
    with pytest.raises(StorageError, match="cannot read"):
        RemoteArchive("http://127.0.0.1:9/a.zarr", storage_options={"retry_config": {"max_retries": 0}})


def test_an_archive_without_an_index_cannot_be_read_yet(server: FileServer) -> None:
    path = server.folder / "a.zarr"
    write_metadata(path, replace(read_metadata(path), index=None))
    with pytest.raises(NotCapturedError, match="residua pack"):
        opened(server)


def test_what_is_in_the_cache_is_not_asked_for(server: FileServer, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache")
    first = opened(server, cache)
    rows, table = first["resid_post.0"][:], first.examples
    server.forget()
    again = opened(server, cache)
    assert np.array_equal(again["resid_post.0"][:], rows)
    assert again.examples.equals(table)
    assert not [path for path in server.requests if "/c/" in path or "examples" in path]


def test_a_cache_that_was_altered_is_not_believed(server: FileServer, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache")
    first = opened(server, cache)
    rows, table = first["resid_post.0"][:], first.examples
    for path in (tmp_path / "cache").glob("??/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    again = opened(server, cache)
    assert np.array_equal(again["resid_post.0"][:], rows)
    assert again.examples.equals(table)


def test_verification_over_the_network_names_what_is_damaged(server: FileServer) -> None:
    address, root = f"{server.url}/a.zarr", server.folder / "a.zarr"
    sound = verify(address)
    assert (sound.problems, sound.notes) == ([], [])
    assert (sound.n_chunks, sound.n_bytes > 0) == (verify(root).n_chunks, True)
    for name in ("sites/q/1/c/2/0/0", "rows/token/c/0", "tokenizer/tokenizer.json", "examples/part-00000.parquet"):
        path = root / name
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
        assert name.split("/")[0] in {problem.path.split("/")[0] for problem in verify(address).problems}
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    (root / "sites" / "q" / "1" / "c" / "0" / "0" / "0").unlink()
    assert [problem.path for problem in verify(address).problems] == ["sites/q/1/c/0/0/0"]
