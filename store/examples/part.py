"""Reads one part of an example table without trusting it.

A part that cannot be read is a DamagedArchiveError. A part that can be read and contradicts itself (counts, positions,
types) is an UnsafeArchiveError. Both name the file. Counts are compared with limits before memory is taken.
"""

import mmap
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.base.untrusted import check_file, size_problem
from residua.store.examples.index import (
    DIGEST_KEY,
    IMAGES,
    IMAGES_KEY,
    MAX_PART_BYTES,
    MAX_PART_EXAMPLES,
    MAX_PART_VALUES,
    OWN_COLUMNS,
    IntArray,
    LongArray,
    content_problem,
    part_name,
    starts,
)
from residua.store.examples.parquet_sizes import Chunk, RowGroup, read_footer
from residua.store.format.archive_metadata import SIDECAR_FOLDERS

_COUNTS = ("first_row", "n_rows", "n_tokens")
_LISTS = ("input_ids", "positions")
_SHA256 = re.compile("[0-9a-f]{64}")
_HASHES = (pa.list_(pa.string()), pa.list_(pa.null()))
_READER_ERRORS = (
    pa.ArrowException,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class PartFile:
    """The footer of a Parquet file with a line for each example.

    Attributes:
        path: The file.
        groups: Its row groups, as the footer announces them.
        schema: Arrow schema of the file.
    """

    path: Path
    groups: Sequence[RowGroup]
    schema: pa.Schema


@dataclass(frozen=True, eq=False, kw_only=True)
class Part(PartFile):
    """The footer of a part of the example table, and its columns of counts.

    Attributes:
        group_starts: First example of each row group, counted in this part, then their number, int64.
        digest: Digest of the table up to and including this part, as the file has it.
        first_row: First row of each example, int64.
        n_rows: Rows of each example, int32.
        n_tokens: Tokens of each example, int32.
    """

    group_starts: LongArray
    digest: str
    first_row: LongArray
    n_rows: IntArray
    n_tokens: IntArray


@dataclass(frozen=True, eq=False)
class Group:
    """Tokens and positions of one row group, flat, and the start of each example in them; all read-only."""

    tokens: IntArray
    positions: IntArray
    token_starts: LongArray
    row_starts: LongArray

    def content(self, i: int) -> tuple[IntArray, IntArray]:
        """Return token ids and positions of example `i` of the group."""
        return (
            self.tokens[self.token_starts[i] : self.token_starts[i + 1]],
            self.positions[self.row_starts[i] : self.row_starts[i + 1]],
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn every error of the Parquet reader into a DamagedArchiveError that names the file."""
    try:
        yield
    except (DamagedArchiveError, UnsafeArchiveError):
        raise
    except _READER_ERRORS as error:
        raise DamagedArchiveError(f"{path}: cannot be read as Parquet: {error}") from error


@contextmanager
def _opened(path: Path, coded: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """Open a part; texts at the leaves `coded` are read as numbers of different texts."""
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False, read_dictionary=list(coded)) as file:
        yield file


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    """Yield the bytes of a file; only those that are used are read."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _check_pages(
    path: Path, groups: Sequence[RowGroup], names: tuple[str, ...], most_bytes: int = MAX_PART_BYTES
) -> list[Chunk]:
    """Return the sizes of columns before they are decoded; refuse more than Residua puts into a part."""
    with _mapped(path) as data:
        chunks = [chunk for group in groups for chunk in group.chunks(data, names)]
    _refuse(path, [size_problem(f"values of {chunk.column}", chunk.n_values, MAX_PART_VALUES) for chunk in chunks])
    _refuse(path, [size_problem("bytes of columns", sum(chunk.n_bytes for chunk in chunks), most_bytes)])
    return chunks


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problem := next(filter(None, problems), ""):
        raise UnsafeArchiveError(f"{path}: {problem}")


def read_parts(folder: Path, first: int = 0) -> list[Part]:
    """Read the footers and counts of the parts in `folder`, in order, from number `first` on.

    Raises:
        DamagedArchiveError: The folder or a part is missing or unreadable.
        UnsafeArchiveError: A part has contents that Residua never writes.
    """
    if not folder.is_dir():
        raise DamagedArchiveError(f"{folder}, the folder of the examples, is missing: restore it from a copy")
    names = {path.name for path in folder.glob("part-*.parquet")}
    expected = [part_name(i) for i in range(len(names))]
    missing = [name for name in expected if name not in names]
    if missing:
        raise DamagedArchiveError(f"{folder / missing[0]} is missing, but {max(names)} exists: restore it from a copy")
    return [_read_part(folder / name) for name in expected[first:]]


def _read_part(path: Path) -> Part:
    check_file(path.parents[1], path, SIDECAR_FOLDERS["examples"])
    with naming(path):
        groups = _read_groups(path)
        n_examples = [group.n_rows for group in groups]
        chunks = _check_pages(path, groups, _COUNTS)
        _refuse(
            path, [size_problem(f"values of {chunk.column}", chunk.n_values, MAX_PART_EXAMPLES) for chunk in chunks]
        )
        with _opened(path) as file:
            schema = file.schema_arrow
            _check_schema(path, schema)
            counts = file.read(columns=list(_COUNTS))
        first_row, n_rows, n_tokens = (_numbers(path, counts.column(name), sum(n_examples)) for name in _COUNTS)
        _check_counts(path, n_rows, n_tokens)
        return Part(
            path=path,
            groups=groups,
            group_starts=starts(np.array(n_examples, np.int32)),
            schema=schema,
            digest=(schema.metadata or {}).get(DIGEST_KEY, b"").decode("ascii", "replace"),
            first_row=first_row,
            n_rows=n_rows,
            n_tokens=n_tokens,
        )


def read_part_file(root: Path, path: Path) -> PartFile:
    """Read the footer of a file of the archive `root` that has a line for each example of a part.

    Raises:
        DamagedArchiveError: The file is missing or unreadable.
        UnsafeArchiveError: It is larger than any that Residua writes, or outside the archive.
    """
    check_file(root, path, SIDECAR_FOLDERS["examples"])
    with naming(path):
        groups = _read_groups(path)
        with _opened(path) as file:
            return PartFile(path=path, groups=groups, schema=file.schema_arrow)


def _read_groups(path: Path) -> list[RowGroup]:
    with _mapped(path) as data:
        groups = read_footer(data)
    n_examples = [group.n_rows for group in groups]
    _refuse(path, [size_problem("examples of a row group", n, MAX_PART_EXAMPLES) for n in n_examples])
    _refuse(path, [size_problem("examples", sum(n_examples), MAX_PART_EXAMPLES)])
    return groups


def _check_schema(path: Path, schema: pa.Schema) -> None:
    for name, kind in OWN_COLUMNS.items():
        if schema.names.count(name) != 1:
            raise UnsafeArchiveError(f"{path}: column {name!r} should occur once, found {schema.names}")
        found = schema.field(name).type
        if pa.types.is_list(kind):
            right = pa.types.is_list(found) and found.value_type.equals(kind.value_type)
        else:
            right = found.equals(kind)
        if not right:
            raise UnsafeArchiveError(f"{path}: column {name!r} should be {kind}, found {found}")


def _check_counts(path: Path, n_rows: IntArray, n_tokens: IntArray) -> None:
    if (n_rows < 0).any() or (n_tokens < n_rows).any():
        raise UnsafeArchiveError(f"{path}: an example has a negative count or more rows than tokens")
    _refuse(path, [size_problem("tokens", int(n_tokens.sum(dtype=np.int64)), MAX_PART_VALUES)])


def _numbers(path: Path, column: Any, n: int) -> Any:
    if column.null_count or len(column) != n:
        raise UnsafeArchiveError(f"{path}: a column of counts has {len(column)} entries or gaps, expected {n}")
    return column.to_numpy()


def read_group(part: Part, group_index: int) -> Group:
    """Read and check the tokens and positions of one row group; raises as `read_parts` does."""
    examples = slice(*part.group_starts[group_index : group_index + 2].tolist())
    n_tokens, n_rows = part.n_tokens[examples], part.n_rows[examples]
    with naming(part.path), _opened(part.path) as file:
        _check_sizes(part.path, part.groups[group_index], n_tokens, n_rows)
        lists = file.read_row_group(group_index, columns=list(_LISTS))
        group = Group(
            tokens=_flat(part.path, lists.column("input_ids"), n_tokens),
            positions=_flat(part.path, lists.column("positions"), n_rows),
            token_starts=starts(n_tokens),
            row_starts=starts(n_rows),
        )
    for i in range(len(n_tokens)):
        problem = content_problem(*group.content(i))
        if problem:
            raise UnsafeArchiveError(f"{part.path}: example {examples.start + i} of this part: {problem}")
    return group


def _check_sizes(path: Path, group: RowGroup, n_tokens: IntArray, n_rows: IntArray) -> None:
    found = {chunk.column: chunk.n_values for chunk in _check_pages(path, [group], _LISTS)}
    for name, counts in zip(_LISTS, (n_tokens, n_rows), strict=True):
        # An empty list takes one entry in the column.
        if found[name] != np.maximum(counts, 1).sum(dtype=np.int64):
            raise UnsafeArchiveError(f"{path}: {name} holds another number of values than its counts say")


def _flat(path: Path, column: Any, counts: IntArray) -> IntArray:
    lists = column.combine_chunks()
    values = lists.flatten()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    if lists.null_count or values.null_count or not np.array_equal(lengths, counts):
        raise UnsafeArchiveError(f"{path}: an example's list has another length than its count says, or gaps")
    flat: IntArray = values.to_numpy(zero_copy_only=False)
    flat.flags.writeable = False
    return flat


def read_columns(part: PartFile, names: Sequence[str], *, most_bytes: int = MAX_PART_BYTES) -> pa.Table:
    """Read the columns `names`, as far as the part has them and they take `most_bytes`; raises as `read_parts` does."""
    wanted = [name for name in names if name in part.schema.names]
    with naming(part.path):
        _check_pages(part.path, part.groups, tuple(wanted), most_bytes)
        with _opened(part.path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        with _opened(
            part.path, [leaf for leaf in leaves if any(f"{leaf}.".startswith(f"{name}.") for name in wanted)]
        ) as file:
            table = file.read(columns=wanted)
        # Pages hold a text once, however many values repeat it.
        n_bytes = sum(_text_bytes(chunk) for column in table.columns for chunk in column.chunks)
        _refuse(part.path, [size_problem("bytes of texts", n_bytes, most_bytes)])
        fields = [part.schema.field(name) for name in table.schema.names]
        plain = pa.schema(fields, metadata=table.schema.metadata)
        return table if table.schema.equals(plain) else table.cast(plain)


def read_images(part: Part) -> list[list[str]]:
    """Return the SHA-256 of each image of each example; empty for a part whose digest does not cover images.

    Raises:
        UnsafeArchiveError: The column is missing, or holds something else.
    """
    if (part.schema.metadata or {}).get(IMAGES_KEY) != IMAGES.encode():
        return []
    if IMAGES not in part.schema.names or part.schema.field(IMAGES).type not in _HASHES:
        raise UnsafeArchiveError(f"{part.path}: column {IMAGES!r} should hold lists of texts")
    found: list[list[str]] = read_columns(part, [IMAGES])[IMAGES].to_pylist()
    if not all(isinstance(images, list) and all(map(_SHA256.fullmatch, map(str, images))) for images in found):
        raise UnsafeArchiveError(f"{part.path}: column {IMAGES!r} holds something else than the SHA-256 of images")
    return found


def _text_bytes(array: Any) -> int:
    """Return how many bytes the coded texts in an array have when each is written out."""
    if isinstance(array, pa.DictionaryArray):
        lengths = pc.call_function("binary_length", [array.dictionary]).take(array.indices)
        return int(pc.call_function("sum", [lengths]).as_py() or 0)
    inner = array.flatten() if hasattr(array, "flatten") else []
    return sum(map(_text_bytes, inner if isinstance(inner, list) else [inner]))
