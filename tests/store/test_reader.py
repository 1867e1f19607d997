import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.store.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.mapped import OPEN_SHARDS, MappedShard, OpenShards
from residua.store.reader import ArrayReader
from residua.store.spec import ArraySpec
from tests.store.samples import COMBINATIONS, Array, flip_every_bit, make_rows, make_spec, same_bits, write_array

N_ROWS = 16 * 3 + 7  # the last shard is short, and so is its last chunk


@dataclass(frozen=True)
class Stored:
    root: Path
    spec: ArraySpec
    rows: Array
    shards: list[Path]

    def reader(self, **settings: object) -> ArrayReader:
        return ArrayReader(self.root, self.spec, len(self.rows), **settings)  # type: ignore[arg-type]  # as given


def store(root: Path, spec: ArraySpec, n_rows: int = N_ROWS) -> Stored:
    rows = make_rows(spec, n_rows)
    return Stored(root, spec, rows, write_array(root, spec, rows))


@pytest.fixture(scope="module", params=["raw", "fast"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return store(tmp_path_factory.mktemp("archive"), make_spec(request.param, row_shape=(3, 5)))


@pytest.fixture
def fresh(stored: Stored, tmp_path: Path) -> Stored:
    """The same array in a folder that a test may damage."""
    return store(tmp_path, stored.spec)


@pytest.mark.parametrize(("preset", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("row_shape", [(), (6,), (2, 3)])
def test_rows_come_back_bit_for_bit(tmp_path: Path, preset: str, dtype: str, row_shape: tuple[int, ...]) -> None:
    kept = store(tmp_path, make_spec(preset, dtype, row_shape))
    reader = kept.reader()
    assert same_bits(reader.read(0, N_ROWS), kept.rows)
    order = np.random.default_rng(0).permutation(N_ROWS)
    assert same_bits(reader.take(order), kept.rows[order])
    assert reader.read(0, 1).dtype == kept.spec.storage_dtype


@settings(deadline=None)
@given(data=st.data())
def test_any_slice_equals_numpys(stored: Stored, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, N_ROWS))
    stop = data.draw(st.integers(start, N_ROWS))
    reader = stored.reader(
        check=data.draw(st.sampled_from(["once", "always", "never"])), threads=data.draw(st.integers(1, 3))
    )
    assert same_bits(reader.read(start, stop), stored.rows[start:stop])
    out = np.empty_like(stored.rows[start:stop])
    reader.read_into(out, start, stop)
    assert same_bits(out, stored.rows[start:stop])
    reader.close()


@settings(deadline=None)
@given(rows=st.lists(st.integers(0, N_ROWS - 1), max_size=80), threads=st.integers(1, 3))
def test_any_rows_in_any_order_equal_numpys(stored: Stored, rows: list[int], threads: int) -> None:
    reader = stored.reader(threads=threads)
    assert same_bits(reader.take(rows), stored.rows[np.array(rows, np.int64)])
    assert same_bits(reader.take(np.array(rows, np.uint8)), stored.rows[np.array(rows, np.int64)])
    reader.close()


@settings(deadline=None, max_examples=40)
@given(
    rows_per_chunk=st.integers(1, 9),
    chunks_per_shard=st.integers(1, 5),
    n_rows=st.integers(1, 100),
    width=st.integers(1, 300),
    preset=st.sampled_from(["raw", "fast", "small"]),
)
def test_any_sizes_are_written_and_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows_per_chunk: int,
    chunks_per_shard: int,
    n_rows: int,
    width: int,
    preset: str,
) -> None:
    height = rows_per_chunk * chunks_per_shard
    spec = make_spec(preset, "float32", (width,), rows_per_shard=height, rows_per_chunk=rows_per_chunk)
    kept = store(tmp_path_factory.mktemp("archive"), spec, min(n_rows, 4 * height))
    assert same_bits(kept.reader().read(0, len(kept.rows)), kept.rows)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, N_ROWS + 1), (5, 4), (N_ROWS + 1, N_ROWS + 1)])
def test_slice_outside_the_array_is_an_error_that_says_the_range(stored: Stored, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=rf"rows {start} to {stop} were asked of sites/resid_post/7, which has 55"):
        stored.reader().read(start, stop)


@pytest.mark.parametrize("row", [-1, N_ROWS, 2**40])
def test_row_outside_the_array_is_an_error_that_says_the_range(stored: Stored, row: int) -> None:
    with pytest.raises(IndexError, match=rf"row {row:,} was asked of sites/resid_post/7, which has 55"):
        stored.reader().take([3, row])


