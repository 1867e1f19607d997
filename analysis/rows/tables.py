"""Rows as Arrow tables: tokens, their text and the columns of their examples beside the activations."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer

from residua.analysis.rows.blocks import blocks
from residua.store.base.errors import AnalysisError, DamagedArchiveError
from residua.store.read.archive import Archive
from residua.store.read.reader import Array
from residua.store.selection.row_filter import RowFilter

Choice: TypeAlias = "str | RowFilter | slice | Sequence[int] | npt.NDArray[np.integer]"
Rows = npt.NDArray[np.int64]


def table(
    archive: Archive, rows: Choice, sites: str | Iterable[str] = (), columns: Sequence[str] | None = None
) -> pa.Table:
    """Return chosen rows as one Arrow table; `.to_pandas()` makes a data frame of it.

    The columns are `row` (its number), `example`, `position` and `token`; `token_text` where the archive has a
    tokenizer; those of the example table; and one for each site. Activations are lists of fixed size, bfloat16 as
    float32, and rows of heads are lists of lists.

    >>> table(archive, "position > 0", sites="resid_post.3").to_pandas()  # doctest: +SKIP

    Args:
        archive: The archive.
        rows: A filter (``position > 0 and label == "code"``, see `residua.store.selection`), which chooses among
        the
            captured rows; or a slice; or row numbers, in the order in which they are wanted.
        sites: Sites to put beside; by default none.
        columns: Columns of the example table; by default all that came with the dataset.

    Raises:
        AnalysisError: The filter does not fit the archive, or two columns would have one name.
        DatasetError: The example table has no such column.
        IndexError: There is no such row.
        NotCapturedError: A row is not captured yet.
        UnknownSiteError: `sites` names no stored site.
    """
    joined = _Join(archive, sites, columns)
    found = [joined.batch(part) for part in _parts(archive, rows, None)]
    return pa.Table.from_batches(found or [joined.batch(np.zeros(0, np.int64))])


def record_batches(
    archive: Archive,
    rows: Choice,
    sites: str | Iterable[str] = (),
    columns: Sequence[str] | None = None,
    *,
    batch_rows: int = 16_384,
) -> Iterator[pa.RecordBatch]:
    """Yield what `table` returns, at most `batch_rows` rows at a time: for more rows than memory holds.

    Raises:
        As `table` does.
    """
    joined = _Join(archive, sites, columns)
    for part in _parts(archive, rows, batch_rows):
        yield joined.batch(part)


def _parts(archive: Archive, rows: Choice, most: int | None) -> Iterator[Rows]:
    """Yield the numbers of the chosen rows, at most so many at a time."""
    if isinstance(rows, str | RowFilter):
        where = RowFilter.parse(rows) if isinstance(rows, str) else rows
        found: Iterator[Rows] = (block.start + np.flatnonzero(where.mask(archive, *block)) for block in blocks(archive))
    elif isinstance(rows, slice):
        found = iter([np.arange(archive.n_rows)[rows]])
    else:
        found = iter([_numbers(archive, rows)])
    for part in found:
        for start in range(0, len(part), most or max(1, len(part))):
            yield part[start : start + (most or len(part))]


def _numbers(archive: Archive, rows: Sequence[int] | npt.NDArray[np.integer]) -> Rows:
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise AnalysisError(f"rows are chosen by a filter, a slice or row numbers, not by {rows!r}")
    outside = (numbers < 0) | (numbers >= archive.n_rows)
    if outside.any():
        raise IndexError(f"{archive.path} has {archive.n_rows:,} rows: there is no row {numbers[outside][0]:,}")
    return numbers.astype(np.int64)


class _Join:
    """Puts together what is asked for of any rows."""

    def __init__(self, archive: Archive, sites: str | Iterable[str], columns: Sequence[str] | None) -> None:
        self._archive = archive
        self._sites = archive.select(sites) if sites else ()
        names = list(archive.example_table.column_types()) if columns is None else list(columns)
        own = ["row", "example", "position", "token", *(["token_text"] if archive.tokenizer else [])]
        known: set[str] = set()
        for name in (*own, *names, *self._sites):
            if name in known:
                raise AnalysisError(
                    f"two columns of the table would be {name!r} ({', '.join(own)} are the row's own): leave one out; "
                    f"columns=[...] chooses those of the examples, of {names}"
                )
            known.add(name)
        self._examples = archive.example_table.table(names) if names else None

    def batch(self, rows: Rows) -> pa.RecordBatch:
        """Return the columns of `rows`."""
        archive = self._archive
        example, token = archive.rows.example[rows], archive.rows.token[rows]
        found = {"row": pa.array(rows), "example": pa.array(example)}
        found |= {"position": pa.array(archive.rows.position[rows]), "token": pa.array(token)}
        if archive.tokenizer is not None:
            found["token_text"] = _texts(archive.tokenizer, token)
        if self._examples is not None:
            self._check(example)
            taken = self._examples.take(pa.array(example)).combine_chunks()
            found |= {name: _whole(taken[name]) for name in taken.column_names}
        found |= {site: _lists(archive[site][rows]) for site in self._sites}
        return pa.RecordBatch.from_pydict(found)

    def _check(self, examples: Array) -> None:
        n_examples = len(self._archive.example_table)
        if examples.size and not 0 <= int(examples.min()) <= int(examples.max()) < n_examples:
            raise DamagedArchiveError(
                f"{self._archive.path}/rows/example names an example outside 0 to {n_examples - 1:,}: the array and "
                "the example table are not of one archive"
            )


def _texts(tokenizer: Tokenizer, tokens: Array) -> pa.Array:
    """Return the text of each token, decoded by itself."""
    distinct, places = np.unique(tokens, return_inverse=True)
    texts = tokenizer.decode_batch([[int(token)] for token in distinct], skip_special_tokens=False)
    return pa.array(texts, pa.string()).take(pa.array(places))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _lists(values: Array) -> pa.Array:
    """Return rows as lists of fixed size, in each other where a row has several axes."""
    if values.dtype == ml_dtypes.bfloat16:
        values = values.astype(np.float32)
    nested = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        nested = pa.FixedSizeListArray.from_arrays(nested, size)
    return nested
