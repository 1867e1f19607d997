import struct
import sys
import threading
from importlib import import_module
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.blosc import decompress

from residua.store.base.errors import PlanError
from residua.store.encoding.blosc import decode_frame, encode_frame
from residua.store.encoding.codecs import (
    PRESETS,
    check_chunk,
    codecs_metadata,
    decode_chunk,
    encode_chunk,
    max_chunk_bytes,
)
from residua.store.storage.crc import crc32c
from tests.store.samples import COMBINATIONS, Array, make_rows, make_spec, same_bits

EFFORTS = ["fast", "small", "matches"]


def joined(parts: list[bytes | Array]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts), np.uint8)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_crc32c_gives_the_values_of_rfc_3720(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
    assert crc32c(np.frombuffer(data, np.uint8)[1:], crc32c(data[:1])) == expected


@pytest.mark.parametrize("n_bytes", [2**16 - 1, 2**16, 2**16 + 3, 2**20])
def test_crc32c_of_a_large_piece_can_be_computed_in_slices(n_bytes: int) -> None:
    data = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, dtype=np.uint8)
    expected = 0
    for start in range(0, n_bytes, 1000):
        expected = google_crc32c.extend(expected, data[start : start + 1000])
    assert crc32c(data) == crc32c(data.tobytes()) == crc32c(data[5:], crc32c(data[:5])) == expected
    with pytest.raises(ValueError, match="contiguous"):
        crc32c(np.repeat(data, 2)[::2])


def test_crc32c_lets_other_threads_run() -> None:
    """With a switch interval of 1000 s, the other thread runs only if the call releases Python's lock."""
    data, go, went_on = np.zeros(2**24, np.uint8), threading.Event(), threading.Event()

    def other() -> None:
        go.wait()
        went_on.set()

    thread = threading.Thread(target=other)
    thread.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        go.set()
        n_calls = 0
        while not went_on.is_set() and n_calls < 300:
            crc32c(data)
            n_calls += 1
        assert went_on.is_set()
    finally:
        sys.setswitchinterval(before)
        thread.join()


@settings(deadline=None)
@given(
    st.sampled_from(["bfloat16", "float32", "float64", "int8", "int32", "int64"]),
    st.sampled_from(EFFORTS),
    st.integers(1, 700),
    st.integers(0, 2**32),
)
def test_any_blosc_decoder_reads_a_frame(dtype: str, effort: str, n_items: int, seed: int) -> None:
    values = make_rows(make_spec(dtype=dtype, row_shape=()), n_items, seed)
    frame = joined(encode_frame(values, effort))
    assert decompress(frame.tobytes()) == values.tobytes()
    out = np.empty_like(values)
    decode_frame(frame, out)
    assert same_bits(out, values)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("fill", [0, 0x7FC0, 0xFFFF])
def test_constant_values_shrink_to_almost_nothing(effort: str, fill: int) -> None:
    values = np.full(100_000, fill, np.uint16)
    frame = joined(encode_frame(values, effort))
    assert frame.size < 200
    assert decompress(frame.tobytes()) == values.tobytes()


def test_counters_shrink() -> None:
    values = np.arange(65_536, dtype=np.int64)
    assert joined(encode_chunk(values, "fast")).size < values.nbytes / 50


@pytest.mark.parametrize(("preset", "least"), [("fast", 1.4), ("small", 1.4), ("raw", 0.999)])
def test_bfloat16_activations_shrink_as_promised(preset: str, least: float) -> None:
    rng = np.random.default_rng(0)
    scales = np.exp(0.7 * rng.standard_normal(256))
    values = (rng.standard_normal((1024, 256)) * scales).astype(ml_dtypes.bfloat16).view(np.uint16)
    assert values.nbytes / joined(encode_chunk(values, preset)).size > least


@pytest.mark.parametrize(("preset", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("n_rows", [1, 3, 64])
def test_chunk_comes_back_bit_for_bit_and_within_its_bound(preset: str, dtype: str, n_rows: int) -> None:
    spec = make_spec(preset, dtype, (5, 8))
    values = make_rows(spec, n_rows)
    stored = joined(encode_chunk(values, preset))
    assert stored.size <= max_chunk_bytes(preset, values.nbytes)
    out = np.empty_like(values)
    decode_chunk(stored, out, preset)
    assert same_bits(out, values)


@pytest.mark.parametrize("preset", ["raw", "fast"])
def test_every_flipped_bit_is_noticed(preset: str) -> None:
    values = np.zeros(200, np.uint16)
    values[::3] = 0x3F80
    stored = joined(encode_chunk(values, preset))
    for bit in range(8 * stored.size):
        altered = stored.copy()
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="crc32c"):
            check_chunk(altered)


@pytest.mark.parametrize("size", range(4))
def test_chunk_shorter_than_its_crc_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="at least 4 bytes"):
        check_chunk(np.zeros(size, np.uint8))


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_hostile_frame_gives_an_error_or_values_but_nothing_else(data: st.DataObject) -> None:
    values = make_rows(make_spec(row_shape=(32,)), 16)
    frame = joined(encode_frame(values, "fast")).copy()
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, min(40, frame.size - 1)))] = data.draw(st.integers(0, 255))
    frame = frame[: data.draw(st.integers(0, frame.size))]
    out = np.full_like(values, 0xABCD)
    try:
        decode_frame(frame, out)
    except ValueError:
        return
    assert frame.size >= 16


