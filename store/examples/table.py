"""Reads the example table: lengths when it is opened, tokens by row group, columns on request.

Nothing in the files is trusted; `residua.store.examples.part` has the checks. An object belongs to one thread.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from residua.store.base.errors import DamagedArchiveError, DatasetError, UnsafeArchiveError
from residua.store.examples.index import OWN_COLUMNS, ExampleIndex, IntArray, add_to_digest, part_name, starts
from residua.store.examples.part import Group, Part, naming, read_columns, read_group, read_images, read_parts
from residua.store.examples.side_tables import SideColumns
from residua.store.format.archive_metadata import file_digest, require_digest

_COLUMNS_AT_A_TIME = 1024  # examples whose columns are Python objects


class ExampleTable:
    """The examples of an archive, read from its ``examples`` folder.

    Args:
        folder: The folder with the parts.
        cached_groups: Row groups kept decoded; each has about a quarter of a million token ids and positions.
        digests: SHA-256 of parts by file name. A part is compared before anything but its lengths is used.
        side: Returns the side tables of these examples; called when their columns are asked for.

    Raises:
        DamagedArchiveError: The folder or a part is missing or unreadable.
        UnsafeArchiveError: A part has contents that Residua never writes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cached_groups: int = 4,
        digests: Mapping[str, str] | None = None,
        side: Callable[[ExampleIndex], Sequence[SideColumns]] = lambda _: (),
    ) -> None:
        self._folder = folder
        self._cached_groups = cached_groups
        self._cache: OrderedDict[tuple[int, int], Group] = OrderedDict()
        self._unchecked = dict(digests or {})
        self._columns: dict[tuple[int, str], pa.ListArray] = {}
        self._parts = read_parts(folder)
        self._side = side

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.index().n_examples

    def __repr__(self) -> str:
        return f"<ExampleTable {self._folder} of {sum(len(part.n_rows) for part in self._parts):,} examples>"

    def index(self) -> ExampleIndex:
        """Return the lengths of all examples, without reading tokens."""
        return self._index

    @property
    def part_digests(self) -> list[str]:
        """The digest of the table up to and including each part, in hex."""
        return [part.digest for part in self._parts]

    def refresh(self) -> None:
        """Take in the parts that were written since; raises as opening the table does."""
        if (self._folder / part_name(len(self._parts))).is_file():
            self._parts += read_parts(self._folder, len(self._parts))
            for name in ("_index", "_own_names"):
                self.__dict__.pop(name, None)

    @cached_property
    def _index(self) -> ExampleIndex:
        n_rows = _joined([part.n_rows for part in self._parts])
        first_row = starts(n_rows)
        first_example = starts(np.array([len(part.n_rows) for part in self._parts], np.int32))
        for part, start in zip(self._parts, first_example.tolist(), strict=False):
            if not np.array_equal(part.first_row, first_row[start : start + len(part.n_rows)]):
                raise UnsafeArchiveError(f"{part.path}: first_row is not the sum of the n_rows before it")
        return ExampleIndex(
            n_tokens=_joined([part.n_tokens for part in self._parts]),
            n_rows=n_rows,
            first_row=first_row,
            first_example=first_example,
            digest=self._parts[-1].digest if self._parts else hashlib.sha256().hexdigest(),
        )

    def rows(self, example_index: int) -> tuple[int, int]:
        """Return the first row of one example, and the row after its last."""
        self._check(self._parts[self._place(example_index)[0]])
        start, stop = self.index().first_row[example_index : example_index + 2].tolist()
        return start, stop

    def tokens(self, example_index: int) -> IntArray:
        """Return the token ids of one example, int32, read-only."""
        return self._content(example_index)[0]

    def positions(self, example_index: int) -> IntArray:
        """Return the kept positions of one example, int32, (rows of the example), read-only."""
        return self._content(example_index)[1]

    def batch(self, example_indices: Sequence[int]) -> list[tuple[IntArray, IntArray]]:
        """Return (token ids, positions) of examples; fast if they are neighbours."""
        return [self._content(example_index) for example_index in example_indices]

    def lists(self, column: str, example_indices: Sequence[int]) -> list[IntArray]:
        """Return one of the user's columns of lists of whole numbers for examples, int32; fast if they are neighbours.

        Raises:
            UnsafeArchiveError: The column holds something else, or lacks a value.
        """
        return [self._list(column, *self._place(example_index)) for example_index in example_indices]

    def _list(self, column: str, part_index: int, inside: int) -> IntArray:
        key = part_index, column
        if key not in self._columns:
            part = self._parts[part_index]
            self._check(part)
            found = read_columns(part, [column])
            values = found[column].combine_chunks() if column in found.schema.names else pa.array([None])
            if not _holds_numbers(values.type) or values.null_count or values.flatten().null_count:
                raise UnsafeArchiveError(f"{part.path}: column {column!r} should hold a list of numbers an example")
            self._columns = {key: values}  # of one part: batches are of neighbours
        return np.asarray(self._columns[key][inside].values, np.int32)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all examples as one table, or only `columns`; a column that a part lacks is null there.

        Raises:
            DatasetError: There is no such column.
        """
        wanted = [*OWN_COLUMNS, *self.column_types()] if columns is None else list(columns)
        if not self._own_names.issuperset(wanted):  # else side tables need not be read
            known = [*OWN_COLUMNS, *self.column_types()]
            if missing := [name for name in wanted if name not in known]:
                raise DatasetError(f"the examples have no column {missing[0]!r}; they have {', '.join(known)}")
        tables = list(self.parts(wanted))
        if not tables:
            return pa.schema([(name, OWN_COLUMNS[name]) for name in wanted]).empty_table()
        with naming(self._folder):
            joined = pa.concat_tables(tables, promote_options="default").select(wanted)
            return joined.replace_schema_metadata(None)

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the examples part by part, with those of `columns` that the part, or a side table, has."""
        rest = [name for name in columns if name not in self._own_names]
        for i, part in enumerate(self._parts):
            self._check(part)
            table = read_columns(part, columns)
            for side in self.side if rest else ():
                found = side.read(i, [name for name in rest if name in side.types])
                for name in found.column_names:
                    table = table.append_column(name, found[name])
            yield table

    def own_columns(self, numbers: npt.NDArray[np.int64] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of each example with the user's own columns of it; few of them are in memory at a time.

        Args:
            numbers: Numbers of examples, ascending; None for all.
        """
        names, start = list(self.column_types()), 0
        for part in self.parts(["n_rows", *names]):  # n_rows for its length: there may be no other column
            stop = start + part.num_rows
            inside = np.arange(start, stop) if numbers is None else numbers[(numbers >= start) & (numbers < stop)]
            for first in range(0, len(inside), _COLUMNS_AT_A_TIME):
                chosen = inside[first : first + _COLUMNS_AT_A_TIME]
                for number, line in zip(chosen.tolist(), part.take(chosen - start).to_pylist(), strict=True):
                    yield number, {name: line.get(name) for name in names}
            start = stop

    @cached_property
    def _own_names(self) -> frozenset[str]:
        """Names of the columns that are not of a side table."""
        return frozenset(OWN_COLUMNS).union(*(part.schema.names for part in self._parts))

    @cached_property
    def side(self) -> Sequence[SideColumns]:
        """The side tables.

        Raises:
            DamagedArchiveError: What names them is not what was written.
            UnsafeArchiveError: It names something that Residua does not write, or a column that the examples have.
        """
        found = self._side(self.index())
        if again := [name for side in found for name in side.types if name in self._own_names]:
            raise UnsafeArchiveError(f"{self._folder}: a side table has the column {again[0]!r}, as the examples do")
        return found

    def column_types(self) -> dict[str, pa.DataType]:
        """Return the Arrow types of the user's own columns and of side tables; null for one without any value."""
        types: dict[str, pa.DataType] = {}
        for part in self._parts:
            for field in part.schema:
                if pa.types.is_null(types.get(field.name, pa.null())):
                    types[field.name] = field.type
        for side in self.side:
            types |= side.types
        return {name: kind for name, kind in types.items() if name not in OWN_COLUMNS}

    def require(self, *, n_rows: int | None, digest: object) -> None:
        """Compare the examples with their archive's metadata; None if it has no such entry.

        Raises:
            UnsafeArchiveError: The examples have another number of rows.
            DamagedArchiveError: The examples have another digest.
        """
        index = self.index()
        if n_rows not in (None, index.total_rows):
            raise UnsafeArchiveError(
                f"{self._folder}: the examples have {index.total_rows:,} rows, but the archive has {n_rows:,}: "
                "copy the archive again from its source"
            )
        if digest not in (None, index.digest):
            raise DamagedArchiveError(
                f"{self._folder}: the examples have the digest {index.digest[:12]}, but the archive was made for "
                f"{digest}: restore the parts from a copy"
            )

    def verify(self) -> None:
        """Read all tokens and positions, and compare them with the digest in each part.

        Raises:
            DamagedArchiveError: A part has other content than was written.
        """
        digest = hashlib.sha256()
        bounds = self.index().first_example.tolist()
        for part, start, stop in zip(self._parts, bounds, bounds[1:], strict=False):
            images = read_images(part)
            for example_index in range(start, stop):
                add_to_digest(digest, *self._content(example_index), images[example_index - start] if images else ())
            if digest.hexdigest() != part.digest:
                raise DamagedArchiveError(f"{part.path}: its tokens or positions were altered: restore it from a copy")

    def _place(self, example_index: int) -> tuple[int, int]:
        """Return the part that has an example, and the number of the example in it."""
        index = self.index()
        if not 0 <= example_index < index.n_examples:
            raise IndexError(f"there is no example {example_index}: there are examples 0 to {index.n_examples - 1}")
        part_index = int(np.searchsorted(index.first_example, example_index, side="right")) - 1
        return part_index, example_index - int(index.first_example[part_index])

    def _content(self, example_index: int) -> tuple[IntArray, IntArray]:
        part_index, inside = self._place(example_index)
        group_starts = self._parts[part_index].group_starts
        group_index = int(np.searchsorted(group_starts, inside, side="right")) - 1
        group = self._group(part_index, group_index)
        return group.content(inside - int(group_starts[group_index]))

    def _group(self, part_index: int, group_index: int) -> Group:
        key = part_index, group_index
        if key in self._cache:
            self._cache.move_to_end(key)
        else:
            self._check(self._parts[part_index])
            self._cache[key] = read_group(self._parts[part_index], group_index)
            if len(self._cache) > self._cached_groups:
                self._cache.popitem(last=False)
        return self._cache[key]

    def _check(self, part: Part) -> None:
        expected = self._unchecked.get(part.path.name)
        if expected is None:
            return
        with naming(part.path):
            found = file_digest(part.path)
        require_digest(part.path, found, expected)
        self._unchecked.pop(part.path.name, None)


def _holds_numbers(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) and pa.types.is_integer(kind.value_type))


def _joined(arrays: list[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int32), *arrays])