@pytest.mark.parametrize("rows", [[1.5], [[1, 2]], ["a"], 3])
def test_what_is_no_list_of_rows_is_refused(stored: Stored, rows: list[int]) -> None:
    with pytest.raises(IndexError, match="chosen by a list of integers"):
        stored.reader().take(rows)


@pytest.mark.parametrize(
    "out",
    [np.empty((4, 3, 5), "<u2"), np.empty((5, 3, 5), "<f2"), np.empty((5, 3, 10), "<u2")[..., ::2]],
    ids=["rows", "dtype", "strides"],
)
def test_target_that_does_not_fit_is_refused(stored: Stored, out: Array) -> None:
    with pytest.raises(ValueError, match="need a C-contiguous uint16 array"):
        stored.reader().read_into(out, 0, 5)


def test_every_flipped_bit_is_an_error_that_names_the_file(fresh: Stored) -> None:
    path = fresh.shards[1]
    for _ in flip_every_bit(path):
        with pytest.raises(DamagedArchiveError) as caught:
            fresh.reader(threads=1).read(0, N_ROWS)
        assert str(path) in str(caught.value)


def test_damage_elsewhere_leaves_other_chunks_readable(fresh: Stored) -> None:
    path = fresh.shards[0]
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    reader = fresh.reader()
    assert same_bits(reader.read(4, N_ROWS), fresh.rows[4:])
    assert same_bits(reader.take([5, 40]), fresh.rows[[5, 40]])
    for rows in ([3], [40, 0]):
        with pytest.raises(DamagedArchiveError, match=r"c/0/0/0: chunk 0 \(rows 0 to 3\) is damaged"):
            reader.take(rows)


