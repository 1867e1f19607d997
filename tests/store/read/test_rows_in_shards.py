"""A reader returns any rows of sound files bit for bit, and an error that names the file for damaged ones."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.read.rows_in_shards import ArrayReader
from tests.store.samples import COMBINATIONS, N_ROWS, Array, Stored, flip_every_bit, make_spec, same_bits, store


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


@settings(deadline=None)
@given(rows=st.lists(st.integers(0, N_ROWS - 1), max_size=80), threads=st.integers(1, 3))
def test_any_rows_in_any_order_equal_numpys(stored: Stored, rows: list[int], threads: int) -> None:
    reader = stored.reader(threads=threads)
    assert same_bits(reader.take(rows), stored.rows[np.array(rows, np.int64)])
    assert same_bits(reader.take(np.array(rows, np.uint8)), stored.rows[np.array(rows, np.int64)])


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
    with pytest.raises(IndexError, match=rf"rows {start} to {stop} of sites/resid_post/7 .* 55"):
        stored.reader().read(start, stop)


@pytest.mark.parametrize("row", [-1, N_ROWS, 2**40])
def test_row_outside_the_array_is_an_error_that_says_the_range(stored: Stored, row: int) -> None:
    with pytest.raises(IndexError, match=rf"row {row:,} of sites/resid_post/7 .* 55"):
        stored.reader().take([3, row])


@pytest.mark.parametrize("rows", [[1.5], [[1, 2]], ["a"], 3])
def test_what_is_no_list_of_rows_is_refused(stored: Stored, rows: list[int]) -> None:
    with pytest.raises(IndexError, match="list of integers"):
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


def test_array_of_no_rows_reads_as_empty(tmp_path: Path) -> None:
    reader = ArrayReader(tmp_path, make_spec(), 0)
    assert reader.read(0, 0).shape == (0, 6)
    assert reader.take([]).shape == (0, 6)
