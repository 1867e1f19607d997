"""Several epochs in one iteration, and training that continues with another number of ranks or workers."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]  # it ships no types

from residua.analysis.loader.loader import Loader
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

N_ROWS, SIZE, WIDTH = 1010, 30, 4
ROW_BYTES = 4 * WIDTH + 16
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return write_rows(
        tmp_path_factory.mktemp("epochs") / "a.zarr",
        [10] * (N_ROWS // 10),
        {"resid_post.0": np.tile(np.arange(N_ROWS, dtype=np.float32)[:, None], WIDTH)},
        rows_per_shard=256,
        codec="raw",
    )


def make(archive: Archive, **settings: Any) -> Loader:
    """Return a loader whose buffer holds 75 rows, of blocks of 16."""
    buffers = {"buffer_bytes": 75 * ROW_BYTES, "raw_block_bytes": 16 * 4 * WIDTH}
    given: dict[str, Any] = {"batch_size": SIZE, "seed": 3, **buffers, **settings}
    return archive.loader("resid_post.0", **given)


def rows_of(batches: Any) -> list[list[int]]:
    return [batch["row"].tolist() for batch in batches]


def flat(batches: Sequence[Sequence[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def plain(state: Any) -> Any:
    return json.loads(json.dumps(state))


def ranks(archive: Archive, world_size: int, **settings: Any) -> list[Loader]:
    return [make(archive, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]


def taken(loaders: Sequence[Loader], n_batches: int) -> list[int]:
    """Take batches on every rank, step by step."""
    iterators: list[Iterator[Any]] = [iter(loader) for loader in loaders]
    return [row for _ in range(n_batches) for each in iterators for row in next(each)["row"].tolist()]


@pytest.mark.parametrize("settings", [{}, {"drop_last": True}, {"num_workers": 2}, {"shuffle": False}])
def test_an_endless_loader_gives_one_epoch_after_the_other(archive: Archive, settings: dict[str, Any]) -> None:
    expected = []
    for epoch in range(3):
        one = make(archive, **settings)
        one.set_epoch(epoch)
        expected += rows_of(one)
    endless = make(archive, epochs=None, **settings)
    found = rows_of(islice(iter(endless), len(expected)))
    if not settings.get("num_workers"):  # workers have other buffers in other epochs
        assert found == expected
    per_epoch = endless.batches_per_epoch
    for epoch in range(3):
        rows = flat(found[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(rows) == len(set(rows)) == (990 if settings.get("drop_last") else N_ROWS)
    assert rows_of(make(archive, epochs=3, **settings)) == found
    assert len(make(archive, epochs=3, **settings)) == len(found)
    with pytest.raises(TypeError, match=f"{per_epoch} batches"):
        len(endless)


@pytest.mark.parametrize("n_taken", [1, 33, 34, 35, 68, 80])
def test_what_follows_after_a_stop_in_any_epoch(archive: Archive, n_taken: int) -> None:
    expected = rows_of(islice(iter(make(archive, epochs=None)), n_taken + 40))
    begun = make(archive, epochs=None)
    taken([begun], n_taken)
    state = plain(begun.state_dict())
    assert state["epoch"] == state["passed"] == (n_taken - 1) // 34
    assert state["taken"] == n_taken - 34 * state["passed"]
    assert plain(make(archive, epochs=None).state_dict(taken=n_taken)) == state
    resumed = make(archive, epochs=None)
    resumed.load_state_dict(state)
    assert plain(resumed.state_dict()) == state
    resumed.set_epoch(state["epoch"])  # as a loop over epochs does
    assert rows_of(islice(iter(resumed), 40)) == expected[n_taken:]


def test_workers_and_torchdata_go_through_epochs(archive: Archive) -> None:
    expected = rows_of(make(archive, epochs=3, num_workers=2))
    assert rows_of(DataLoader(make(archive, epochs=3), batch_size=None, num_workers=2)) == expected
    begun: Any = StatefulDataLoader(make(archive, epochs=3), batch_size=None, num_workers=2)
    assert rows_of(islice(iter(begun), 39)) == expected[:39]
    resumed: Any = StatefulDataLoader(make(archive, epochs=3), batch_size=None, num_workers=2)
    resumed.load_state_dict(plain(begun.state_dict()))
    assert rows_of(resumed) == expected[39:]
    own = make(archive, epochs=3, num_workers=2)
    assert rows_of(islice(iter(own), 39)) == expected[:39]
    again = make(archive, epochs=3, num_workers=2)
    again.load_state_dict(plain(own.state_dict()))
    assert rows_of(again) == expected[39:]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2), (3, 1), (2, 5)])
@pytest.mark.parametrize("settings", [{}, {"shuffle": False}, {"where": "position > 2", "batch_size": 7}])
def test_other_ranks_get_the_rows_that_nobody_took(
    archive: Archive, before: int, after: int, settings: dict[str, Any]
) -> None:
    expected = {row for row in range(N_ROWS) if row % 10 > 2 or "where" not in settings}
    for n_taken in (1, 4, 8):
        begun = ranks(archive, before, epochs=None, **settings)
        seen = taken(begun, n_taken)
        states = [plain(loader.state_dict()) for loader in begun]
        resumed = ranks(archive, after, **settings)
        for loader in resumed:
            loader.load_state_dict(states)
        parts = [rows_of(loader) for loader in resumed]
        assert Counter(seen + flat(flat(parts))) == Counter(expected)  # type: ignore[arg-type]  # batches of ranks
        lengths = [len(flat(part)) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        again = [rows_of(loader) for loader in resumed]  # the next iteration is of whole epochs
        assert Counter(flat(flat(again))) == Counter(expected)  # type: ignore[arg-type]  # batches of ranks


def test_an_epoch_may_be_divided_again_and_again(archive: Archive) -> None:
    """From 1 rank to 2, 4, 3 and 1, each time in the middle of what was divided; then a whole epoch."""
    seen: list[int] = []
    states: list[Any] = []
    loaders = ranks(archive, 1, epochs=None)
    for world_size, n_batches in [(1, 5), (2, 3), (4, 2), (3, 2)]:
        loaders = ranks(archive, world_size, epochs=None)
        for loader in loaders if states else []:
            loader.load_state_dict(states)
        seen += taken(loaders, n_batches)
        states = [plain(loader.state_dict()) for loader in loaders]
        assert states[0]["epoch"] == 0
    (last,) = ranks(archive, 1, epochs=None)
    last.load_state_dict(states)
    n_left = -(-(N_ROWS - len(seen)) // SIZE)
    batches = rows_of(islice(iter(last), n_left + 34))
    assert Counter(seen + flat(batches[:n_left])) == Counter(range(N_ROWS))
    following = make(archive)
    following.set_epoch(1)
    assert batches[n_left:] == rows_of(following)
    assert last.state_dict()["epoch"] == 1
    assert last.state_dict()["divided"] == []


@pytest.mark.parametrize("drop_last", [False, True])
def test_after_the_last_batch_of_an_epoch_other_ranks_begin_the_next(archive: Archive, drop_last: bool) -> None:
    begun = ranks(archive, 2, epochs=None, drop_last=drop_last)
    per_epoch = begun[0].batches_per_epoch
    taken(begun, per_epoch)
    states = [plain(loader.state_dict()) for loader in begun]
    assert {state["taken"] for state in states} == {per_epoch}
    resumed = ranks(archive, 3, epochs=None, drop_last=drop_last)
    for loader in resumed:
        loader.load_state_dict(states)
    rows = taken(resumed, resumed[0].batches_per_epoch)
    assert len(rows) == len(set(rows)) == (990 if drop_last else N_ROWS)
    assert {loader.state_dict()["epoch"] for loader in resumed} == {1}


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 1)])
def test_other_numbers_of_workers_get_the_rest(archive: Archive, before: int, after: int) -> None:
    begun = make(archive, num_workers=before)
    seen = flat(rows_of(islice(iter(begun), 9)))
    resumed = make(archive, num_workers=after)
    resumed.load_state_dict(plain(begun.state_dict()))
    iterator = iter(resumed)
    seen += flat(rows_of(islice(iterator, 4)))
    once_more = make(archive, num_workers=after)
    once_more.load_state_dict(plain(resumed.state_dict()))
    rest = rows_of(once_more)
    assert rest == rows_of(iterator)
    assert Counter(seen + flat(rest)) == Counter(range(N_ROWS))


def test_with_drop_last_no_row_comes_twice(archive: Archive) -> None:
    begun = ranks(archive, 4, drop_last=True)
    seen = taken(begun, 3)
    resumed = ranks(archive, 3, drop_last=True)
    for loader in resumed:
        loader.load_state_dict([plain(one.state_dict()) for one in begun])
    parts = [rows_of(loader) for loader in resumed]
    assert {len(batch) for part in parts for batch in part} == {SIZE}
    assert len({len(part) for part in parts}) == 1
    rows = Counter(seen + flat(flat(parts)))  # type: ignore[arg-type]  # batches of ranks
    assert set(rows.values()) == {1}
    assert N_ROWS - len(rows) < 3 * (SIZE + 1)


def test_states_that_say_too_little_are_refused(archive: Archive) -> None:
    begun = ranks(archive, 4, epochs=None)
    taken(begun, 2)
    states = [loader.state_dict() for loader in begun]
    own = make(archive, rank=2, world_size=4)
    own.load_state_dict(states)
    expected = rows_of(own)
    own.load_state_dict(states[2])  # with as many ranks its own is enough
    assert rows_of(own) == expected
    with pytest.raises(AnalysisError, match=r"rank 2 of 4.*states of all 4 ranks"):
        own.load_state_dict(states[1])
    with pytest.raises(AnalysisError, match=r"rank 0 of 1.*states of all 4 ranks"):
        make(archive).load_state_dict(states[0])
    with pytest.raises(AnalysisError, match=r"ranks \[0, 1, 2\] of 4"):
        make(archive).load_state_dict(states[:3])
    next(iter(begun[0]))
    late = [*states[:3], {**states[3], "epoch": 1, "passed": 1}]
    with pytest.raises(AnalysisError, match=r"rank 3 in epoch 1.*drop_last"):
        make(archive).load_state_dict(late)
    for broken in ({"divided": [[0, []]]}, {"taken": None}, {"passed": 9}, {"divided": 3}, {"rank": 7}):
        with pytest.raises(AnalysisError, match="state"):
            make(archive).load_state_dict({**states[0], **broken})
    with pytest.raises(AnalysisError, match="state"):
        make(archive).load_state_dict([])


def test_endless_loaders_without_a_full_batch_are_refused(archive: Archive) -> None:
    with pytest.raises(AnalysisError, match=r"101 rows fill no batch of 60"):
        iter(make(archive, epochs=None, batch_size=60, drop_last=True, where="position == 0", rank=0, world_size=2))
    with pytest.raises(AnalysisError, match="0 epochs"):
        make(archive, epochs=0)


def test_rows_that_other_labels_choose_are_refused(tmp_path: Path) -> None:
    """A condition may name a side table, which may have changed since."""
    values = np.zeros((40, 2), np.float32)
    archive = write_rows(tmp_path / "a.zarr", [10] * 4, {"resid_post.0": values})
    archive.annotate({"example": range(4), "good": [True, True, False, False]}, name="judge")
    first = archive.loader("resid_post.0", batch_size=5, where="good == true")
    next(iter(first))
    state = plain(first.state_dict())
    archive.annotate({"example": range(4), "good": [True, False, True, False]}, name="judge", replace=True)
    later = archive.loader("resid_post.0", batch_size=5, where="good == true")
    with pytest.raises(AnalysisError, match="chosen was"):
        later.load_state_dict(state)
    later.load_state_dict({name: value for name, value in state.items() if name != "chosen"})  # of earlier versions
