"""From a dataset to examples: open, tokenize, cut, choose positions; nothing is left out without being counted.

A source without tokens, an example below `min_length` and one of which no position is kept give no example; the
report counts them. Beside the dataset's own columns every example carries ``source_index``, the number of its row in
the dataset, and ``source_token``, the number of its first own token there.
"""

from collections.abc import Iterator
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from residua.pipelines.data.dataset_settings import DatasetReport, DatasetSettings
from residua.pipelines.data.hub import dataset_commit
from residua.pipelines.data.positions import IntArray, kept_positions
from residua.pipelines.data.sources import is_dataset, local_path, open_rows
from residua.pipelines.data.tokens import Source, Tokenizer, Tokens, start_tokens
from residua.pipelines.data.windows import Window, cut_windows
from residua.store.base.canonical import Json, digest_of
from residua.store.base.errors import DatasetError
from residua.store.examples.index import Example

__all__ = ["DatasetReport", "DatasetSettings", "dataset_identity", "read_examples"]

_MOST_FILES = 100
SOURCE_COLUMNS = ("source_index", "source_token")


def read_examples(
    source: object,
    *,
    settings: DatasetSettings,
    tokenizer: Tokenizer | None = None,
    model_limit: int | None = None,
    special_ids: frozenset[int] = frozenset(),
    vocab_size: int | None = None,
    report: DatasetReport | None = None,
) -> Iterator[Example]:
    """Read a dataset as examples, in its order.

    Args:
        source: A path or hub id; a `datasets` object; or an iterable of texts, of lists of token ids, of chats
            (lists of messages), or of rows (dictionaries).
        settings: What to read, how to cut it, and which positions to keep.
        tokenizer: A transformers tokenizer; not needed for token ids.
        model_limit: Most tokens that the model takes; None if it has no limit.
        special_ids: Ids of special tokens, for `drop_special`.
        vocab_size: Token ids must lie below it; None leaves that unchecked.
        report: Filled while the examples are read.

    Returns:
        The examples; the dataset is opened at once and read as they are taken, some hundred rows ahead.

    Raises:
        DatasetError: The dataset cannot be opened, or (while iterating) a row cannot be used, or no example
            came of it.

    Example:
        >>> settings = DatasetSettings(max_length=2, positions="last")
        >>> examples = read_examples([[5, 6, 7]], settings=settings)
        >>> [example.input_ids.tolist() for example in examples]
        [[5, 6], [7]]
    """
    limit = settings.length_limit(model_limit)
    rows = open_rows(source, settings)
    for name in rows.columns:
        if name in SOURCE_COLUMNS:
            raise DatasetError(f"the dataset has a column {name!r}, which the examples need for themselves: rename it")
    tokens = Tokens(
        rows,
        settings.rule,
        text_column=settings.text_column,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
    )
    reading = _Reading(settings, limit, start_tokens(tokenizer), special_ids, report or DatasetReport())
    return reading.examples(tokens)


def dataset_identity(source: object, settings: DatasetSettings) -> dict[str, Json]:
    """Return what names `source` in the provenance: path or id, split, and the fingerprint or commit it has.

    Local files are named with their sizes; the digest of the examples, which is stored too, covers the content.

    Raises:
        DatasetError: There is no such file or folder, and no such dataset on the hub.
    """
    identity: dict[str, Json] = {"split": settings.split}
    if isinstance(source, str | PathLike):
        path, text = local_path(source), fspath(source)
        if path is None:
            commit = dataset_commit(text, settings)
            return identity | {"kind": "hub", "id": text, "subset": settings.subset, "revision": commit}
        return identity | {"kind": "local", "path": text, **_files(path)}
    if is_dataset(source):
        fingerprint = getattr(source, "_fingerprint", None)
        known = None if fingerprint is None else str(fingerprint)
        return identity | {"kind": "datasets", "fingerprint": known}
    return identity | {"kind": "iterable", "type": type(source).__name__}


