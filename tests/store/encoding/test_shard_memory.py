"""Shards that lie in memory as in their file: the same bytes as from any other memory, and none of them moved."""

import fcntl
import os
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.dtypes import STORAGE_DTYPES
from residua.store.encoding.shard import ShardEncoder
from residua.store.encoding.shard_memory import ShardMemory
from residua.store.encoding.spec import ArraySpec
from residua.store.storage import direct
from residua.store.storage.files import write_file
from tests.store.samples import make_rows, make_spec

Array = npt.NDArray[np.generic]
LARGE = make_spec("raw", "float16", (1024,), rows_per_shard=8192, rows_per_chunk=256)


def filled(spec: ArraySpec, rows: Array, room: int) -> ShardMemory:
    """Return memory with room for `room` rows, `rows` in the first of them and ones behind."""
    memory = ShardMemory(spec, room)
    for chunk in memory.chunks:
        chunk.view(np.uint8)[:] = 0xFF
    part = memory.first(len(rows))
    for i, chunk in enumerate(part.chunks):
        chunk[:] = rows[i * spec.rows_per_chunk : (i + 1) * spec.rows_per_chunk]
    return part


def file_of(encoded: ShardEncoder) -> bytes:
    return b"".join(bytes(part) if isinstance(part, bytes) else part.tobytes() for part in encoded)


def figures(encoded: ShardEncoder) -> tuple[int, str, int]:
    return encoded.n_bytes, encoded.digest, encoded.n_nonfinite


@settings(deadline=None)
@given(
    st.sampled_from([dtype for dtype in STORAGE_DTYPES if ShardMemory.suits(make_spec("raw", dtype))]),
    st.sampled_from([(), (1,), (3,), (2, 5)]),
    st.integers(1, 16),
    st.integers(0, 15),
    st.sampled_from([1, 2, 4, 16]),
)
def test_a_file_from_shard_memory_is_the_one_from_plain_memory(
    dtype: str, row_shape: tuple[int, ...], n_rows: int, spare: int, rows_per_chunk: int
) -> None:
    spec = make_spec("raw", dtype, row_shape, rows_per_chunk=rows_per_chunk)
    rows = make_rows(spec, n_rows)
    plain = ShardEncoder(rows, spec)
    in_place = ShardEncoder(filled(spec, rows, min(16, n_rows + spare)), spec)
    assert file_of(in_place) == file_of(plain)
    assert figures(in_place) == figures(plain)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_only_arrays_that_lie_on_disk_as_in_memory_suit(preset: str, dtype: str) -> None:
    aligned_behind_four_bytes = STORAGE_DTYPES[dtype].itemsize <= 4
    assert ShardMemory.suits(make_spec(preset, dtype)) == (preset == "raw" and aligned_behind_four_bytes)


def test_memory_is_used_again_for_other_rows() -> None:
    spec = make_spec("raw")
    memory = ShardMemory(spec, 16)
    for seed, n_rows in ((1, 16), (2, 7), (3, 16)):
        rows = make_rows(spec, n_rows, seed)
        for i, chunk in enumerate(memory.first(n_rows).chunks):
            chunk[:] = rows[4 * i : 4 * i + 4]
        assert file_of(ShardEncoder(memory.first(n_rows), spec)) == file_of(ShardEncoder(rows, spec))


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 16)), max_size=12), st.sampled_from([16, 13, 5]))
def test_what_was_looked_through_early_is_looked_through_again_once_it_changes(
    writes: list[tuple[int, int]], n_rows: int
) -> None:
    spec = make_spec("raw", "float16", (3,), rows_per_chunk=4)
    memory, rows = ShardMemory(spec, 16), make_rows(spec, 16, 0)
    for seed, (start, length) in enumerate([(0, 16), *writes]):
        stop = min(16, start + length)
        rows[start:stop] = make_rows(spec, stop - start, seed)
        rows[start] = [np.inf, -np.inf, np.nan]
        for number in range(start // 4, -(-stop // 4)):
            first, last = max(start, 4 * number), min(stop, 4 * number + 4)
            memory.chunks[number][first - 4 * number : last - 4 * number] = rows[first:last]
            memory.filled(number, last - first)
    plain, in_place = ShardEncoder(rows[:n_rows], spec), ShardEncoder(memory.first(n_rows), spec)
    assert file_of(in_place) == file_of(plain)
    assert figures(in_place) == figures(plain)


@pytest.mark.parametrize("n_rows", [0, 17])
def test_rows_that_do_not_fit_are_refused(n_rows: int) -> None:
    spec = make_spec("raw")
    with pytest.raises(ValueError, match="resid_post/7 takes 1 to 16 rows"):
        ShardEncoder(ShardMemory(spec, 17).first(n_rows), spec)


@pytest.mark.parametrize("n_rows", [8192, 8191, 5000])
def test_a_large_shard_goes_to_the_disk_from_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_rows: int
) -> None:
    rows = make_rows(LARGE, n_rows)
    memory = filled(LARGE, rows, 8192)
    inside = {"bytes": 0, "calls": 0}
    first = memory.chunks[0].ctypes.data
    real = os.write

    def watch(descriptor: int, buffer: memoryview) -> int:
        start = np.frombuffer(buffer, np.uint8).ctypes.data
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct._DIRECT:
            assert start % direct.BLOCK == buffer.nbytes % direct.BLOCK == 0
        if first <= start < first + 8192 * 2048 + 32 * 4:
            inside["bytes"] += buffer.nbytes
            inside["calls"] += 1
        return real(descriptor, buffer)

    monkeypatch.setattr(os, "write", watch)
    encoded = ShardEncoder(memory, LARGE)
    write_file(tmp_path / "0", encoded)
    assert (tmp_path / "0").read_bytes() == file_of(ShardEncoder(rows, LARGE))
    assert encoded.n_bytes - inside["bytes"] < direct.BLOCK + 32 * 16 + 4, "only the end and the index were copied"
    assert inside["calls"] > 1


def test_a_large_shard_in_a_file_system_in_memory() -> None:
    rows = make_rows(LARGE, 4097)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "0"
        write_file(path, ShardEncoder(filled(LARGE, rows, 4097), LARGE))
        assert path.read_bytes() == file_of(ShardEncoder(rows, LARGE))
