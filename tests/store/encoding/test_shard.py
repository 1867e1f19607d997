import fcntl
import hashlib
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.dtypes import STORAGE_DTYPES
from residua.store.encoding.shard import (
    ShardEncoder,
    ShardIndex,
    ShardMemory,
    check_shard,
    index_bytes,
    parse_index,
    shard_path,
    shard_rows,
)
from residua.store.encoding.spec import ArraySpec
from residua.store.storage.crc import crc32c, crc_bytes
from residua.store.storage.direct import BLOCK
from residua.store.storage.files import write_file
from tests.store.samples import COMBINATIONS, flip_every_bit, make_rows, make_spec

EMPTY = 2**64 - 1


def signed(entries: list[tuple[int, int]]) -> bytes:
    body = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    return body + crc_bytes(crc32c(body))


def parse(stored: bytes, spec: ArraySpec, n_rows: int, file_bytes: int) -> ShardIndex:
    return parse_index(stored, spec, n_rows=n_rows, file_bytes=file_bytes, path=Path("c/0/0"))


@pytest.mark.parametrize(("preset", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("n_rows", [1, 4, 11, 16])
def test_digest_and_size_are_those_of_the_file(tmp_path: Path, preset: str, dtype: str, n_rows: int) -> None:
    spec = make_spec(preset, dtype)
    encoded = ShardEncoder(make_rows(spec, n_rows), spec)
    path = tmp_path / "shard"
    write_file(path, encoded)
    data = path.read_bytes()
    assert len(data) == encoded.n_bytes

    index = data[-(16 * 4 + 4) :]
    entries = [struct.unpack_from("<QQ", index, 16 * i) for i in range(4)]
    present = [entry for entry in entries if entry != (EMPTY, EMPTY)]
    assert len(present) == -(-n_rows // 4)
    crcs = [data[offset + size - 4 : offset + size] for offset, size in present]
    assert encoded.digest == hashlib.sha256(index + b"".join(crcs)).hexdigest()
    assert check_shard(path, spec, n_rows) == encoded.digest


def test_the_last_chunk_is_padded_with_zeros() -> None:
    spec = make_spec("raw")
    rows = make_rows(spec, 5)
    data = b"".join(bytes(part) if isinstance(part, bytes) else part.tobytes() for part in ShardEncoder(rows, spec))
    second = np.frombuffer(data[52 : 52 + 48], np.uint16).reshape(4, 6)
    assert np.array_equal(second, np.concatenate([rows[4:], np.zeros((3, 6), np.uint16)]))


@pytest.mark.parametrize(("shape", "dtype"), [((0, 6), "<u2"), ((17, 6), "<u2"), ((4, 5), "<u2"), ((4, 6), "<f2")])
def test_rows_that_do_not_fit_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match="resid_post/7 takes 1 to 16 rows"):
        ShardEncoder(np.zeros(shape, dtype), make_spec())


@given(st.integers(0, 100), st.integers(0, 8))
def test_shard_rows_add_up(n_rows: int, shard: int) -> None:
    spec = make_spec()
    assert sum(shard_rows(spec, n_rows, i) for i in range(shard)) == min(n_rows, 16 * shard)


def test_shard_path_is_zarrs_default_key() -> None:
    assert shard_path(Path("a.zarr"), make_spec(row_shape=(2, 3)), 5) == Path("a.zarr/sites/resid_post/7/c/5/0/0")
    assert shard_path(Path("a.zarr"), make_spec(row_shape=()), 5) == Path("a.zarr/sites/resid_post/7/c/5")


@pytest.mark.parametrize("preset", ["raw", "fast"])
def test_every_flipped_bit_of_a_shard_file_is_noticed(tmp_path: Path, preset: str) -> None:
    spec = make_spec(preset, row_shape=(40,))
    path = tmp_path / "shard"
    write_file(path, ShardEncoder(make_rows(spec, 5), spec))
    for _ in flip_every_bit(path):
        with pytest.raises(DamagedArchiveError, match="shard"):
            check_shard(path, spec, 5)


def test_shard_cut_short_anywhere_is_noticed(tmp_path: Path) -> None:
    spec = make_spec()
    path = tmp_path / "shard"
    write_file(path, ShardEncoder(make_rows(spec, 16), spec))
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        # The file may end in a chunk as long as the index: its crc32c is right, its numbers are not.
        with pytest.raises((DamagedArchiveError, UnsafeArchiveError), match=r"cut short|the index puts chunk 0"):
            check_shard(path, spec, 16)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 100])
def test_bytes_added_to_a_shard_are_noticed(tmp_path: Path, extra: bytes) -> None:
    spec = make_spec()
    encoded = list(ShardEncoder(make_rows(spec, 16), spec))
    for parts in ([extra, *encoded], [*encoded[:-1], extra, encoded[-1]], [*encoded, extra]):
        write_file(tmp_path / "shard", parts)
        with pytest.raises((DamagedArchiveError, UnsafeArchiveError)):
            check_shard(tmp_path / "shard", spec, 16)


def test_damaged_chunks_are_all_named_with_their_rows(tmp_path: Path) -> None:
    spec = make_spec("raw")
    path = tmp_path / "shard"
    write_file(path, ShardEncoder(make_rows(spec, 15), spec))
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    data[3 * 52] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArchiveError, match=r"chunk 0 \(rows 0 to 3\).*chunk 3 \(rows 12 to 14\)"):
        check_shard(path, spec, 15)


def test_missing_shard_and_folder_in_its_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedArchiveError, match="gone is missing"):
        check_shard(tmp_path / "gone", make_spec(), 16)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DamagedArchiveError, match="folder is not a regular file"):
        check_shard(tmp_path / "folder", make_spec(), 16)