def _files(path: Path) -> dict[str, Json]:
    """Return names and sizes: of the first files, their number, and the digest of the list of all."""
    paths = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files: list[Json] = [
        {"name": file.relative_to(path.parent).as_posix(), "bytes": file.stat().st_size} for file in paths
    ]
    return {"files": files[:_MOST_FILES], "n_files": len(files), "files_digest": digest_of(files)}


class _Reading:
    """One pass over a dataset: windows, positions, and the count of what was left out."""

    def __init__(
        self,
        settings: DatasetSettings,
        limit: int | None,
        start_ids: IntArray,
        special_ids: frozenset[int],
        report: DatasetReport,
    ) -> None:
        self._settings = settings
        self._rule = settings.rule
        self._limit = limit
        self._start_ids = start_ids
        self._special_ids = np.array(sorted(special_ids), np.int32)
        self._report = report

    def examples(self, tokens: Tokens) -> Iterator[Example]:
        """Yield the examples; raises DatasetError at the end if there were none."""
        report, most = self._report, self._settings.max_tokens
        for source, window in self._windows(tokens):
            if most is not None and report.n_tokens >= most:
                report.cut_at_max_tokens = True
                return
            example = self._example(source, window, None if most is None else most - report.n_tokens)
            if example is not None:
                report.n_examples += 1
                report.n_tokens += example.input_ids.size
                report.n_rows += example.positions.size
                yield example
            if report.cut_at_max_tokens:
                break
        if not report.n_examples:
            raise DatasetError(f"the dataset gives no example: {'; '.join(report.notes())}")

    def _windows(self, tokens: Tokens) -> Iterator[tuple[Source, Window]]:
        for source in tokens:
            self._report.n_sources += 1
            self._report.n_padding += source.n_padding
            if not source.input_ids.size:
                self._report.n_empty += 1
            elif self._limit is None or source.input_ids.size <= self._limit:
                yield source, Window(0, source.input_ids.size)
            else:
                for window in self._cut(source, self._limit):
                    yield source, window

    def _cut(self, source: Source, limit: int) -> list[Window]:
        n_tokens = source.input_ids.size
        if self._settings.long_rule == "refuse":
            whose = "the model takes" if self._settings.max_length is None else "--max-length is"
            raise DatasetError(
                f"row {source.row} of the dataset has {n_tokens} tokens, and {whose} {limit}: give "
                f"--max-length {limit}, with --long-examples split to cut longer rows into windows, or with "
                "--long-examples truncate to drop their ends"
            )
        if self._settings.long_rule == "truncate":
            self._report.n_truncated += 1
            self._report.n_truncated_tokens += n_tokens - limit
            return [Window(0, limit)]
        self._report.n_split += 1
        n_start = self._start_ids.size
        begins = np.array_equal(source.input_ids[:n_start], self._start_ids)
        return cut_windows(n_tokens, limit, n_start if begins else 0)

    def _example(self, source: Source, window: Window, room: int | None) -> Example | None:
        """Return the example of a window, cut to `room` tokens; None if it is left out."""
        n_tokens = window.n_tokens if room is None else min(room, window.n_tokens)
        if n_tokens < window.n_tokens:
            self._report.cut_at_max_tokens = True
            self._report.n_cut_tokens = window.n_tokens - n_tokens
        if n_tokens < self._settings.min_length or n_tokens <= window.n_added:
            self._report.n_short += 1
            return None
        own = slice(window.start, window.start + n_tokens - window.n_added)
        input_ids = np.concatenate([self._start_ids[: window.n_added], source.input_ids[own]])
        marked = None
        if source.marked is not None:
            marked = np.concatenate([np.zeros(window.n_added, np.bool_), source.marked[own]])
        dropped = np.isin(input_ids, self._special_ids) if self._settings.drop_special else None
        positions = kept_positions(self._rule, n_tokens, marked=marked, dropped=dropped)
        if not positions.size:
            self._report.n_without_rows += 1
            return None
        where = dict(zip(SOURCE_COLUMNS, (source.row, window.start), strict=True))
        return Example(input_ids=input_ids, positions=positions, columns={**source.columns, **where})
