"""Batches for training: every row once, whoever reads it, and the same rows after a stop."""

import json
import pickle
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from residua.analysis.loader.division import Point
from residua.analysis.loader.loader import Loader
from residua.analysis.loader.order import n_batches, resumed_worker, worker_slice
from residua.analysis.support.device import Batch
from residua.store.base.errors import AnalysisError, UnknownSiteError
from residua.store.format.archive_metadata import read_metadata
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive
from residua.store.sealing.seal import seal
from tests.analysis.rows_archive import write_rows
from tests.servers.files import serving_files
from tests.stopped import take_back
from tests.store.small_archive import make_archive

HEIGHT = 1024
LENGTH = 32  # rows of an example
N_ROWS = 5000 // LENGTH * LENGTH  # the last shard is short
SITES = ("resid_post.0", "resid_post.1")
SIZE = 60
SMALL = 2**20  # a buffer of a tenth of the archive


def make_numbered(path: Path, n_rows: int, codec: str = "fast") -> Archive:
    """Write an archive whose row r holds r in both sites; chunks of the wider one have 256 rows.

    Example e has the label e % 4, and the token at its position p is e + p.
    """
    examples = range(n_rows // LENGTH)
    numbers = np.arange(n_rows, dtype=np.float32)[:, None]
    return write_rows(
        path,
        [LENGTH] * len(examples),
        {site: np.tile(numbers, width) for site, width in zip(SITES, (512, 128), strict=True)},
        columns={"label": [example % 4 for example in examples], "name": ["n"] * len(examples)},
        input_ids=[range(example, example + LENGTH) for example in examples],
        rows_per_shard=HEIGHT,
        codec=codec,
        sealed=False,
    )


@pytest.fixture(scope="module", params=["fast", "raw"])
def archive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_numbered(tmp_path_factory.mktemp("loader") / "acts.zarr", N_ROWS, request.param)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_numbered(tmp_path_factory.mktemp("loader") / "acts.zarr", N_ROWS, "fast")


def seal_once(path: Path) -> None:
    if (found := read_metadata(path)).index is None:
        seal(path, found)


def make(archive: Archive, **settings: Any) -> Loader:
    given: dict[str, Any] = {"sites": SITES, "batch_size": SIZE, "seed": 3, "buffer_bytes": SMALL, **settings}
    return archive.loader(**given)


def rows_of(batches: Iterator[Batch] | Loader) -> list[list[int]]:
    return [batch["row"].tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_every_row_comes_once_with_its_values(archive: Archive) -> None:
    loader = make(archive)
    seen = []
    for batch in loader:
        for site in SITES:
            assert batch[site].shape == (len(batch["row"]), *archive[site].shape[1:])
            assert torch.equal(batch[site], batch["row"][:, None].float().expand_as(batch[site]))
        seen.append(batch["row"].tolist())
    assert sorted(flat(seen)) == list(range(N_ROWS))
    assert [len(batch) for batch in seen] == [SIZE] * (N_ROWS // SIZE) + [N_ROWS % SIZE]
    assert len(loader) == len(seen)


def test_epochs_and_seeds_have_orders_of_their_own(fast: Archive) -> None:
    loader, other = make(fast), make(fast, seed=4)
    first = rows_of(loader)
    assert rows_of(loader) == first == rows_of(make(fast))
    loader.set_epoch(1)
    orders = [first, rows_of(loader), rows_of(other)]
    assert len({tuple(flat(order)) for order in orders}) == 3
    assert len({tuple(sorted(flat(order))) for order in orders}) == 1


def test_without_shuffling_rows_come_in_the_order_of_the_archive(archive: Archive) -> None:
    assert flat(rows_of(make(archive, shuffle=False))) == list(range(N_ROWS))


@given(
    n_rows=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    world_size=st.integers(1, 4),
    n_workers=st.integers(1, 4),
    drop_last=st.booleans(),
)
def test_workers_divide_rows(n_rows: int, batch_size: int, world_size: int, n_workers: int, drop_last: bool) -> None:
    seen: list[int] = []
    totals = set()
    for rank in range(world_size):
        total = n_batches(n_rows, batch_size, rank, world_size, drop_last=drop_last)
        made: list[list[int]] = [[] for _ in range(total)]
        for worker in range(n_workers):
            places = worker_slice(n_rows, batch_size, rank, world_size, worker, n_workers, drop_last=drop_last)
            starts = range(places.start, places.stop, batch_size)
            for number, start in zip(range(worker, total, n_workers), starts, strict=True):
                made[number] = list(range(start, min(start + batch_size, places.stop)))
        assert all(len(batch) == batch_size for batch in (made if drop_last else made[:-1]))
        seen += flat(made)
        totals.add(total)
    assert len(seen) == len(set(seen))
    assert max(totals) - min(totals) <= (0 if drop_last else 1)
    left_out = n_rows - len(seen)
    assert left_out < world_size * (batch_size + 1) if drop_last else left_out == 0


@given(taken=st.integers(0, 50), n_workers=st.integers(1, 5))
def test_workers_continue_where_they_stopped(taken: int, n_workers: int) -> None:
    order = list(range(taken, taken + 3 * n_workers))  # batch j is made by worker j % n_workers
    found = []
    for i in range(len(order)):
        worker, first = resumed_worker(i % n_workers, n_workers, taken)
        found.append(worker + (first + i // n_workers) * n_workers)
    assert found == order


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_and_workers_together_have_every_row_once(fast: Archive, drop_last: bool) -> None:
    seen = []
    for rank in range(3):
        for worker in range(2):  # as a DataLoader would ask them, without its processes
            loader = make(fast, rank=rank, world_size=3, drop_last=drop_last)
            seen += flat(rows_of(loader._batches(Point(stream=worker), 2)))
    assert len(seen) == len(set(seen))
    assert len(seen) == (3 * (N_ROWS // 3 // SIZE) * SIZE if drop_last else N_ROWS)


@pytest.mark.parametrize("taken", [0, 1, 7, 30, 77, 78])
def test_what_follows_after_a_stop_is_what_would_have_followed(fast: Archive, taken: int) -> None:
    unbroken = make(fast, where="position > 0", columns=["label"])
    unbroken.set_epoch(2)
    expected = rows_of(unbroken)
    begun = make(fast, where="position > 0", columns=["label"])
    begun.set_epoch(2)
    assert rows_of(islice(iter(begun), taken)) == expected[:taken]
    state = json.loads(json.dumps(begun.state_dict()))
    resumed = make(fast, where="position > 0", columns=["label"])
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(2)  # as a loop over epochs does
    assert rows_of(resumed) == expected[taken:]
    assert rows_of(resumed) == expected  # the state counts once


def test_workers_give_every_row_once_and_resume(fast: Archive) -> None:
    expected = rows_of(make(fast, num_workers=2))
    assert sorted(flat(expected)) == list(range(N_ROWS))
    begun = make(fast, num_workers=2)
    iterator = iter(begun)
    assert rows_of(islice(iterator, 5)) == expected[:5]
    state = begun.state_dict()
    del iterator
    resumed = make(fast, num_workers=2)
    resumed.load_state_dict(state)
    assert rows_of(resumed) == expected[5:]
    own: Iterator[Batch] = iter(DataLoader(make(fast), batch_size=None, num_workers=2))
    assert rows_of(own) == expected
    alone = make(fast)
    alone.load_state_dict(make(fast).state_dict(taken=5, num_workers=2))
    assert sorted(flat([*expected[:5], *rows_of(alone)])) == list(range(N_ROWS))  # the rest is divided anew


def test_workers_may_be_forked_while_readers_have_threads(fast: Archive) -> None:
    """A child that waited for its parent's threads would hang."""
    archive = Archive(fast.path, threads=4)
    assert len(archive[SITES[0]][:]) == N_ROWS
    loader = make(archive, num_workers=2, shuffle=False, buffer_bytes="8MiB")
    assert sorted(flat(rows_of(loader))) == list(range(N_ROWS))


def test_ranks_are_those_of_torch_distributed(fast: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 3}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert rows_of(make(fast)) == rows_of(make(fast, rank=1, world_size=3))


def test_a_state_of_other_settings_is_refused(fast: Archive, tmp_path: Any) -> None:
    state = make(fast, seed=3).state_dict()
    with pytest.raises(AnalysisError, match=r"seed was 3 and is 4"):
        make(fast, seed=4, rank=1, world_size=2).load_state_dict(state)
    with pytest.raises(AnalysisError, match="batches"):
        make(fast).load_state_dict({**state, "taken": None})
    other = make_numbered(tmp_path / "other.zarr", 1024)
    with pytest.raises(AnalysisError, match="plan was"):
        make(other).load_state_dict(state)


@pytest.mark.parametrize("settings", [{"seed": 1}, {"shuffle": False}, {"where": "position > 5"}])
def test_from_an_address_batches_are_the_same_and_requests_few(settings: Any, fast: Archive) -> None:
    settings = {"batch_size": SIZE, "buffer_bytes": SMALL, **settings}
    with serving_files(fast.path.parent) as server:
        seal_once(fast.path)
        there = open_archive(f"{server.url}/acts.zarr", cache=False)
        batches = list(pickle.loads(pickle.dumps(Loader(there, SITES, **settings))))  # noqa: S301  # as workers get it
        expected = list(Loader(fast, SITES, **settings))
        assert rows_of(iter(batches)) == rows_of(iter(expected))
        for mine, theirs in zip(batches, expected, strict=True):
            assert all(torch.equal(mine[site], theirs[site]) for site in SITES)
        n_blocks = -(-N_ROWS // 256)
        assert sum(n for path, n in server.requests.items() if "/sites/" in path) <= 3 * n_blocks


def test_chunks_stored_raw_come_once_from_an_address(tmp_path: Path) -> None:
    local = make_numbered(tmp_path / "acts.zarr", N_ROWS, "raw")
    seal_once(local.path)
    n_bytes = local[SITES[0]].specs[0].row_bytes * N_ROWS
    with serving_files(tmp_path) as server:
        there = open_archive(f"{server.url}/acts.zarr", cache=False)
        loader, before = make(there, sites=SITES[0], buffer_bytes=4 * SMALL), server.n_bytes
        assert sorted(flat(rows_of(loader))) == list(range(N_ROWS))
        assert server.n_bytes - before < 1.5 * n_bytes, "but for a chunk at the end of each buffer"


def test_a_filter_chooses_rows_and_columns_are_added(archive: Archive) -> None:
    loader = make(archive, where="label in [1, 3] and position < 5", columns=["label", "token", "position", "example"])
    seen = []
    for batch in loader:
        row = batch["row"].numpy()
        assert (batch["example"].numpy() == row // LENGTH).all()
        assert (batch["position"].numpy() == row % LENGTH).all()
        assert (batch["token"].numpy() == row // LENGTH + row % LENGTH).all()
        assert (batch["label"].numpy() == row // LENGTH % 4).all()
        assert torch.equal(batch[SITES[0]][:, 0], batch["row"].float())
        seen += row.tolist()
    expected = [row for row in range(N_ROWS) if row // LENGTH % 2 == 1 and row % LENGTH < 5]
    assert sorted(seen) == expected


def test_values_may_be_cast_and_keep_their_type_otherwise(fast: Archive) -> None:
    assert next(iter(make(fast)))[SITES[0]].dtype == torch.float32
    batch = next(iter(make(fast, dtype=torch.bfloat16)))
    assert {batch[site].dtype for site in SITES} == {torch.bfloat16}
    assert batch["row"].dtype == torch.int64


def test_memory_is_the_buffer_and_what_decoding_a_chunk_takes(fast: Archive) -> None:
    loader = make(fast, sites=SITES[0])
    assert fast[SITES[0]].specs[0].row_bytes * N_ROWS > 9 * SMALL
    tracemalloc.start()
    try:
        for _ in loader:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < SMALL + 4 * 512 * 1024 + 4 * SIZE * 2048


def test_a_loader_pickles(fast: Archive) -> None:
    loader = make(fast, where="position > 0", columns=["token", "label"])
    copied = pickle.loads(pickle.dumps(loader))  # noqa: S301  # our own
    assert rows_of(copied) == rows_of(loader)


def test_only_captured_rows_are_loaded(tmp_path: Any) -> None:
    path = make_numbered(tmp_path / "acts.zarr", 3 * HEIGHT).path
    take_back(path, 1)
    loader = Archive(path).loader(SITES[1], batch_size=100, columns=["token"])
    assert sorted(flat(rows_of(loader))) == [*range(HEIGHT), *range(2 * HEIGHT, 3 * HEIGHT)]


def test_rows_of_any_shape_and_codec(tmp_path: Any) -> None:
    archive = Archive(make_archive(tmp_path / "acts.zarr", "int8-block32"))
    for batch in archive.loader(["q.1", "resid_post.0"], batch_size=7, columns=["count"]):
        rows = batch["row"].tolist()
        np.testing.assert_array_equal(batch["q.1"].numpy(), archive["q.1"][rows])
        np.testing.assert_array_equal(batch["resid_post.0"].numpy(), archive["resid_post.0"][rows])
        assert batch["count"].tolist() == [1000 * int(archive.rows.example[row]) for row in rows]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batches of 0 rows"),
        ({"batch_size": 10_000}, r"batches of 10,000 rows .* which holds 407 rows"),
        ({"seed": -1}, "with seed -1"),
        ({"num_workers": -1}, "and -1 workers"),
        ({"rank": 3}, r"rank 3 of None.*both"),
        ({"rank": 3, "world_size": 3}, r"rank 3 of 3.*from 0"),
        ({"where": "position > 900"}, "4,992 captured rows, none with position > 900"),
        ({"columns": ["colour"]}, r"'colour'.*token, position, example"),
        ({"columns": ["name"]}, r"'name'.*string"),
        ({"columns": ["input_ids"]}, r"'input_ids'.*list"),
    ],
)
def test_impossible_settings_are_refused(fast: Archive, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        make(fast, **settings)


def test_sites_must_be_there(fast: Archive) -> None:
    with pytest.raises(UnknownSiteError):
        make(fast, sites="resid_post.9")
