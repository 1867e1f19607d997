"""Sizes of Parquet pages equal those that pyarrow reports; damaged files give a ValueError."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.store.examples.parquet_sizes import Chunk, read_footer

NAMES = ("number", "text", "list")


def encoded(n: int, row_group_size: int, **options: Any) -> bytes:
    table = pa.table(
        {
            "number": pa.array(range(n), pa.int64()),
            "text": [f"text {i % 7}" for i in range(n)],
            "list": pa.array([list(range(i % 5)) for i in range(n)], pa.list_(pa.int32())),
            "meta": [{"a": i, "b": None} for i in range(n)],
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=row_group_size, **options)
    return sink.getvalue()


def measured(data: bytes) -> list[tuple[int, list[Chunk]]]:
    return [(group.n_rows, list(group.chunks(data, NAMES))) for group in read_footer(data)]


@given(
    n=st.integers(0, 400),
    row_group_size=st.integers(1, 200),
    compression=st.sampled_from(["zstd", "none", "snappy"]),
    data_page_size=st.sampled_from([64, 4096, 2**20]),
    data_page_version=st.sampled_from(["1.0", "2.0"]),
    use_dictionary=st.booleans(),
    write_page_checksum=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_counts_are_those_of_pyarrow(n: int, row_group_size: int, **options: Any) -> None:
    data = encoded(n, row_group_size, write_batch_size=16, **options)
    metadata = pq.read_metadata(io.BytesIO(data))
    found = measured(data)
    assert len(found) == metadata.num_row_groups
    for i, (n_rows, chunks) in enumerate(found):
        group = metadata.row_group(i)
        assert n_rows == group.num_rows
        columns = [group.column(j) for j in range(3)]
        assert [chunk.column for chunk in chunks] == list(NAMES)
        assert [chunk.n_values for chunk in chunks] == [column.num_values for column in columns]
        # pyarrow's figure counts the headers of the pages too.
        for chunk, column in zip(chunks, columns, strict=True):
            assert 0 <= column.total_uncompressed_size - chunk.n_bytes < 200 * (1 + column.num_values)


def test_uncompressed_bytes_of_a_plain_column() -> None:
    table = pa.table({"number": pa.array(np.arange(1000), pa.int64())})
    sink = io.BytesIO()
    pq.write_table(table, sink, use_dictionary=False, compression="zstd")
    ((_, (chunk,)),) = measured(sink.getvalue())
    # 8 bytes each, and a few for the run of definition levels.
    assert 8000 <= chunk.n_bytes <= 8016


def test_a_small_file_that_claims_many_values_is_measured_without_memory() -> None:
    zeros = pa.array(np.zeros(5_000_000, np.int32))
    sink = io.BytesIO()
    pq.write_table(pa.table({"number": zeros}), sink, compression="zstd")
    assert len(sink.getvalue()) < 20_000
    ((n_rows, (chunk, *_)), *_) = measured(sink.getvalue())
    assert chunk.n_values == n_rows >= 2**20


def zigzag(value: int, n_bytes: int) -> bytes:
    """Return a number of Thrift's compact protocol, padded to a length."""
    digits = [2 * value >> 7 * i & 127 for i in range(n_bytes)]
    return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])


def test_pages_with_more_values_than_the_footer_announces_are_refused_where_pyarrow_decodes_them() -> None:
    n_values = 2**22
    lists = pa.ListArray.from_arrays(pa.array([0, n_values], pa.int32()), pa.array(np.zeros(n_values, np.int32)))
    sink = io.BytesIO()
    pq.write_table(pa.table({"list": lists}), sink, compression="zstd", data_page_size=2**31 - 1)
    data = sink.getvalue()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    lying = data[:footer] + data[footer:].replace(zigzag(n_values, 4), zigzag(3, 4))
    assert len(lying) < 1000
    assert pq.read_metadata(io.BytesIO(lying)).row_group(0).column(0).num_values == 3
    assert len(pq.ParquetFile(io.BytesIO(lying)).read()["list"][0]) == n_values
    with pytest.raises(ValueError, match="footer announces"):
        measured(lying)


@pytest.mark.parametrize("data", [b"", b"PAR1PAR1", b"PAR1" + b"\xff\xff\xff\x7fPAR1", b"PAR1\x00\x01\x00\x00\x00PAR1"])
def test_a_file_that_is_not_parquet(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"footer|does not end"):
        read_footer(data)


GOOD = encoded(30, 10)


@given(
    bits=st.lists(st.integers(0, len(GOOD) * 8 - 1), min_size=1, max_size=4),
    length=st.one_of(st.just(len(GOOD)), st.integers(0, len(GOOD))),
)
@settings(max_examples=300, deadline=None)
def test_damage_is_a_value_error(bits: list[int], length: int) -> None:
    bad = bytearray(GOOD)
    for bit in bits:
        bad[bit // 8] ^= 1 << bit % 8
    try:
        found = measured(bytes(bad[:length]))
    except ValueError:
        return
    assert len(found) <= len(bad)


@given(tail=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_as_a_footer(tail: bytes) -> None:
    data = b"PAR1" + tail + len(tail).to_bytes(4, "little") + b"PAR1"
    try:
        found = measured(data)
    except ValueError:
        return
    assert isinstance(found, list)
