"""Side tables: columns that came after the capture, kept beside the example table, and read as if they belonged to it.

`annotations.json` names the side tables of an archive. The values of each lie in ``annotations/``, in one Parquet file
for each part of the example table, with a line for each example of the part: a value, or a list with one value for each
token. A file is named after its content, so that a table is replaced by one write of `annotations.json`. No digest of
the archive covers either; `annotations.json` has one of itself, and one of each file. `store/FORMAT.md` has the fields.
Everything is read as if somebody had forged it.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from residua.store.base.canonical import Json, digest_of, digested, with_digest
from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.base.untrusted import parse_json, read_file, size_problem
from residua.store.examples.index import (
    IMAGES,
    INPUT_PREFIX,
    OTHER_INPUTS,
    OWN_COLUMNS,
    SOURCE_IDS,
    SOURCE_SHA256,
    ExampleIndex,
)
from residua.store.examples.part import PartFile, read_columns, read_part_file
from residua.store.format.archive_metadata import SIDECAR_FOLDERS, file_digest
from residua.store.format.row_columns import IMAGE_COLUMNS, ROW_COLUMNS
from residua.store.storage.destination import Destination

SIDE_TABLES = "annotations.json"
FOLDER = "annotations"
MAX_SIDE_TABLES_BYTES = 64 * 2**20
MOST_TABLES = 1000
MOST_COLUMNS = 1000

_SCALARS = {"bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
KINDS: Mapping[str, pa.DataType] = {
    **_SCALARS,
    **{f"list of {name}": pa.list_(kind) for name, kind in _SCALARS.items()},
}
"""Types of columns, by their names in the file."""

_RESERVED = {
    *OWN_COLUMNS,
    *ROW_COLUMNS,
    *IMAGE_COLUMNS,
    *(IMAGES, OTHER_INPUTS, SOURCE_IDS, SOURCE_SHA256),
    *("row", "token_text", "source_index", "source_token", "source_example", "source_archive", "replayed_example"),
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SHA256 = re.compile("[0-9a-f]{64}")
_AGAIN = "write the side table again with archive.annotate(..., replace=True), or restore the file from a copy"

Fetch = Callable[[str, int, str | None], Path]
"""Returns where a file of the archive is on this machine, by its path in the archive, largest size and SHA-256."""


@dataclass(frozen=True, kw_only=True)
class SideTable:
    """What `annotations.json` says of one side table.

    Attributes:
        name: Its name.
        key: The column by which its lines were matched: ``example``, ``row``, or a column of the example table.
        columns: Names of its columns, with their types as in `KINDS`.
        n_missing: Examples that had no line, or rows if the key is ``row``; their values are null.
        files: SHA-256 of the file of each part of the example table, in order.
    """

    name: str
    key: str
    columns: Mapping[str, str]
    n_missing: int
    files: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 that changes with the table: with its names, types, and values."""
        return digest_of(self.to_json())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its values should know, one sentence each."""
        if not self.n_missing:
            return ()
        what = "rows" if self.key == "row" else "examples"
        return (f"the side table {self.name} has no line for {self.n_missing:,} {what}: their values are null",)

    def paths(self) -> list[str]:
        """Return the paths of its files in the archive."""
        return [f"{FOLDER}/{self.name}-{sha256[:16]}-{i:05d}.parquet" for i, sha256 in enumerate(self.files)]

    def to_json(self) -> dict[str, Json]:
        """Return the table's entry."""
        return {
            "name": self.name,
            "key": self.key,
            "columns": dict(self.columns),
            "n_missing": self.n_missing,
            "files": list(self.files),
        }


def column_problem(name: object) -> str:
    """Return why no side table may have a column of this name; empty if one may."""
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable() or "`" in name:
        return f"{str(name)[:60]!r} is not a name of a column"
    if name in _RESERVED or name.startswith(INPUT_PREFIX):
        return f"{name!r} is a name that rows or examples of an archive have themselves"
    return ""


