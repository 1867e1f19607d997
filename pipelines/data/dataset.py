"""Read a dataset as examples: open it, tokenize it, cut it into windows, choose positions.

Whatever is left out is counted: a source without tokens, an example below `min_length`, an example without a
position to keep. Every example carries, next to the dataset's own columns, ``source_index`` (the number of its row in
the dataset) and ``source_token`` (the position of its first token in that row).
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.rows_to_tokens import Source, Tokens
from residua.pipelines.data.sources import dataset_commit, is_dataset, local_path, open_rows, refuse_taken
from residua.pipelines.data.tokenizer import Tokenizer
from residua.store.base.canonical import Json, digest_of
from residua.store.base.errors import DatasetError
from residua.store.base.naming import named
from residua.store.examples.index import Example
from residua.store.selection.positions import IntArray, kept_positions

_MOST_FILES = 100  # that the provenance names; all are counted and covered by its digest
SOURCE_COLUMNS = ("source_index", "source_token")


@dataclass(kw_only=True)
class DatasetReport:
    """What became of a dataset; filled while it is read."""

    # Texts, chats or token lists read.
    n_sources: int = 0
    # Examples made of them, with their tokens (added start tokens included) and their rows.
    n_examples: int = 0
    n_tokens: int = 0
    n_rows: int = 0
    # Sources that were split into windows, and sources that `truncate` shortened.
    n_split: int = 0
    n_truncated: int = 0
    # Texts that begin with the tokenizer's start tokens themselves, to which none were added; rows with two of them.
    n_own_start: int = 0
    n_doubled_start: int = 0
    # Chats with tools that the chat template does not use, and with content parts that it writes out as a list.
    n_without_tools: int = 0
    n_written_parts: int = 0
    # Tokens that are the assistant's only in part, and assistant's turns without a token of their own.
    n_shared_tokens: int = 0
    n_lost_turns: int = 0
    # Tokens that `truncate` dropped, and padding that the dataset's attention_mask marked.
    n_truncated_tokens: int = 0
    n_padding: int = 0
    # Left out: sources without a token, examples shorter than min_length, examples without a position to keep.
    n_empty: int = 0
    n_short: int = 0
    n_without_rows: int = 0
    # Examples with an image whose patches have no known place in it.
    n_unplaced: int = 0
    # Whether max_tokens ended the reading, and how many tokens the last example lost to it.
    cut_at_max_tokens: bool = False
    n_cut_tokens: int = 0
    # A sentence for each column that looks as if it should have one value a token, and has not.
    odd_lists: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, values: object) -> "DatasetReport | None":
        """Return the report that ``dataclasses.asdict`` made `values` of; None if they are not such values."""
        plain = asdict(cls())
        if not isinstance(values, Mapping) or values.keys() != plain.keys():
            return None
        if any(type(value) is not type(plain[name]) for name, value in values.items()):
            return None
        return cls(**values) if all(isinstance(text, str) for text in values["odd_lists"]) else None

    def add(self, counts: Mapping[str, int]) -> None:
        """Add counts by the names of these."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)

    def count(self, *examples: Example) -> None:
        """Count an example, which may have several sequences."""
        self.n_examples += 1
        self.n_tokens += sum(example.input_ids.size for example in examples)
        self.n_rows += sum(example.positions.size for example in examples)

    def notes(self) -> list[str]:
        """Return one sentence for everything that was cut or left out."""
        notes = {
            f"{self.n_empty} rows of the dataset have no tokens and were left out": self.n_empty,
            f"{self.n_own_start} texts begin with the tokenizer's start token themselves, and got no special tokens "
            f"({named('add_special_tokens', True)} adds them all the same)": self.n_own_start,
            f"{self.n_doubled_start} rows of the dataset begin with the tokenizer's start token twice": (
                self.n_doubled_start
            ),
            f"{self.n_without_tools} chats have tools, which the chat template does not use": self.n_without_tools,
            f"{self.n_written_parts} chats have contents in parts, which the chat template writes as Python lists": (
                self.n_written_parts
            ),
            f"{self.n_shared_tokens} tokens hold letters of an assistant's turn and of the text beside it, and are not "
            "among the assistant's": self.n_shared_tokens,
            f"{self.n_lost_turns} turns of the assistant have no token of their own": self.n_lost_turns,
            f"{self.n_split} rows of the dataset were split into windows": self.n_split,
            f"{self.n_truncated} rows lost {self.n_truncated_tokens} tokens at their end": self.n_truncated,
            f"{self.n_padding} tokens of padding were removed": self.n_padding,
            f"{self.n_short} examples were shorter than asked and were left out": self.n_short,
            f"{self.n_without_rows} examples have no position to keep and were left out": self.n_without_rows,
            f"in {self.n_unplaced} examples the place of a patch in its image is not known: patch_row and patch_column "
            "are -1": self.n_unplaced,
            f"{named('max_tokens')} ended the reading; the last example lost {self.n_cut_tokens} tokens": (
                self.cut_at_max_tokens
            ),
        }
        return [*(sentence for sentence, count in notes.items() if count), *self.odd_lists]


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
    """Read a dataset as examples, in the order of the dataset.

    Args:
        source: A path or hub id; a `datasets` object; or an iterable of texts, of lists of token ids, of chats
            (lists of messages), or of rows (dictionaries).
        settings: What to read, how to cut it, and which positions to keep.
        tokenizer: A transformers tokenizer; token ids need none.
        model_limit: Most tokens that the model takes; None if it has no limit.
        special_ids: Ids of special tokens, for `drop_special`.
        vocab_size: Token ids must lie below it; None skips this check.
        report: Filled while the examples are read.

    Returns:
        The examples. The dataset is opened at once and read lazily, a few hundred rows ahead.

    Raises:
        DatasetError: The dataset cannot be opened, or (while iterating) a row cannot be used, or the dataset gives
            no example at all.

    Example:
        >>> settings = DatasetSettings(max_length=2, positions="last")
        >>> examples = read_examples([[5, 6, 7]], settings=settings)
        >>> [example.input_ids.tolist() for example in examples]
        [[5, 6], [7]]
    """
    limit = _limit(settings, model_limit)
    rows = open_rows(source, settings)
    refuse_taken(rows.columns, SOURCE_COLUMNS)
    tokens = Tokens(rows=rows, settings=settings, tokenizer=tokenizer, vocab_size=vocab_size)
    reading = _Reading(
        settings=settings,
        limit=limit,
        start_ids=tokens.start_ids,
        special_ids=np.array(sorted(special_ids), np.int32),
        report=report or DatasetReport(),
    )
    return reading.examples(tokens)


