"""What the pages of a Parquet file hold, by their own headers: the one check that pyarrow lacks.

pyarrow (26.0) decodes as many values as a page header announces, even where the footer announces fewer: a file of 631
bytes made it take 224 MiB for a list of 3 values. It offers no way to look at the headers first, and reading the
footer's column entries through it (`FileMetaData.row_group(i).column(j)`) ends the process on a malformed footer, by
an uncaught C++ exception. So this module decodes the footer and the page headers, and nothing else. Both are structs
of Thrift's compact protocol; field numbers are those of parquet.thrift: https://github.com/apache/parquet-format.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MAGIC = b"PAR1"
_MAX_DEPTH = 32
_STRUCT = 12


@dataclass(frozen=True)
class Chunk:
    """One column of one row group.

    Attributes:
        column: Name of the top-level column.
        n_values: Values in its pages; an empty list counts as one.
        n_bytes: Uncompressed bytes of its pages.
    """

    column: str
    n_values: int
    n_bytes: int


@dataclass(frozen=True)
class RowGroup:
    """One row group of the footer: its rows, and the entries of its columns, undecoded."""

    n_rows: int
    columns: tuple[Any, ...]

    def chunks(self, data: bytes, names: tuple[str, ...]) -> Iterator[Chunk]:
        """Yield the sizes of the columns `names`, from the page headers in `data`, the bytes of the file.

        Raises:
            ValueError: The headers are damaged, or contradict the footer.
        """
        try:
            for column in self.columns:
                name = column[3][3][0].decode()
                if name in names:
                    yield Chunk(name, *_measure_pages(data, column[3]))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"the header of a column is damaged: {error}") from error


def read_footer(data: bytes) -> list[RowGroup]:
    """Return the row groups that the footer of a Parquet file announces.

    Raises:
        ValueError: The file does not end in a sound footer.
    """
    if len(data) < 12 or data[-4:] != _MAGIC:
        raise ValueError("the file does not end as Parquet does")
    (length,) = struct.unpack("<I", data[-8:-4])
    if length > len(data) - 12:
        raise ValueError("the footer is longer than the file")
    try:
        fields, _ = _decode(data[-8 - length : -8], 0, _STRUCT)
        return [RowGroup(group[3], tuple(group[1])) for group in fields[4]]
    except (LookupError, TypeError) as error:
        raise ValueError(f"the footer is damaged: {error}") from error


def _measure_pages(data: bytes, meta: dict[int, Any]) -> tuple[int, int]:
    """Return (values, uncompressed bytes) of the pages of a column chunk."""
    at = min((meta[key] for key in (9, 11) if meta.get(key, 0) > 0), default=0)
    stop = at + meta[7]
    n_values = n_bytes = 0
    while at < stop <= len(data):
        page, at = _decode(data, at, _STRUCT)
        n_held = page[7][1] if 7 in page else 0
        if min(page[2], page[3]) < 0 or not 0 <= n_held <= page[2]:
            raise ValueError("a page has an impossible size")
        n_bytes += page[2]
        n_values += page[5][1] if 5 in page else page[8][1] if 8 in page else 0
        at += page[3]
    if at != stop or n_values != meta[5]:
        raise ValueError("the pages of a column are not those that the footer announces")
    return n_values, n_bytes


def _decode(data: bytes, at: int, kind: int, depth: int = 0) -> tuple[Any, int]:
    """Return the Thrift value of type `kind` at offset `at`, and the offset after it; structs by field number."""
    if depth > _MAX_DEPTH:
        raise ValueError("the structure is nested too deeply")
    match kind:
        case 1 | 2 | 3:
            return data[at], at + 1
        case 4 | 5 | 6:
            value, at = _varint(data, at)
            return value >> 1 ^ -(value & 1), at
        case 7 | 8:
            length, at = (8, at) if kind == 7 else _varint(data, at)
            if length > len(data) - at:
                raise ValueError("a text is longer than the file")
            return data[at : at + length], at + length
        case 9 | 10:
            return _decode_list(data, at, depth)
        case 12:
            return _decode_struct(data, at, depth)
    raise ValueError(f"type {kind} has no place in a Parquet file")


def _decode_list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    length, kind, at = data[at] >> 4, data[at] & 15, at + 1
    if length == 15:
        length, at = _varint(data, at)
    if length > len(data) - at:
        raise ValueError("a list is longer than the file")
    values = []
    for _ in range(length):
        value, at = _decode(data, at, kind, depth + 1)
        values.append(value)
    return values, at


def _decode_struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        if head >> 4:
            number, at = number + (head >> 4), at + 1
        else:
            number, at = _decode(data, at + 1, 4)
        if head & 15 in (1, 2):  # the type of a truth value is the value
            fields[number] = head & 15 == 1
        else:
            fields[number], at = _decode(data, at, head & 15, depth + 1)
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is longer than 64 bits")