def name_problem(name: object) -> str:
    """Return why a side table may not have this name; empty if it may."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return ""
    return f"{str(name)[:60]!r} names no side table: use letters, digits, underscores, dots and hyphens"


def write_side_tables(archive: Destination, examples: str, tables: Sequence[SideTable]) -> None:
    """Write `annotations.json`, durably and in one step.

    Args:
        archive: Where the archive is.
        examples: Digest of the example table.
        tables: All side tables of the archive.
    """
    entry: dict[str, Json] = {"examples": examples, "tables": [table.to_json() for table in tables]}
    content = json.dumps(with_digest("annotations", entry), indent=2, ensure_ascii=False)
    archive.keep(SIDE_TABLES, content.encode())


def read_side_tables(archive: Path, index: ExampleIndex) -> list[SideTable]:
    """Return what the `annotations.json` of an archive says; nothing if there is no such file.

    Args:
        archive: Folder of the archive.
        index: The examples of the archive.

    Raises:
        DamagedArchiveError: The file is not what was written, or belongs to other examples.
        UnsafeArchiveError: It names something that Residua does not write.
    """
    path = archive / SIDE_TABLES
    if not path.exists():
        return []
    text = read_file(archive, path, MAX_SIDE_TABLES_BYTES)
    try:
        entry = digested(parse_json(text), "annotations")
        tables = [_table(each) for each in entry["tables"]]
        digest = entry["examples"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedArchiveError(f"{path} cannot be read ({error}): restore it from a copy, or remove it") from error
    if digest != index.digest:
        raise DamagedArchiveError(
            f"{path} belongs to other examples (digest {str(digest)[:12]}, here {index.digest[:12]}): remove it, or "
            "restore the one of this archive"
        )
    if problem := next(filter(None, _problems(tables, len(index.first_example) - 1)), ""):
        raise UnsafeArchiveError(f"{path}: {problem}")
    return tables


def _table(entry: Any) -> SideTable:
    return SideTable(
        name=entry["name"],
        key=entry["key"],
        columns=dict(entry["columns"]),
        n_missing=entry["n_missing"],
        files=tuple(entry["files"]),
    )


def _problems(tables: Sequence[SideTable], n_parts: int) -> Iterable[str]:
    yield size_problem("side tables", len(tables), MOST_TABLES)
    for table in tables:
        yield name_problem(table.name)
        yield "" if isinstance(table.key, str) else "a key is not a text"
        yield size_problem("columns of a side table", len(table.columns), MOST_COLUMNS, 1)
        yield from map(column_problem, table.columns)
        yield "" if set(table.columns.values()) <= KINDS.keys() else f"{table.name} has a type that is not known"
        yield size_problem("missing examples or rows", table.n_missing, 2**53)
        is_whole = len(table.files) == n_parts and all(_SHA256.fullmatch(str(sha256)) for sha256 in table.files)
        yield "" if is_whole else f"{table.name} should have a file for each of {n_parts} parts of the examples"
    for what, names in (
        ("side tables", [table.name for table in tables]),
        ("columns of side tables", [column for table in tables for column in table.columns]),
    ):
        yield "" if len(set(names)) == len(names) else f"two {what} have the same name"


class SideColumns:
    """The values of one side table, read part by part; each file is compared with its SHA-256 before it is used.

    Args:
        table: What `annotations.json` says of it.
        archive: Folder of the archive.
        fetch: Brings a file of the archive.
        index: The examples of the archive.

    Attributes:
        table: As given.
        types: The Arrow types of its columns.
    """

    def __init__(self, table: SideTable, archive: Path, fetch: Fetch, index: ExampleIndex) -> None:
        self.table = table
        self.types = {name: KINDS[kind] for name, kind in table.columns.items()}
        self._archive, self._fetch, self._index = archive, fetch, index
        self._files: dict[int, PartFile] = {}

    def read(self, part: int, names: Sequence[str]) -> pa.Table:
        """Return columns of the examples of one part.

        Raises:
            DamagedArchiveError: The file is missing, or was altered.
            UnsafeArchiveError: It holds something that Residua does not write.
        """
        if part not in self._files:
            self._files[part] = self._open(part)
        return read_columns(self._files[part], names)

    def _open(self, part: int) -> PartFile:
        name, sha256 = self.table.paths()[part], self.table.files[part]
        path = self._fetch(name, SIDECAR_FOLDERS["examples"], sha256)
        if not path.is_file():
            raise DamagedArchiveError(f"{path} is missing: {_AGAIN}")
        file = read_part_file(self._archive, path)
        if file_digest(path) != sha256:
            raise DamagedArchiveError(f"{path} was altered (its SHA-256 differs): {_AGAIN}")
        found, bounds = sum(group.n_rows for group in file.groups), self._index.first_example
        if found != int(bounds[part + 1] - bounds[part]):
            raise UnsafeArchiveError(f"{path}: {found:,} lines are not one for each example")
        types = dict(zip(file.schema.names, file.schema.types, strict=True))
        if len(types) != len(file.schema.names) or types != self.types:
            raise UnsafeArchiveError(f"{path}: the columns are not those that {SIDE_TABLES} says")
        return file
