"""Reads rows from files of text, one at a time: JSON lines, JSON, csv, tsv and plain lines.

Files are UTF-8, with or without a byte order mark, and may be compressed. A line ends at a newline only. What cannot be
read is refused with the number of its line, counted from 1. Values are what the file spells: nothing is converted, but
for the columns of a csv file that hold numbers throughout.
"""

import codecs
import csv
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, StringIO
from itertools import chain, islice
from os import PathLike, fspath
from typing import IO, Any

import pyarrow as pa

from residua.store.base.errors import DatasetError, shortened

_LONGEST_CELL = 2**31 - 1
_RECORDS_AT_ONCE = 128
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 begins like the first

# Texts such as 007 and 1_000 are no numbers: nobody could tell how they were spelled.
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_FLOAT = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SPACE = re.compile(r"\s*")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_MISSING = {"NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "null", "NULL", "None", "none"}


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Files of text that are one dataset; iterate for what they hold: rows (dictionaries), texts, lists.

    Attributes:
        paths: Paths, or addresses that fsspec opens.
        kind: ``json``, ``csv`` or ``text``.
        separator: What separates the cells of a csv file.
        texts: Names of csv columns that hold text, whatever it looks like.
    """

    paths: Sequence[str]
    kind: str
    separator: str = ","
    texts: Collection[str] = ()

    def __iter__(self) -> Iterator[object]:
        """Yield the content; raises DatasetError that names the file and the line."""
        if self.kind == "csv":
            yield from self._csv_rows()
            return
        read: Callable[[str], Iterator[object]] = _json_values if self.kind == "json" else _text_rows
        for path in self.paths:
            yield from read(path)

    def _csv_rows(self) -> Iterator[object]:
        columns: dict[str, _Column] = {}
        for path in self.paths:
            for cells in _cells(path, self.separator):
                for name, cell in cells.items():
                    if cell and name not in self.texts:
                        columns.setdefault(name, _Column()).look_at(cell)
        values = {name: column.value for name, column in columns.items()}
        for path in self.paths:
            for cells in _cells(path, self.separator):
                yield {name: values.get(name, str)(cell) if cell else None for name, cell in cells.items()}


def numbered_lines(path: str | PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, from 1, without their ends.

    Raises:
        DatasetError: A line is not UTF-8.
    """
    for number, line in _raw_lines(fspath(path)):
        yield number, line.removesuffix("\n").removesuffix("\r")


def json_lines(path: str | PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Yield the values of a file of JSON lines with the numbers of their lines; empty lines are left out.

    Raises:
        DatasetError: A line is not UTF-8, or not JSON.
    """
    for number, line in numbered_lines(path):
        if line.strip():
            yield number, _parsed(line, fspath(path), number)


def check_text(text: str, where: str) -> None:
    """Raise DatasetError if a text has half of a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{where} has {text[error.start]!r} at character {error.start}, half of a surrogate pair, which stands for "
            "no character: mend the text, for example with text.encode('utf-16', 'surrogatepass')"
            ".decode('utf-16', 'replace')"
        ) from error


def _raw_lines(path: str) -> Iterator[tuple[int, str]]:
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            yield number, _decoded(raw, path, number)


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    zstd = path.lower().endswith(".zst")
    packing = None if zstd else "infer"
    system: Any = fsspec if "://" in path else LocalFileSystem()
    with system.open(path, "rb", compression=packing) as file:
        # Arrow reads every frame of the file, and notices a missing end.
        unpacked: Any = BufferedReader(pa.input_stream(file, compression="zstd")) if zstd else file
        yield unpacked


def _decoded(raw: bytes, path: str, number: int) -> str:
    if number == 1:
        if raw.startswith(_UTF16):
            raise _refusal(path, 1, "the file is UTF-16: save it as UTF-8")
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _refusal(
            path, number, f"byte {error.start} ({raw[error.start]:#04x}) is not UTF-8: save the file as UTF-8"
        ) from error


def _refusal(path: str, number: int, problem: str) -> DatasetError:
    return DatasetError(f"the file {path!r} cannot be read: line {number}: {problem}")


def _parsed(text: str, path: str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, number, f"{shortened(repr(text))} is not JSON ({error})") from error


def _json_values(path: str) -> Iterator[object]:
    """Yield what each line holds; or the items of one list, or values that go over several lines."""
    lines = ((number, line) for number, line in numbered_lines(path) if line.strip())
    ahead = list(islice(lines, 2))
    if not ahead:
        return
    try:
        value = json.loads(ahead[0][1])
    except (ValueError, RecursionError):
        yield from _json_document(path)
        return
    if len(ahead) == 1 and isinstance(value, list):
        yield from value
        return
    for number, line in chain(ahead, lines):
        yield _parsed(line, path, number)


def _json_document(path: str) -> Iterator[object]:
    """Yield the values of a file whose first value goes over several lines; they are all in memory."""
    text = "\n".join(line for _, line in numbered_lines(path))
    values, at, decoder = [], _after_space(text, 0), json.JSONDecoder()
    try:
        while at < len(text):
            value, end = decoder.raw_decode(text, at)
            values.append(value)
            at = _after_space(text, end)
    except (ValueError, RecursionError) as error:
        number = getattr(error, "lineno", text.count("\n", 0, at) + 1)
        raise _refusal(path, number, f"it is not JSON ({error})") from error
    yield from values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _after_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return start if found is None else found.end()


def _text_rows(path: str) -> Iterator[object]:
    for number, line in numbered_lines(path):
        _refuse_nul(line, path, number)
        for text in line.split("\r"):
            yield {"text": text}


def _refuse_nul(line: str, path: str, number: int) -> None:
    # UTF-16 without its mark is valid UTF-8 with a NUL beside each letter.
    if "\0" in line:
        raise _refusal(path, number, "it has a NUL byte: is the file UTF-16, or no text? Save it as UTF-8")


def _cells(path: str, separator: str) -> Iterator[dict[str, str]]:
    """Yield the cells of each record by column; cells that are left out at the end are empty."""
    records = _records(path, separator)
    header = next(records, None)
    if header is None:
        return
    names = _column_names(header[1])
    for number, record in records:
        if len(record) > len(names):
            raise _refusal(
                path,
                number,
                f"it has {len(record)} cells, and the header has {len(names)}: put a cell with {separator!r} in quotes",
            )
        yield dict(zip(names, chain(record, [""] * (len(names) - len(record))), strict=True))


def _column_names(header: list[str]) -> list[str]:
    """Return names that differ, as pandas makes them: ``Unnamed: 0`` for an empty one, ``a.1`` for a second ``a``."""
    names: list[str] = []
    for i, name in enumerate(header):
        plain = name or f"Unnamed: {i}"
        same = (f"{plain}.{n}" for n in range(1, len(header) + 1))
        names.append(plain if plain not in names else next(other for other in same if other not in {*names, *header}))
    return names


def _records(path: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record that is not empty, with the line on which it begins."""
    last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for number, line in _raw_lines(path):
            _refuse_nul(line, path, number)
            last = number
            yield from StringIO(line, newline="")  # a carriage return may end a record too

    reader = csv.reader(lines(), delimiter=separator, strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        while True:
            number = last + 1
            try:
                record = next(reader, None)
            except csv.Error as error:
                raise _refusal(
                    path, number, f"the row that begins here is not csv ({error}): write a quote inside quotes twice"
                ) from error
            if record is None:
                return
            yield number, record

    return (record for record in _with_long_cells(numbered()) if record[1])


def _with_long_cells(records: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    while True:
        # The limit holds for all of the process, so it is put back before anyone else runs.
        limit = csv.field_size_limit(_LONGEST_CELL)
        try:
            batch = list(islice(records, _RECORDS_AT_ONCE))
        finally:
            csv.field_size_limit(limit)
        if not batch:
            return
        yield from batch


class _Column:
    """Finds out what the cells of a csv column are: whole numbers, numbers, true and false, or text."""

    def __init__(self) -> None:
        self._kinds: dict[Callable[[str], object], Callable[[str], bool]] = {
            int: _is_integer,
            float: _is_float,
            _BOOLEANS.__getitem__: _BOOLEANS.__contains__,
        }
        self._has_value = False

    def look_at(self, cell: str) -> None:
        """Take a cell into account."""
        if not self._kinds or cell in _MISSING:
            return
        self._has_value = True
        self._kinds = {kind: fits for kind, fits in self._kinds.items() if fits(cell)}

    def value(self, cell: str) -> object:
        """Return the value of a cell; a cell such as NA is missing only where the others are numbers."""
        kind = next(iter(self._kinds), None)
        if kind is None or not self._has_value:
            return cell
        return None if cell in _MISSING else kind(cell)


def _is_integer(cell: str) -> bool:
    return len(cell) < 21 and _INTEGER.fullmatch(cell) is not None and -(2**63) <= int(cell) < 2**63


def _is_float(cell: str) -> bool:
    if cell in ("inf", "-inf"):
        return True
    if _FLOAT.fullmatch(cell) is None or (_INTEGER.fullmatch(cell) and not _is_exact(cell)):
        return False
    return math.isfinite(float(cell))


def _is_exact(cell: str) -> bool:
    return len(cell) < 18 and abs(int(cell)) <= 2**53
