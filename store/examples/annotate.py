"""Writes side tables: lines of a table that came later are matched with the examples or rows of an archive by a key.

The table becomes columns with a line for each example (`residua.store.examples.side_tables`). A table with a line for
each row becomes columns of lists, with one value for each token.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from residua.store.base.errors import AnalysisError, DatasetError, PlanError, few
from residua.store.base.naming import named
from residua.store.examples.given_table import as_arrow, plain
from residua.store.examples.index import starts
from residua.store.examples.side_tables import (
    FOLDER,
    KINDS,
    SIDE_TABLES,
    SideTable,
    column_problem,
    name_problem,
    read_side_tables,
    write_side_tables,
)
from residua.store.examples.table import ExampleTable
from residua.store.examples.token_values import is_list, token_values
from residua.store.examples.writer import EXAMPLES_PER_GROUP
from residua.store.storage.destination import BucketFolder, Destination, DiskFolder
from residua.store.storage.files import make_folders
from residua.store.storage.lock import try_flock
from residua.store.storage.mirror import naming

EXAMPLE, ROW = "example", "row"

Numbers = npt.NDArray[np.int64]


def annotate(
    archive: Destination,
    examples: ExampleTable,
    table: Any,
    *,
    key: str,
    name: str,
    columns: Sequence[str] | None,
    replace: bool,
    allow_unmatched: bool,
) -> SideTable:
    """Write a side table into an archive, as `residua.store.read.archive.Archive.annotate` says.

    Args:
        archive: Where the archive is.
        examples: Its examples.
        table: As for `Archive.annotate`, as the others.
        key: Likewise.
        name: Likewise.
        columns: Likewise.
        replace: Likewise.
        allow_unmatched: Likewise.
    """
    if problem := name_problem(name):
        raise PlanError(problem)
    given = as_arrow(table, key)
    names = _names(given, key, columns)
    _refuse_own(examples, names, name)
    lines, kept = _lines(examples, given, key, name, allow_unmatched=allow_unmatched)
    found = {each: plain(each, given[each]) for each in names}
    if key == ROW:
        found = {each: _by_token(each, values, examples, lines) for each, values in found.items()}
    else:
        found = {each: _by_example(each, values, examples, lines) for each, values in found.items()}
    n_missing = (examples.index().total_rows if key == ROW else len(examples)) - kept
    kinds = {kind: label for label, kind in KINDS.items()}
    types = {each: kinds[values.type] for each, values in found.items()}
    with _alone(archive):
        return _write(
            archive,
            examples,
            pa.table(found),
            SideTable(name=name, key=key, columns=types, n_missing=n_missing, files=()),
            replace=replace,
        )


def remove_annotations(archive: Destination, examples: ExampleTable, name: str) -> None:
    """Remove a side table.

    Raises:
        PlanError: There is none of that name.
        OSError: The archive cannot be written.
    """
    index = examples.index()
    with _alone(archive):
        known = read_side_tables(archive.path, index)
        left = [table for table in known if table.name != name]
        if len(left) == len(known):
            have = few([table.name for table in known]) or "none"
            raise PlanError(f"{archive} has no side table {name!r} to remove; it has {have}")
        write_side_tables(archive, index.digest, left)
        _clean(archive, left)


def _names(given: pa.Table, key: str, columns: Sequence[str] | None) -> list[str]:
    """Return the columns to keep."""
    has = f"the table has {few(given.column_names, 12) or 'no columns'}"
    if given.column_names.count(key) != 1:
        raise DatasetError(
            f"there is no column {key!r}, by which lines are matched ({named('key', key)}); {has}. A line has the "
            "number of its example (example), of its row (row), or a value that a column of the examples has, such as "
            "source_index"
        )
    names = [each for each in given.column_names if each != key] if columns is None else list(columns)
    for each in names:
        if given.column_names.count(each) != 1:
            raise DatasetError(f"there is no column {each!r} to keep; {has}")
        if problem := column_problem(each):
            raise DatasetError(f"{problem}: rename it, or name the columns to keep ({named('columns')})")
    if not names or key in names:
        raise DatasetError(f"a side table needs a column besides its key {key!r}; {has}")
    return names


def _refuse_own(examples: ExampleTable, names: Sequence[str], name: str) -> None:
    """Raise DatasetError if the examples, or another side table, have one of the columns."""
    side = {column: each.table.name for each in examples.side if each.table.name != name for column in each.types}
    own = examples.column_types().keys() - {column for each in examples.side for column in each.types}
    for column in names:
        if column in side or column in own:
            where = f"the side table {side[column]} has" if column in side else "the examples have"
            raise DatasetError(f"{where} a column {column!r} already: rename it in your table")


def _lines(
    examples: ExampleTable, given: pa.Table, key: str, name: str, *, allow_unmatched: bool
) -> tuple[Numbers, int]:
    """Return the line of each example, or of each row, -1 for none; and how many of them have one."""
    keys = given[key].combine_chunks()
    if keys.null_count:
        raise DatasetError(f"{keys.null_count:,} lines of the side table {name} have no {key}: leave them out")
    if key in (EXAMPLE, ROW):
        total = len(examples) if key == EXAMPLE else examples.index().total_rows
        values, keys = pa.array(np.arange(total)), _whole(keys, key)
    else:
        values = _own_values(examples, key)
        try:
            keys = keys.cast(values.type)
        except pa.ArrowException as error:
            raise DatasetError(
                f"the key {key!r} is {values.type} in the archive, and {keys.type} in the table: {error}"
            ) from error
    counts = pc.call_function("value_counts", [keys]).to_pylist()
    if twice := [entry["values"] for entry in counts if entry["counts"] > 1]:
        raise DatasetError(
            f"several lines of the side table {name} have the same {key}, such as {few(twice, 3)}: keep one"
        )
    matched = pc.call_function("is_in", [keys], pc.SetLookupOptions(values)).to_numpy(zero_copy_only=False)
    _refuse_unmatched(keys, np.asarray(matched, np.bool_), key, name, allow_unmatched=allow_unmatched)
    found = pc.call_function("index_in", [values], pc.SetLookupOptions(keys)).fill_null(-1)
    lines = np.asarray(found.to_numpy(), np.int64)
    return lines, int(np.count_nonzero(lines >= 0))


def _refuse_unmatched(
    keys: pa.Array, matched: npt.NDArray[np.bool_], key: str, name: str, *, allow_unmatched: bool
) -> None:
    if not matched.any():
        raise DatasetError(
            f"no line of the side table {name} matches: the archive has none of its values of {key}, such as "
            f"{few(keys[:3].to_pylist())}"
        )
    if not matched.all() and not allow_unmatched:
        others = [keys[i].as_py() for i in np.flatnonzero(~matched)[:3].tolist()]
        raise DatasetError(
            f"{int((~matched).sum()):,} of {len(keys):,} lines of the side table {name} match nothing: the archive has "
            f"no {key} {few(others)}. Leave them out, or allow it ({named('allow_unmatched', True)})"
        )


def _own_values(examples: ExampleTable, key: str) -> Any:
    if key not in examples.column_types():
        known = few([EXAMPLE, ROW, *examples.column_types()], 12)
        raise DatasetError(f"the examples have no column {key!r} to match lines by: choose one of {known}")
    values = examples.table([key])[key]
    if not (pa.types.is_integer(values.type) or pa.types.is_string(values.type)):
        raise DatasetError(
            f"lines cannot be matched by {key!r}, which holds {values.type}: choose texts or whole numbers"
        )
    return values.combine_chunks()


def _whole(keys: Any, key: str) -> Any:
    if not (pa.types.is_integer(keys.type) or pa.types.is_floating(keys.type)):
        raise DatasetError(
            f"the key {key!r} holds {keys.type}, and is the number of {'a row' if key == ROW else 'an example'}"
        )
    try:
        return keys.cast(pa.int64())
    except pa.ArrowException as error:
        raise DatasetError(f"the key {key!r} has a value that is not a whole number: {error}") from error


def _by_example(name: str, values: Any, examples: ExampleTable, lines: Numbers) -> Any:
    """Return the value of each example, null where it has no line."""
    found = values.take(pa.array(lines, pa.int64(), mask=lines < 0))
    if is_list(found.type):
        try:
            token_values(name, pa.chunked_array([found]), examples.index().n_tokens)
        except AnalysisError as error:
            raise DatasetError(str(error)) from error
    return found


def _by_token(name: str, values: Any, examples: ExampleTable, lines: Numbers) -> Any:
    """Return a list for each example, with the value of each of its tokens: null for one without row or line."""
    if is_list(values.type):
        raise DatasetError(f"column {name!r} holds lists, and a line of the side table is one row: give one value")
    index = examples.index()
    first_token = starts(index.n_tokens)
    positions = examples.table(["positions"])["positions"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    line_of_token = np.full(index.total_tokens, -1)
    line_of_token[np.repeat(first_token[:-1], index.n_rows) + positions] = lines
    chunks = []
    for start, stop in zip(index.first_example.tolist(), index.first_example.tolist()[1:], strict=False):
        here = line_of_token[first_token[start] : first_token[stop]]
        offsets = pa.array(first_token[start : stop + 1] - first_token[start], pa.int32())
        chunks.append(pa.ListArray.from_arrays(offsets, values.take(pa.array(here, pa.int64(), mask=here < 0))))
    return pa.chunked_array(chunks, pa.list_(values.type))


def _write(
    archive: Destination, examples: ExampleTable, found: pa.Table, table: SideTable, *, replace: bool
) -> SideTable:
    """Write the files of a table, then `annotations.json`; what it names no more is removed."""
    index = examples.index()
    known = read_side_tables(archive.path, index)
    if any(each.name == table.name for each in known) and not replace:
        raise PlanError(
            f"{archive} has a side table {table.name!r}: choose another name, or replace it ({named('replace', True)})"
        )
    for part, (start, stop) in enumerate(
        zip(index.first_example.tolist(), index.first_example.tolist()[1:], strict=False)
    ):
        sink = pa.BufferOutputStream()
        pq.write_table(
            found.slice(start, stop - start),
            sink,
            row_group_size=EXAMPLES_PER_GROUP,
            compression="zstd",
            write_page_checksum=True,
            version="2.6",
        )
        data = sink.getvalue().to_pybytes()
        table = dataclasses.replace(table, files=(*table.files, hashlib.sha256(data).hexdigest()))
        archive.keep(table.paths()[part], data)
    tables = [table if each.name == table.name else each for each in known]
    tables += [] if table in tables else [table]
    write_side_tables(archive, index.digest, tables)
    _clean(archive, tables)
    return table


def _clean(archive: Destination, tables: Sequence[SideTable]) -> None:
    """Remove files of earlier side tables, and of writers that were killed."""
    named_files = {path for table in tables for path in table.paths()}
    if isinstance(archive, DiskFolder):
        archive.inside(FOLDER).sweep()
    left = (f"{FOLDER}/{name}" for name in archive.names(FOLDER) if name.endswith(".parquet"))
    with suppress(OSError):
        archive.remove([name for name in left if name not in named_files])


@contextmanager
def _alone(archive: Destination) -> Iterator[None]:
    """Let one process at a time write side tables of an archive.

    Raises:
        PlanError: Another one does.
        ArchiveInUseError: Another run writes the archive, which is in a bucket.
        OSError: The archive cannot be written.
    """
    if isinstance(archive, BucketFolder):
        with archive.locked(), naming(archive.path, archive):
            if archive.n_bytes(SIDE_TABLES) is not None:
                archive.fetch([SIDE_TABLES])
            yield
        return
    folder = archive.path / FOLDER
    try:
        make_folders(folder)
        if not os.access(archive.path, os.W_OK) or not os.access(folder, os.W_OK):
            raise PermissionError(13, "it may not be written")
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OSError(
            error.errno,
            f"a side table is kept in the archive, and {archive} cannot be written ({error.strerror}): copy it with "
            "cp -r, and annotate the copy",
        ) from error
    try:
        if try_flock(descriptor) is False:
            raise PlanError(f"another process writes a side table of {archive}: try again when it is done")
        yield
    finally:
        os.close(descriptor)
