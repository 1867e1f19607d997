"""A loader inside other loaders: torchdata's, accelerate's, and torch's, over ranks and workers."""

import gc
import json
import multiprocessing
import pickle
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]  # it ships no types
from accelerate.data_loader import IterableDatasetShard  # type: ignore[import-untyped]  # it ships no types
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]  # it ships no types

from residua.analysis.loader import loader as loader_module
from residua.analysis.loader.loader import Loader
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

N_ROWS, SIZE = 500, 30
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Return an archive whose examples 2i and 2i + 1 are windows of a document; document 20 is a copy of document 0."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 50, 10).tolist() for _ in range(50)]
    ids[40:42] = ids[:2]
    return write_rows(
        tmp_path_factory.mktemp("loader") / "a.zarr",
        [10] * 50,
        {"resid_post.0": np.arange(N_ROWS, dtype=np.float32)[:, None]},
        columns={"source_index": [i // 2 for i in range(50)], "author": [i // 10 for i in range(50)]},
        input_ids=ids,
        rows_per_shard=512,
    )


@pytest.fixture(autouse=True)
def no_worker_stays() -> Iterator[None]:
    """End the workers of a loader that failed: its traceback holds it until garbage is collected."""
    before = set(multiprocessing.active_children())
    yield
    gc.collect()
    assert set(multiprocessing.active_children()) <= before


def make(archive: Archive, **settings: Any) -> Loader:
    return archive.loader("resid_post.0", batch_size=SIZE, seed=3, **settings)


def rows_of(batches: Any) -> list[list[int]]:
    return [batch["row"].tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def place(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    """Let `torch.distributed` say that this is one of several ranks."""
    for name, value in {"is_initialized": True, "get_rank": rank, "get_world_size": world_size}.items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)


@pytest.mark.parametrize(
    ("n_workers", "taken"), [(0, 0), (0, 5), (0, 16), (0, 17), (1, 5), (2, 0), (2, 1), (2, 6), (2, 17)]
)
def test_torchdata_continues_where_it_stopped(archive: Archive, n_workers: int, taken: int) -> None:
    def stateful() -> Any:
        return StatefulDataLoader(make(archive), batch_size=None, num_workers=n_workers)

    expected = rows_of(DataLoader(make(archive), batch_size=None, num_workers=n_workers))
    assert sorted(flat(expected)) == list(range(N_ROWS))
    begun: Any = stateful()
    iterator = iter(begun)
    assert rows_of(islice(iterator, taken)) == expected[:taken]
    state = pickle.loads(pickle.dumps(begun.state_dict()))  # noqa: S301  # our own
    resumed = stateful()
    resumed.load_state_dict(state)
    assert rows_of(resumed) == expected[taken:]
    assert rows_of(resumed) == expected


def test_torchdata_keeps_the_epoch(archive: Archive) -> None:
    loader = make(archive)
    loader.set_epoch(4)
    expected = rows_of(DataLoader(loader, batch_size=None, num_workers=2))
    begun: Any = StatefulDataLoader(loader, batch_size=None, num_workers=2)
    assert rows_of(islice(iter(begun), 3)) == expected[:3]
    resumed: Any = StatefulDataLoader(make(archive), batch_size=None, num_workers=2)
    resumed.load_state_dict(begun.state_dict())
    assert rows_of(resumed) == expected[3:]


def test_the_state_of_a_worker_is_not_that_of_a_rank(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(archive)
    monkeypatch.setattr(loader_module, "get_worker_info", lambda: SimpleNamespace(id=1, num_workers=2))
    iterator = iter(loader)
    next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["worker"], state["taken"], state["num_workers"]) == (1, 1, 2)
    rest = rows_of(iterator)
    resumed = make(archive)
    resumed.load_state_dict(state)
    assert rows_of(resumed) == rest
    monkeypatch.setattr(loader_module, "get_worker_info", lambda: SimpleNamespace(id=1, num_workers=3))
    other = make(archive)
    other.load_state_dict(state)
    with pytest.raises(AnalysisError, match=r"2 workers .* 3"):
        iter(other)
    monkeypatch.undo()
    with pytest.raises(AnalysisError, match=r"worker 1.*StatefulDataLoader"):
        make(archive).load_state_dict(state)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_loader_made_before_the_process_group_knows_its_rank(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, n_workers: int
) -> None:
    loaders = [make(archive, num_workers=n_workers), DataLoader(make(archive), batch_size=None, num_workers=n_workers)]
    for loader in loaders:
        seen = []
        for rank in range(3):
            place(monkeypatch, rank, 3)
            seen += flat(rows_of(loader))
        assert sorted(seen) == list(range(N_ROWS))
    assert isinstance(loaders[0], Loader)
    assert len(loaders[0]) == 6
    assert loaders[0].state_dict()["rank"] == 2


def test_a_worker_that_is_no_process_of_the_group_has_the_rank_of_its_parent(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that are spawned get the loader pickled, and have no process group."""
    place(monkeypatch, 1, 3)
    sent = pickle.dumps(make(archive))
    monkeypatch.undo()
    monkeypatch.setattr(loader_module, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=1))
    assert rows_of(pickle.loads(sent)) == rows_of(make(archive, rank=1, world_size=3))  # noqa: S301  # our own


@pytest.mark.parametrize("n_workers", [0, 2])
def test_dividing_twice_is_refused(archive: Archive, monkeypatch: pytest.MonkeyPatch, n_workers: int) -> None:
    own: Any = DataLoader(make(archive), batch_size=None, num_workers=n_workers)
    prepared: Any = Accelerator(cpu=True).prepare(own)
    assert sorted(flat(rows_of(prepared))) == list(range(N_ROWS))  # in one process there is nothing to divide
    place(monkeypatch, 0, 2)
    with pytest.raises(AnalysisError, match=r"accelerate.*2 processes.*rank=0, world_size=1"):
        rows_of(prepared)


def test_other_dividers_are_refused_unless_they_alone_divide(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    def shards(**settings: Any) -> Iterator[list[int]]:
        for rank in range(2):
            place(monkeypatch, rank, 2)
            yield flat(rows_of(IterableDatasetShard(make(archive, **settings), 1, True, 2, rank)))

    with pytest.raises(AnalysisError, match=r"accelerate"):
        list(shards())
    assert len({*flat(list(shards(rank=0, world_size=1)))}) >= N_ROWS - SIZE


def test_splits_divide_no_document(archive: Archive) -> None:
    """Whatever the seed of the order, train and test are the same; copies of a document stay together."""
    train, test = (
        {*flat(rows_of(make(archive, split=split, test_fraction=0.2, shuffle=shuffle)))}
        for split, shuffle in (("train", True), ("test", False))
    )
    assert train | test == set(range(N_ROWS))
    assert not train & test
    assert (0 in {row // 20 for row in test}) == (20 in {row // 20 for row in test})
    for row in range(0, N_ROWS, 20):
        assert len({one in test for one in range(row, row + 20)}) == 1
    authors = [
        {row // 100 for row in flat(rows_of(make(archive, split=split, test_fraction=0.3, group="author")))}
        for split in ("train", "test")
    ]
    assert authors[0] & authors[1] == set()
    assert all(authors)
    late = flat(rows_of(make(archive, split="test", test_fraction=0.2, where="position > 4")))
    assert sorted(late) == sorted(row for row in test if row % 10 > 4)
    with pytest.raises(AnalysisError, match=r"'tset'.*train or test"):
        make(archive, split="tset")
    state = make(archive, split="test").state_dict()
    with pytest.raises(AnalysisError, match=r"split was .*test"):
        make(archive, split="train").load_state_dict(json.loads(json.dumps(state)))
    make(archive, split="test").load_state_dict(json.loads(json.dumps(state)))


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_process_group_that_appears_in_mid_iteration_is_refused(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, n_workers: int
) -> None:
    loader = make(archive, num_workers=n_workers)
    running, given = iter(loader), iter(make(archive, rank=0, world_size=1))
    _ = next(running), next(given)
    place(monkeypatch, 0, 1)
    next(running)
    place(monkeypatch, 1, 2)
    with pytest.raises(AnalysisError, match=r"rank 0 of 1.*rank 1 of 2.*init_process_group"):
        next(running)
    next(given)
    of_rank = flat(rows_of(make(archive)))
    assert len(of_rank) == N_ROWS // 2
    again = iter(loader)  # begun anew, it has the rows of its rank
    assert flat(rows_of(again)) == of_rank or n_workers