def test_rows_in_a_message_are_those_of_the_array(fresh: Stored) -> None:
    path = fresh.shards[3]
    data = bytearray(path.read_bytes())
    data[-(4 * 16 + 4) - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArchiveError, match=r"c/3/0/0: chunk 1 \(rows 52 to 54\)"):
        fresh.reader().read(0, N_ROWS)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_shard_cut_short_is_an_error_that_names_it(
    stored: Stored, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kept = store(tmp_path_factory.mktemp("archive"), stored.spec, 30)
    path = kept.shards[1]
    size = data.draw(st.integers(0, path.stat().st_size - 1))
    os.truncate(path, size)
    with pytest.raises((DamagedArchiveError, UnsafeArchiveError), match="c/1/0/0: the"):
        kept.reader().read(0, 30)


def test_missing_shard_is_named(fresh: Stored) -> None:
    fresh.shards[2].unlink()
    reader = fresh.reader()
    assert same_bits(reader.read(0, 32), fresh.rows[:32])
    with pytest.raises(DamagedArchiveError, match="c/2/0/0 is missing"):
        reader.take([0, 33])


def test_shard_of_another_height_is_refused(fresh: Stored) -> None:
    fresh.shards[0].write_bytes(fresh.shards[3].read_bytes())
    with pytest.raises(UnsafeArchiveError, match="c/0/0/0: the index puts chunk 2"):
        fresh.reader().read(0, 1)


def test_chunks_are_checked_once_always_or_never_as_asked(tmp_path: Path) -> None:
    kept = store(tmp_path, make_spec("raw"))
    readers = {check: kept.reader(check=check) for check in ("once", "always", "never")}
    for reader in readers.values():
        reader.read(0, N_ROWS)
    with kept.shards[0].open("r+b") as file:
        file.write(bytes([kept.shards[0].read_bytes()[0] ^ 1]))
    with pytest.raises(DamagedArchiveError):
        readers["always"].read(0, 1)
    with pytest.raises(DamagedArchiveError):
        readers["always"].take([0])
    for check in ("once", "never"):
        assert readers[check].read(0, 1)[0, 0] == kept.rows[0, 0] ^ 1
    assert kept.reader(check="never").take([0])[0, 0] == kept.rows[0, 0] ^ 1


def test_chunks_stay_verified_when_their_files_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store(tmp_path, make_spec("raw"))
    monkeypatch.setattr("residua.store.reader.OPEN_SHARDS", OpenShards(1))
    compared: list[Array] = []
    monkeypatch.setattr("residua.store.mapped.check_chunk", compared.append)
    reader = kept.reader()
    for _ in range(3):
        assert same_bits(reader.read(0, N_ROWS), kept.rows)
        assert same_bits(reader.take([50, 0]), kept.rows[[50, 0]])
    assert len(compared) == -(-N_ROWS // kept.spec.rows_per_chunk)
    reader.close()
    reader.read(0, 1)
    assert len(compared) == -(-N_ROWS // kept.spec.rows_per_chunk) + 1


def test_all_readers_share_their_threads(tmp_path: Path) -> None:
    kept = store(tmp_path, make_spec("fast"))
    readers = [kept.reader(threads=4) for _ in range(40)]
    for reader in readers:
        reader.read(0, N_ROWS)
    assert sum("residua-reader" in thread.name for thread in threading.enumerate()) <= max(4, os.cpu_count() or 1)


def test_reader_pickles_as_its_path(stored: Stored) -> None:
    reader = stored.reader(check="always", threads=2)
    reader.read(0, N_ROWS)
    text = pickle.dumps(reader)
    assert len(text) < 2000
    assert same_bits(pickle.loads(text).read(0, N_ROWS), stored.rows)  # noqa: S301  # just made above


def _read_in_child(reader: ArrayReader, expected: Array, answers: "multiprocessing.Queue[bool]") -> None:
    answers.put(same_bits(reader.read(0, N_ROWS), expected) and same_bits(reader.take([50, 0]), expected[[50, 0]]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_reader_works_in_a_child_process(stored: Stored, method: str) -> None:
    reader = stored.reader(threads=3)
    reader.read(0, N_ROWS)
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_read_in_child, args=(reader, stored.rows, answers))
    child.start()
    assert answers.get(timeout=60)
    child.join()
    assert same_bits(reader.read(0, N_ROWS), stored.rows)


def test_many_threads_share_a_reader(stored: Stored) -> None:
    reader = stored.reader(threads=2)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            rows = rng.integers(0, N_ROWS, 40)
            start = int(rng.integers(0, N_ROWS))
            if not (
                same_bits(reader.take(rows), stored.rows[rows])
                and same_bits(reader.read(start, N_ROWS), stored.rows[start:])
            ):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_error_in_a_thread_reaches_the_caller(fresh: Stored) -> None:
    fresh.shards[-1].unlink()
    with pytest.raises(DamagedArchiveError, match="c/3/0/0 is missing"):
        fresh.reader(threads=4).read(0, N_ROWS)


def test_closed_reader_lets_its_files_go_and_opens_them_again(fresh: Stored) -> None:
    before = len(OPEN_SHARDS)
    reader = fresh.reader()
    reader.read(0, N_ROWS)
    assert len(OPEN_SHARDS) == before + 4
    reader.close()
    assert len(OPEN_SHARDS) == before
    assert same_bits(reader.read(0, N_ROWS), fresh.rows)
    del reader
    assert len(OPEN_SHARDS) == before


def mapped(kept: Stored, n_shards: int) -> Iterator[MappedShard]:
    for shard in range(n_shards):
        yield MappedShard(kept.root, kept.spec, shard, N_ROWS)


def test_only_so_many_shards_stay_open_and_the_one_unused_for_longest_goes(stored: Stored) -> None:
    kept = OpenShards(2)
    first, second, third = mapped(stored, 3)
    owner = object()
    assert kept.get((owner, 0), lambda: first) is first
    assert kept.get((owner, 1), lambda: second) is second
    assert kept.get((owner, 0), lambda: third) is first
    kept.get((owner, 2), lambda: third)
    assert len(kept) == 2
    assert kept.get((owner, 0), lambda: second) is first
    assert kept.get((owner, 1), lambda: third) is third
    kept.drop(object())
    assert len(kept) == 2
    kept.drop(owner)
    assert len(kept) == 0


def test_array_of_no_rows_reads_as_empty(tmp_path: Path) -> None:
    reader = ArrayReader(tmp_path, make_spec(), 0)
    assert reader.read(0, 0).shape == (0, 6)
    assert reader.take([]).shape == (0, 6)


def test_mapped_bytes_can_be_limited(stored: Stored) -> None:
    kept = OpenShards(10)
    shards = list(mapped(stored, 3))
    kept.limit(shards[0].n_bytes + shards[1].n_bytes)
    owner = object()
    for i in range(3):
        kept.get((owner, i), iter(shards[i:]).__next__)
    assert len(kept) == 2
    assert kept.get((owner, 2), lambda: shards[0]) is shards[2]
    kept.limit(0)
    kept.get((owner, 3), lambda: shards[0])
    assert len(kept) == 1