@pytest.mark.parametrize(
    "entries",
    [
        [(0, 52), (52, 52), (104, 52), (EMPTY, EMPTY)],  # one chunk too few
        [(0, 52), (52, 52), (104, 52), (104, 52)],  # two in one place
        [(52, 52), (0, 52), (104, 52), (156, 52)],  # out of order
        [(0, 52), (52, 52), (104, 52), (156, 53)],  # beyond the end
        [(0, 52), (52, 51), (103, 52), (155, 52)],  # a byte between chunks
        [(0, 52), (52, 2**63), (104, 52), (156, 52)],  # huge
        [(0, 0), (0, 104), (104, 52), (156, 52)],  # empty
        [(2**64 - 52, 52), (0, 52), (52, 52), (104, 52)],  # negative
    ],
)
def test_intact_index_with_impossible_numbers_is_refused(entries: list[tuple[int, int]]) -> None:
    with pytest.raises(UnsafeArchiveError, match="c/0/0"):
        parse(signed(entries), make_spec("raw"), 16, 208 + 68)


def test_index_with_a_chunk_past_the_last_row_is_refused() -> None:
    entries = [(52 * i, 52) for i in range(4)]
    with pytest.raises(UnsafeArchiveError, match="beyond the shard's 12 rows"):
        parse(signed(entries), make_spec("raw"), 12, 208 + 68)


numbers = st.integers(0, 300) | st.sampled_from([EMPTY, 2**63, 2**63 - 1, 2**64 - 52]) | st.integers(0, EMPTY)


@settings(max_examples=500)
@given(st.lists(st.tuples(numbers, numbers), min_size=4, max_size=4), st.integers(1, 16), st.integers(0, 400))
def test_parsed_index_lies_inside_the_file_without_overlap(
    entries: list[tuple[int, int]], n_rows: int, data_bytes: int
) -> None:
    spec = make_spec("fast")
    try:
        index = parse(signed(entries), spec, n_rows, data_bytes + index_bytes(spec))
    except (DamagedArchiveError, UnsafeArchiveError):
        return
    ends = index.offsets + index.sizes
    assert index.offsets.tolist() == [0, *ends[:-1].tolist()]
    assert ends[-1] == data_bytes


@settings(max_examples=300)
@given(st.lists(st.integers(5, 68), min_size=1, max_size=4))
def test_an_index_is_parsed_as_it_was_written(sizes: list[int]) -> None:
    spec = make_spec("fast")
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    entries = [*zip(offsets, sizes, strict=True), *[(EMPTY, EMPTY)] * (4 - len(sizes))]
    index = parse(signed(entries), spec, 4 * len(sizes), sum(sizes) + index_bytes(spec))
    assert (index.offsets.tolist(), index.sizes.tolist()) == (offsets, sizes)


@given(st.binary(max_size=100))
def test_index_of_other_bytes_is_called_damaged(stored: bytes) -> None:
    with pytest.raises(DamagedArchiveError, match="index is damaged"):
        parse(stored, make_spec(), 16, 1000)


Array = npt.NDArray[np.generic]
LARGE = make_spec("raw", "float16", (1024,), rows_per_shard=8192, rows_per_chunk=256)


def filled(spec: ArraySpec, rows: Array, room: int) -> ShardMemory:
    """Return memory with a capacity of `room` rows: `rows` first, then bytes of 0xFF."""
    memory = ShardMemory(spec, room)
    for chunk in memory.chunks:
        chunk.view(np.uint8)[:] = 0xFF
    first = memory.first(len(rows))
    for i, chunk in enumerate(first.chunks):
        chunk[:] = rows[i * spec.rows_per_chunk : (i + 1) * spec.rows_per_chunk]
    return first


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
def test_only_raw_arrays_with_aligned_values_suit(preset: str, dtype: str) -> None:
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
def test_chunks_that_were_checked_early_are_checked_again_after_a_change(
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
def test_shard_memory_of_rows_that_do_not_fit_is_refused(n_rows: int) -> None:
    spec = make_spec("raw")
    with pytest.raises(ValueError, match="resid_post/7 takes 1 to 16 rows"):
        ShardEncoder(ShardMemory(spec, 17).first(n_rows), spec)


@pytest.mark.parametrize("n_rows", [8192, 8191, 5000])
def test_a_large_shard_is_written_from_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_rows: int) -> None:
    rows = make_rows(LARGE, n_rows)
    memory = filled(LARGE, rows, 8192)
    inside = {"bytes": 0, "calls": 0}
    first = memory.chunks[0].ctypes.data
    real = os.write

    def watch(descriptor: int, buffer: memoryview) -> int:
        start = np.frombuffer(buffer, np.uint8).ctypes.data
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            assert start % BLOCK == buffer.nbytes % BLOCK == 0
        if first <= start < first + 8192 * 2048 + 32 * 4:
            inside["bytes"] += buffer.nbytes
            inside["calls"] += 1
        return real(descriptor, buffer)

    monkeypatch.setattr(os, "write", watch)
    encoded = ShardEncoder(memory, LARGE)
    write_file(tmp_path / "0", encoded)
    assert (tmp_path / "0").read_bytes() == file_of(ShardEncoder(rows, LARGE))
    assert encoded.n_bytes - inside["bytes"] < BLOCK + 32 * 16 + 4, "only the end and the index were copied"
    assert inside["calls"] > 1


def test_a_large_shard_in_a_file_system_in_memory() -> None:
    rows = make_rows(LARGE, 4097)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "0"
        write_file(path, ShardEncoder(filled(LARGE, rows, 4097), LARGE))
        assert path.read_bytes() == file_of(ShardEncoder(rows, LARGE))
