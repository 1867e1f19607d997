"""What a Parquet file claims to hold, found without the library that would take memory for it.

pyarrow trusts the counts in a file: a few kilobytes can ask it for tens of gigabytes, and some malformed footers end
the whole process when their columns are looked at (26.0: an uncaught C++ exception). This reads the footer and the
page headers, which are Thrift structs in the compact protocol, and nothing else of the file. Field numbers are those
of parquet.thrift: https://github.com/apache/parquet-format.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MAGIC = b"PAR1"
_MAX_DEPTH = 16
_BINARY, _LIST, _SET, _STRUCT = 8, 9, 10, 12


@dataclass(frozen=True)
class Chunk:
    """One column of one row group.

    Attributes:
        column: Name of the top-level column.
        n_values: Values, as its pages count them; an empty list counts as one.
        n_bytes: Bytes of its pages, uncompressed.
    """

    column: str
    n_values: int
    n_bytes: int


@dataclass(frozen=True)
class RowGroup:
    """One row group: its rows, and where the pages of its columns are (as found in the footer)."""

    n_rows: int
    columns: tuple[Any, ...]

    def chunks(self, data: bytes, names: tuple[str, ...]) -> Iterator[Chunk]:
        """Measure the columns `names`, from the headers of their pages in the file's bytes `data`.

        Raises:
            ValueError: The headers are not those of a sound file.
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
    start = len(data) - 8 - length
    if start < 4:
        raise ValueError("the footer is longer than the file")
    try:
        fields, _ = _Compact(data[start:-8]).struct(0, 0)
        return [RowGroup(group[3], tuple(group[1])) for group in fields[4]]
    except (LookupError, TypeError) as error:
        raise ValueError(f"the footer is damaged: {error}") from error


def _measure_pages(data: bytes, meta: dict[int, Any]) -> tuple[int, int]:
    """Return (values, uncompressed bytes) of the pages of a column chunk."""
    starts = [meta[key] for key in (9, 11) if meta.get(key, 0) > 0]
    at = min(starts, default=0)
    stop = at + meta[7]
    n_values = n_bytes = 0
    while at < stop <= len(data):
        page, after = _Compact(data).struct(at, 0)
        n_held = page[7][1] if 7 in page else 0
        if min(page[2], page[3]) < 0 or not 0 <= n_held <= page[2]:
            raise ValueError("a page has an impossible size")
        n_bytes += page[2]
        n_values += page[5][1] if 5 in page else page[8][1] if 8 in page else 0
        at = after + page[3]
    if at != stop or n_values != meta[5]:
        raise ValueError("the pages of a column are not those that the footer announces")
    return n_values, n_bytes


class _Compact:
    """Decodes structs of Thrift's compact protocol into dictionaries by field number."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def struct(self, at: int, depth: int) -> tuple[dict[int, Any], int]:
        """Return the struct at offset `at`, and the offset after it."""
        if depth > _MAX_DEPTH:
            raise ValueError("the structure is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while True:
            head, at = self._data[at], at + 1
            if head == 0:
                return fields, at
            if head >> 4:
                number += head >> 4
            else:
                number, at = self._integer(at)
            kind = head & 15
            # A field that is a truth value has it in place of its type.
            fields[number], at = (kind == 1, at) if kind in (1, 2) else self._value(kind, at, depth)

    def _value(self, kind: int, at: int, depth: int) -> tuple[Any, int]:
        if kind in (4, 5, 6):
            return self._integer(at)
        if kind in (1, 2, 3):
            return self._data[at], at + 1
        if kind == 7:
            return self._slice(at, 8)
        if kind == _BINARY:
            length, at = self._varint(at)
            return self._slice(at, length)
        if kind in (_LIST, _SET):
            return self._list(at, depth)
        if kind == _STRUCT:
            return self.struct(at, depth + 1)
        raise ValueError(f"type {kind} has no place in a Parquet footer")

    def _list(self, at: int, depth: int) -> tuple[list[Any], int]:
        head, at = self._data[at], at + 1
        length = head >> 4
        if length == 15:
            length, at = self._varint(at)
        if depth > _MAX_DEPTH or length > len(self._data) - at:
            raise ValueError("a list is longer than the file")
        values = []
        for _ in range(length):
            value, at = self._value(head & 15, at, depth + 1)
            values.append(value)
        return values, at

    def _slice(self, at: int, length: int) -> tuple[bytes, int]:
        if length > len(self._data) - at:
            raise ValueError("a text is longer than the file")
        return self._data[at : at + length], at + length

    def _integer(self, at: int) -> tuple[int, int]:
        value, at = self._varint(at)
        return value >> 1 ^ -(value & 1), at

    def _varint(self, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            byte, at = self._data[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
        raise ValueError("a number is longer than 64 bits")
