"""Rows as Arrow tables: tokens, their text, columns of their examples, and activations."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer

from residua.analysis.rows.blocks import blocks
from residua.analysis.rows.columns import ExampleColumns
from residua.store.base.errors import AnalysisError
from residua.store.examples.index import NO_TOKEN
from residua.store.read.archive import Archive
from residua.store.read.rows_in_shards import Array
from residua.store.read.text import token_texts
from residua.store.selection.row_filter import RowFilter

Selection: TypeAlias = "str | RowFilter | slice | Sequence[int] | npt.NDArray[np.integer]"
Numbers: TypeAlias = npt.NDArray[np.int64]


def table(
    archive: Archive, rows: Selection, sites: str | Iterable[str] = (), columns: Sequence[str] | None = None
) -> pa.Table:
    """Return selected rows as one Arrow table; `.to_pandas()` turns it into a data frame.

    The columns are `row` (the row's number), `example`, `position` and `token`; `token_text` if the archive has a
    tokenizer (with its space; for a part of a character, the full character); those of the example table; and one for
    each site. Activations are lists of fixed size, with bfloat16 and float16 as float32. Rows with heads are lists of
    lists.

    >>> table(archive, "position > 0", sites="resid_post.3").to_pandas()  # doctest: +SKIP

    Args:
        archive: The archive.
        rows: A filter (``position > 0 and label == "code"``, see `residua.store.selection`), which selects among the
            captured rows; or a slice; or row numbers, in any order.
        sites: Sites to add; by default none.
        columns: Columns of the example table; by default all that came with the dataset.

    Raises:
        AnalysisError: The filter does not fit the archive, or two columns have the same name.
        DatasetError: The example table has no such column.
        IndexError: There is no such row.
        NotCapturedError: A row is not captured yet.
        UnknownSiteError: `sites` names no stored site.
    """
    columns_of = _Columns(archive, sites, columns)
    found = [columns_of(numbers) for numbers in _row_numbers(archive, rows, None)]
    return pa.Table.from_batches(found or [columns_of(np.zeros(0, np.int64))])


def record_batches(
    archive: Archive,
    rows: Selection,
    sites: str | Iterable[str] = (),
    columns: Sequence[str] | None = None,
    *,
    batch_rows: int = 16_384,
) -> Iterator[pa.RecordBatch]:
    """Yield what `table` returns in batches of at most `batch_rows` rows, for more rows than fit into memory.

    Raises:
        As `table` does.
    """
    columns_of = _Columns(archive, sites, columns)
    for numbers in _row_numbers(archive, rows, batch_rows):
        yield columns_of(numbers)


def _row_numbers(archive: Archive, rows: Selection, most: int | None) -> Iterator[Numbers]:
    """Yield the numbers of the selected rows, at most `most` at a time."""
    if isinstance(rows, str | RowFilter):
        where = RowFilter.parse(rows) if isinstance(rows, str) else rows
        found: Iterator[Numbers] = (
            block.start + np.flatnonzero(where.mask(archive, *block)) for block in blocks(archive)
        )
    else:
        found = iter([np.arange(archive.n_rows)[rows] if isinstance(rows, slice) else _listed(archive, rows)])
    for numbers in found:
        for start in range(0, len(numbers), most or max(1, len(numbers))):
            yield numbers[start : start + (most or len(numbers))]


def _listed(archive: Archive, rows: Sequence[int] | npt.NDArray[np.integer]) -> Numbers:
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise AnalysisError(f"rows cannot be selected by {rows!r}: give a filter, a slice or row numbers")
    outside = (numbers < 0) | (numbers >= archive.n_rows)
    if outside.any():
        raise IndexError(f"{archive.place} has {archive.n_rows:,} rows: there is no row {numbers[outside][0]:,}")
    return numbers.astype(np.int64)


class _Columns:
    """The columns of a table, for any rows."""

    def __init__(self, archive: Archive, sites: str | Iterable[str], columns: Sequence[str] | None) -> None:
        self._archive = archive
        self._sites = archive.select(sites) if sites else ()
        names = list(archive.example_table.column_types()) if columns is None else list(columns)
        own = ["row", "example", "position", "token", *(["token_text"] if archive.tokenizer else [])]
        known: set[str] = set()
        for name in (*own, *names, *self._sites):
            if name in known:
                raise AnalysisError(
                    f"two columns of the table have the name {name!r}: leave one out. The row's own columns are "
                    f"{', '.join(own)}; columns=[...] selects those of the examples, which are {names}."
                )
            known.add(name)
        self._of_examples = ExampleColumns(archive, names)

    def __call__(self, rows: Numbers) -> pa.RecordBatch:
        """Return the columns of `rows`."""
        archive = self._archive
        example, token = archive.rows.example[rows], archive.rows.token[rows]
        found = {"row": pa.array(rows), "example": pa.array(example)}
        found |= {"position": pa.array(archive.rows.position[rows]), "token": pa.array(token)}
        if archive.tokenizer is not None:
            found["token_text"] = _texts(archive, archive.tokenizer, rows, token)
        found |= self._of_examples(rows)
        found |= {site: _lists(archive[site][rows]) for site in self._sites}
        return pa.RecordBatch.from_pydict(found)


def _texts(archive: Archive, tokenizer: Tokenizer, rows: Numbers, tokens: Array) -> pa.Array:
    """Return the text of each token; null for a row without a token.

    A part of a character is shown as the character, which its neighbours in the example complete.
    """
    distinct, indices = np.unique(tokens, return_inverse=True)
    known = [int(token) for token in distinct if token != NO_TOKEN]
    of_token = [*([None] * (len(distinct) - len(known))), *token_texts(tokenizer, known)]
    texts = [of_token[index] for index in indices.tolist()]
    for at in np.flatnonzero(tokens != NO_TOKEN).tolist():
        if texts[at] is None:
            texts[at] = archive.text(int(rows[at]), 0)[1:-1]  # without « and »
    return pa.array(texts, pa.string())


def _lists(values: Array) -> pa.Array:
    """Return rows as lists of fixed size, nested if a row has several axes."""
    nested = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        nested = pa.FixedSizeListArray.from_arrays(nested, size)
    return nested