@pytest.mark.parametrize("begin", [0, 16, 24, 2**32 - 1])
def test_block_that_begins_elsewhere_is_refused(begin: int) -> None:
    values = np.zeros(512, np.uint16)
    frame = joined(encode_frame(values, "fast")).copy()
    frame[16:20] = np.frombuffer(np.uint32(begin).tobytes(), np.uint8)
    with pytest.raises(ValueError, match="does not begin at byte 20"):
        decode_frame(frame, values)


@pytest.mark.parametrize("n_items", [1, 127])
def test_shuffled_frame_of_few_items_is_refused(n_items: int) -> None:
    planes = struct.pack("<I", 20) + 2 * (struct.pack("<I", n_items) + bytes(n_items))
    header = struct.pack("<BBBBIII", 2, 1, 0x81, 2, 2 * n_items, 2 * n_items, 16 + len(planes))
    with pytest.raises(ValueError, match="expected a copy"):
        decode_frame(np.frombuffer(header + planes, np.uint8), np.zeros(n_items, np.uint16))


def test_altered_zstd_plane_is_refused() -> None:
    values = np.arange(4096, dtype=np.uint16) // 64
    frame = joined(encode_frame(values, "matches")).copy()
    frame[-8:] ^= 0xFF
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_frame(frame, values)


def encoding_lock() -> Any:
    """Return the lock under which numcodecs encodes; before 0.17 it is made when it is first asked for."""
    blosc: Any = import_module("numcodecs.blosc")
    return blosc.get_mutex() if hasattr(blosc, "get_mutex") else blosc._MUTEX


@pytest.mark.timeout(60)
def test_lock_of_a_killed_encoder_blocks_no_decoder() -> None:
    values = make_rows(make_spec(row_shape=(32,)), 64)
    frame = joined(encode_frame(values, "fast"))
    outs = [np.empty_like(values), np.empty_like(values)]
    with encoding_lock():
        decode_frame(frame, outs[0])
        thread = threading.Thread(target=decode_frame, args=(frame, outs[1]))
        thread.start()
        thread.join()
    assert all(same_bits(out, values) for out in outs)


@pytest.mark.parametrize("size", [2**31 - 1, 2**32 - 1, 600])
def test_plane_that_claims_more_bytes_than_there_are_is_refused_at_once(size: int) -> None:
    values = np.zeros(512, np.uint16)
    frame = joined(encode_frame(values, "fast")).copy()
    frame[20:24] = np.frombuffer(np.uint32(size).tobytes(), np.uint8)
    with pytest.raises(ValueError, match="plane says"):
        decode_frame(frame, values)


def test_zstd_plane_that_claims_a_huge_size_is_refused() -> None:
    values = np.zeros(512, np.uint16)
    other = joined(encode_frame(np.zeros(1 << 20, np.uint16), "fast"))
    header = joined(encode_frame(values, "fast"))[:20].copy()
    header[12:16] = np.frombuffer(np.uint32(other.size).tobytes(), np.uint8)
    with pytest.raises(ValueError, match="zstd plane says"):
        decode_frame(np.concatenate([header, other[20:]]), values)


def test_raw_chunk_of_another_size_is_refused() -> None:
    stored = joined(encode_chunk(np.zeros(8, np.float32), "raw"))
    with pytest.raises(ValueError, match="32 bytes, expected 36"):
        decode_chunk(stored, np.zeros(9, np.float32), "raw")


@pytest.mark.parametrize(("preset", "dtype"), COMBINATIONS)
def test_every_pipeline_ends_in_crc32c(preset: str, dtype: str) -> None:
    codecs = codecs_metadata(preset, dtype)
    assert codecs[0]["name"] == "bytes"
    assert codecs[-1] == {"name": "crc32c"}


@pytest.mark.parametrize(
    ("preset", "dtype", "message"),
    [
        ("zip", "float32", "'zip' is not known.*raw, fast, small"),
        ("bitround7", "bfloat16", "bitround7 is for float32, not for bfloat16"),
        ("int8-block32", "float32", "two arrays"),
        ("fast", "float8", "'float8' cannot be stored"),
    ],
)
def test_preset_that_does_not_fit_is_refused(preset: str, dtype: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        codecs_metadata(preset, dtype)


def test_every_preset_is_described_and_lossy_ones_are_named_so() -> None:
    assert all(preset.description for preset in PRESETS.values())
    assert {name for name, preset in PRESETS.items() if preset.is_lossless} == {"raw", "fast", "small"}
