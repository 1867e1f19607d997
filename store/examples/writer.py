"""Writes the example table part by part, for a complete dataset or for a loop that adds examples as it goes.

A part is a Parquet file that appears complete and durable, or not at all. Memory holds the part being filled and two
integers for each example. The same examples give the same bytes, with the same version of pyarrow and `flush` called
after the same examples.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from residua.store.base.errors import DatasetError
from residua.store.examples.columns import check_names, columns_of, type_of_values, value_bytes
from residua.store.examples.index import (
    DIGEST_KEY,
    EXAMPLES,
    IMAGES,
    IMAGES_KEY,
    MAX_PART_EXAMPLES,
    OWN_COLUMNS,
    Example,
    ExampleIndex,
    add_to_digest,
    part_name,
    starts,
)
from residua.store.examples.part import Part, read_parts
from residua.store.storage.destination import Destination, DiskFolder

BYTES_PER_PART = 2**26
VALUES_PER_GROUP = 2**18  # a reader decodes one row group at a time: about 1 MiB of token ids
EXAMPLES_PER_GROUP = 1024
_MOST_DOUBLINGS = 40  # of the bytes of the first part
EXAMPLES_PER_PART = 2**16  # short examples make few files; long ones fill a part by their bytes


class ExampleWriter:
    """Streams examples into the parts of a folder.

    Args:
        folder: The archive's ``examples`` folder; created if missing.
        examples_per_part: Most examples in a part.
        bytes_per_part: Bytes of tokens, positions and columns, uncompressed, at which a part is written.
        first_bytes: The same of the first part, if it is to be written sooner; each part may have twice as many as the
            one before.

    Raises:
        DatasetError: The folder has parts already.
    """

    def __init__(
        self,
        folder: Path,
        *,
        examples_per_part: int = EXAMPLES_PER_PART,
        bytes_per_part: int = BYTES_PER_PART,
        first_bytes: int | None = None,
    ) -> None:
        if not 0 < examples_per_part <= MAX_PART_EXAMPLES:
            raise DatasetError(f"examples_per_part={examples_per_part}: give 1 to {MAX_PART_EXAMPLES}")
        self._folder = folder
        self._place: object = folder.parent
        self._keep: Callable[[str, bytes], None] = DiskFolder(folder).keep
        self._limits = (examples_per_part, bytes_per_part)
        self._first_bytes = bytes_per_part if first_bytes is None else first_bytes
        self._there: list[Part] = []
        self._may_add = True
        self._types: dict[str, pa.DataType] = {}
        self._n_tokens, self._n_rows, self._first_example = array("i"), array("i"), array("q", [0])
        self._total_rows = 0
        self._digest = hashlib.sha256()
        self._pending: list[Example] = []
        self._pending_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        parts = sorted(folder.glob("part-*.parquet"))
        if parts:
            raise DatasetError(f"{folder} has examples already ({parts[0].name}): use another folder")

    @property
    def n_examples(self) -> int:
        """Examples added so far, written or not; the next one gets this number."""
        return len(self._n_tokens)

    @property
    def n_rows(self) -> int:
        """Rows of the examples added so far; the next one starts at this row."""
        return self._total_rows

    @property
    def n_parts(self) -> int:
        """Parts written so far."""
        return len(self._first_example) - 1

    def go_on_in(self, archive: Destination, *, may_add: bool = True) -> None:
        """Go on in an archive, which has the parts written so far, and maybe more of the same examples.

        Those are not written again: when an example is added that ends one of them, their digests are compared.

        Args:
            archive: The archive; its parts are in its local folder.
            may_add: Whether examples may follow those of the archive.
        """
        self._folder = archive.path / EXAMPLES
        self._place = archive
        self._keep = lambda name, data: archive.keep(f"{EXAMPLES}/{name}", data)
        self._there = read_parts(self._folder)
        self._may_add = may_add

    def add(self, example: Example) -> int:
        """Append one example and return its number. Writes the part once it is full.

        Raises:
            DatasetError: A column has a reserved name, or a value that cannot be stored. Values are checked when their
                part is written.
        """
        if example.images is not None:
            example = replace(example, columns={**example.columns, IMAGES: list(example.images)})
        unknown = example.columns.keys() - self._types.keys()
        if unknown:
            check_names(sorted(unknown))
        self._pending.append(example)
        self._n_tokens.append(example.input_ids.size)
        self._n_rows.append(example.positions.size)
        self._total_rows += example.positions.size
        self._pending_bytes += example.input_ids.nbytes + example.positions.nbytes + value_bytes(example.columns)
        if self._is_full():
            self.flush()
        return self.n_examples - 1

    def _is_full(self) -> bool:
        if self.n_parts < len(self._there):
            return len(self._pending) >= len(self._there[self.n_parts].n_rows)
        n_examples, n_bytes = self._limits
        n_bytes = min(n_bytes, self._first_bytes << min(self.n_parts, _MOST_DOUBLINGS))
        return len(self._pending) >= n_examples or self._pending_bytes >= n_bytes

    def flush(self) -> str | None:
        """Write the examples added since the last part, durably; return the part's name, or None without examples.

        Raises:
            DatasetError: The folder has this part already, of other examples.
        """
        if not self._pending:
            return None
        first = self._first_example[-1]
        digest = self._digest.copy()
        for example in self._pending:
            add_to_digest(digest, example.input_ids, example.positions, example.images or ())
        if self.n_parts < len(self._there):
            self._compare(self._there[self.n_parts], digest.hexdigest())
            self._written(digest)
            return part_name(self.n_parts - 1)
        if not self._may_add:
            raise self._is_other(first, self.n_examples)
        columns = columns_of(self._pending, self._types, first)
        table = pa.table({**self._own_columns(first), **columns})
        covers = {IMAGES_KEY: IMAGES.encode()} if self._pending[0].images is not None else {}
        table = table.replace_schema_metadata({DIGEST_KEY: digest.hexdigest().encode(), **covers})
        name = part_name(self.n_parts)
        self._keep(name, self._encoded(table))
        # Last, so that a part that the disk refused can be written again.
        self._types.update({column: values.type for column, values in columns.items()})
        self._written(digest)
        return name

    def _written(self, digest: "hashlib._Hash") -> None:
        self._digest = digest
        self._first_example.append(self.n_examples)
        self._pending, self._pending_bytes = [], 0

    def _compare(self, part: Part, digest: str) -> None:
        """Take a part that is there as written; raise DatasetError if it is of other examples."""
        if digest != part.digest:
            first = self._first_example[-1]
            raise self._is_other(first, first + len(part.n_rows))
        self._types.update(
            {field.name: type_of_values(field.type) for field in part.schema if field.name not in OWN_COLUMNS}
        )

    def _is_other(self, first: int, stop: int) -> DatasetError:
        return DatasetError(
            f"{self._place} was begun with another dataset, or with other settings or packages that read it: "
            f"examples {first:,} to {stop - 1:,} differ. Give what it was begun with, or choose another place"
        )

    def close(self) -> ExampleIndex:
        """Write the last part and return the index of all examples; may be called again.

        Raises:
            DatasetError: The folder has other examples, or more.
        """
        self.flush()
        if left := self._there[self.n_parts :]:
            raise self._is_other(self.n_examples, self.n_examples + sum(len(part.n_rows) for part in left))
        n_rows = np.array(self._n_rows, np.int32)
        return ExampleIndex(
            n_tokens=np.array(self._n_tokens, np.int32),
            n_rows=n_rows,
            first_row=starts(n_rows),
            first_example=np.array(self._first_example, np.int64),
            digest=self._digest.hexdigest(),
        )

    def _own_columns(self, first: int) -> dict[str, pa.Array]:
        n_tokens = np.array(self._n_tokens[first:], np.int32)
        n_rows = np.array(self._n_rows[first:], np.int32)
        first_row = self._total_rows - int(n_rows.sum(dtype=np.int64)) + starts(n_rows)[:-1]
        values = {"first_row": first_row, "n_rows": n_rows, "n_tokens": n_tokens}
        lists = {
            "input_ids": _lists(n_tokens, [example.input_ids for example in self._pending]),
            "positions": _lists(n_rows, [example.positions for example in self._pending]),
        }
        return {name: pa.array(column, OWN_COLUMNS[name]) for name, column in values.items()} | lists

    def _encoded(self, table: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(
            sink, table.schema, compression="zstd", write_page_checksum=True, version="2.6"
        ) as writer:
            first = self._first_example[-1]
            for start, stop in _groups(np.array(self._n_tokens[first:]), np.array(self._n_rows[first:])):
                writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
        return bytes(sink.getvalue().to_pybytes())


def _lists(counts: np.ndarray, runs: list[np.ndarray]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(starts(counts), pa.int32()), pa.array(np.concatenate(runs)))


def _groups(n_tokens: np.ndarray, n_rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the row groups; each ends at a number of values or of examples."""
    start = n_values = 0
    for i, (tokens, rows) in enumerate(zip(n_tokens.tolist(), n_rows.tolist(), strict=True)):
        n_values += tokens + rows
        if n_values >= VALUES_PER_GROUP or i + 1 - start >= EXAMPLES_PER_GROUP:
            yield start, i + 1
            start, n_values = i + 1, 0
    if start < len(n_tokens):
        yield start, len(n_tokens)