def _limit(settings: DatasetSettings, model_limit: int | None) -> int | None:
    """Return the most tokens of an example, or of a prompt, which leaves room for what is generated."""
    limit = settings.length_limit(model_limit)
    if limit is None or settings.generate is None:
        return limit
    if settings.generate >= limit:
        whose = f"the model takes {limit} tokens" if settings.max_length is None else named("max_length", limit)
        raise DatasetError(f"{named('generate', settings.generate)} leaves no room for a prompt: {whose}; lower it")
    return limit - settings.generate


def dataset_identity(source: object, settings: DatasetSettings) -> dict[str, Json]:
    """Return what the provenance says of `source`: path or id, split, and its fingerprint or commit.

    Local files are listed with their sizes only; the digest of the examples, which is stored too, covers the content.

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
        return identity | {"kind": "datasets", "fingerprint": None if fingerprint is None else str(fingerprint)}
    return identity | {"kind": "iterable", "type": type(source).__name__}


def _files(path: Path) -> dict[str, Json]:
    """Return names and sizes of the first files, the number of files, and the digest of the full list."""
    paths = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files: list[Json] = [
        {"name": file.relative_to(path.parent).as_posix(), "bytes": file.stat().st_size} for file in paths
    ]
    return {"files": files[:_MOST_FILES], "n_files": len(files), "files_digest": digest_of(files)}


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` of a source, after `n_added` start tokens that are added to them."""

    start: int
    stop: int
    n_added: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of the window, added ones included."""
        return self.n_added + self.stop - self.start


def cut_windows(n_tokens: int, max_length: int, n_start: int) -> list[Window]:
    """Cut a source of `n_tokens` tokens into windows that follow each other without overlap.

    If a source begins with the tokens that its tokenizer puts at the start (a BOS, for example), every later window
    gets them too. They count towards `max_length`.

    >>> cut_windows(7, 4, 1)
    [Window(start=0, stop=4, n_added=0), Window(start=4, stop=7, n_added=1)]

    Args:
        n_tokens: Tokens of the source, its own start tokens included.
        max_length: Most tokens of a window.
        n_start: Start tokens to put before every window but the first.

    Raises:
        DatasetError: The start tokens alone fill a window.
    """
    if n_tokens <= max_length:
        return [Window(0, n_tokens)]
    step = max_length - n_start
    if step < 1:
        raise DatasetError(
            f"{named('max_length', max_length)} leaves no room next to the {n_start} start tokens of each window; "
            f"give at least {n_start + 1}"
        )
    later = range(max_length, n_tokens, step)
    return [Window(0, max_length), *(Window(at, min(at + step, n_tokens), n_start) for at in later)]


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One pass over a dataset: windows, positions, and the count of what is left out."""

    settings: DatasetSettings
    limit: int | None  # tokens of an example
    start_ids: IntArray
    special_ids: IntArray
    report: DatasetReport

    def examples(self, tokens: Tokens) -> Iterator[Example]:
        """Yield the examples; raises DatasetError at the end if there are none."""
        report, most = self.report, self.settings.max_tokens
        for source, window in self._windows(tokens):
            if most is not None and report.n_tokens >= most:
                report.cut_at_max_tokens = True
                return
            # A prompt is continued whole, or not at all.
            room = None if most is None or self.settings.generate is not None else most - report.n_tokens
            example = self._example(source, window, room)
            if example is not None:
                report.count(example)
                yield example
            if report.cut_at_max_tokens:
                break
        if not report.n_examples:
            raise DatasetError(f"the dataset gives no example: {'; '.join(report.notes())}")

    def _windows(self, tokens: Tokens) -> Iterator[tuple[Source, Window]]:
        for source in tokens:
            self.report.n_sources += 1
            self.report.add(source.counts)
            self.report.odd_lists = source.token_columns.notes()
            if not source.input_ids.size:
                self.report.n_empty += 1
            elif self.limit is None or source.input_ids.size <= self.limit:
                yield source, Window(0, source.input_ids.size)
            else:
                for window in self._cut(source, self.limit):
                    yield source, window

    def _cut(self, source: Source, limit: int) -> list[Window]:
        n_tokens = source.input_ids.size
        if self.settings.generate is not None:
            raise DatasetError(
                f"row {source.row} of the dataset has {n_tokens} tokens, and with "
                f"{named('generate', self.settings.generate)} a prompt may have {limit}: shorten it, leave it out, or "
                "generate fewer tokens"
            )
        if self.settings.long_rule == "refuse":
            given = self.settings.max_length
            whose = f"the model takes {limit}" if given is None else f"{named('max_length', given)} was given"
            raise DatasetError(
                f"row {source.row} of the dataset has {n_tokens} tokens, and {whose}: give "
                f"{named('max_length', limit)}, with {named('long_examples', 'split')} to cut longer rows into "
                f"windows, or with {named('long_examples', 'truncate')} to drop their ends"
            )
        if self.settings.long_rule == "truncate":
            self.report.n_truncated += 1
            self.report.n_truncated_tokens += n_tokens - limit
            return [Window(0, limit)]
        self.report.n_split += 1
        n_start = self.start_ids.size
        begins = np.array_equal(source.input_ids[:n_start], self.start_ids)
        return cut_windows(n_tokens, limit, n_start if begins else 0)

    def _example(self, source: Source, window: Window, room: int | None) -> Example | None:
        """Return the example of a window, cut to `room` tokens; None if it is left out."""
        n_tokens = window.n_tokens if room is None else min(room, window.n_tokens)
        if n_tokens < window.n_tokens:
            self.report.cut_at_max_tokens = True
            self.report.n_cut_tokens = window.n_tokens - n_tokens
        if n_tokens < self.settings.min_length or n_tokens <= window.n_added:
            self.report.n_short += 1
            return None
        own = slice(window.start, window.start + n_tokens - window.n_added)
        input_ids = np.concatenate([self.start_ids[: window.n_added], source.input_ids[own]])
        marked = None
        if source.marked is not None:
            marked = np.concatenate([np.zeros(window.n_added, np.bool_), source.marked[own]])
        dropped = np.isin(input_ids, self.special_ids) if self.settings.drop_special else None
        positions = kept_positions(self.settings.rule, n_tokens, marked=marked, dropped=dropped)
        if not positions.size:
            self.report.n_without_rows += 1
            return None
        columns = source.columns_of(own, window.n_added)
        where = dict(zip(SOURCE_COLUMNS, (source.row, window.start), strict=True))
        return Example(input_ids=input_ids, positions=positions, columns={**columns, **where})
