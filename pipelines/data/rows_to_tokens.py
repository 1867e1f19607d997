"""Turn rows of a dataset into token ids: tokenize texts and chats, check lists of token ids.

Every row gives one source, in order; a row without tokens gives an empty one. Unused columns are kept. The content
is in the column that the user names, else in ``input_ids``, ``text`` or ``messages``, else in the only text column.
The first row that has a value shows what the column holds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np

from residua.pipelines.data.chats import TOOLS, Chats
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.missing_files import to_give
from residua.pipelines.data.sources import Row, Rows, require_column
from residua.pipelines.data.token_columns import TokenColumns
from residua.pipelines.data.tokenizer import Tokenizer, knows_text, start_tokens, token_ids
from residua.store.base.errors import DatasetError
from residua.store.base.naming import named
from residua.store.selection.evaluate import Mask
from residua.store.selection.positions import IntArray, marks_of

_TEXTS_AT_ONCE = 256
_LETTERS_AT_ONCE = 2**22  # or token ids: bounds memory where rows are long
_MAX_ID = 2**31 - 1

_Batch: TypeAlias = list[tuple[int, Row]]
_Item = TypeVar("_Item")
_Kind: TypeAlias = Literal["text", "chat", "ids"]
_USUAL: Mapping[str, _Kind] = {"input_ids": "ids", "text": "text", "messages": "chat"}
_PROMPT = "prompt"
"""The column that is continued, unless the user names another."""


@dataclass(frozen=True, eq=False)
class Source:
    """One row of the dataset as tokens.

    Attributes:
        row: Its number in the dataset, from 0.
        input_ids: Token ids, int32, (tokens).
        marked: Which tokens the position rule's column or the assistant's turns mark, (tokens); None for other rules.
        columns: The row's other columns.
        token_columns: Cuts those of them that have one value a token.
        counts: What is to be reported of the row, by the names of a `DatasetReport`.
    """

    row: int
    input_ids: IntArray
    marked: Mask | None
    columns: Row
    token_columns: TokenColumns
    counts: Mapping[str, int]

    def columns_of(self, kept: slice, n_added: int) -> Row:
        """Return the columns of the tokens `kept`, after `n_added` start tokens."""
        return self.token_columns.cut(self.row, self.columns, self.input_ids.size, kept, n_added)


@dataclass(frozen=True)
class _Content:
    """Which column holds a row's content, and as what."""

    kind: _Kind
    column: str


class _Encoded(NamedTuple):
    """The content of a row as tokens; what else there is, as a `Source` has it."""

    ids: IntArray
    marked: Mask | None = None
    counts: Mapping[str, int] = {}


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Turns rows into sources, in order; tokenizes some hundred texts at a time.

    Unless code of the user's runs while rows are read, as many texts become tokens ahead.

    Attributes:
        rows: The dataset.
        settings: The column with the content, how texts and chats become tokens, and the position rule, which may
            need marks from a column or from the chat template.
        tokenizer: Needed for texts and chats.
        vocab_size: Token ids must lie below it; None skips this check.

    Raises:
        DatasetError: The settings name a column that the dataset does not have.
    """

    rows: Rows
    settings: DatasetSettings
    tokenizer: Tokenizer | None
    vocab_size: int | None

    def __post_init__(self) -> None:
        rule, tools = self.settings.rule.column, self.settings.tools_column
        for asked, column in ((named("positions", f"column:{rule}"), rule), (named("tools", tools), tools)):
            require_column(asked, column, self.rows.columns)

    @cached_property
    def start_ids(self) -> IntArray:
        """The tokens that the tokenizer puts before every text, such as a BOS: int32, often none or one."""
        return start_tokens(self.tokenizer)

    def __iter__(self) -> Iterator[Source]:
        """Yield the sources; raises DatasetError that names a row which cannot be used."""
        token_columns = TokenColumns()
        # The user's code may use the tokenizer, which is not for two threads at a time.
        for batch, content, tokens in self._encoded_in_turn() if self.rows.runs_code else self._encoded_ahead():
            for (number, row), one in zip(batch, tokens, strict=True):
                yield self._source(number, row, content, one, token_columns)

    def _contents(self) -> Iterator[tuple[_Batch, _Content]]:
        """Yield batches of rows, and what they hold."""
        content: _Content | None = None
        for batch in _batches(enumerate(self.rows.rows)):
            if content is None:
                content = self._find_content([row for _, row in batch])
                self._check(content)
            yield batch, content

    def _encoded_in_turn(self) -> Iterator[tuple[_Batch, _Content, list[_Encoded]]]:
        for batch, content in self._contents():
            yield batch, content, self._encoded(content, batch)

    def _encoded_ahead(self) -> Iterator[tuple[_Batch, _Content, list[_Encoded]]]:
        """Yield batches and their tokens, which come from a thread of its own, one batch ahead.

        A tokenizer written in Rust works on all cores meanwhile, and Python on the batch before.
        """
        with ThreadPoolExecutor(1, "tokens") as pool:
            submitted = (
                (batch, content, pool.submit(self._encoded, content, batch)) for batch, content in self._contents()
            )
            for batch, content, tokens in _one_ahead(submitted):
                yield batch, content, tokens.result()

    def _find_content(self, rows: Sequence[Row]) -> _Content:
        asked, columns, found = self.settings.content_column, self.rows.columns, ", ".join(self.rows.columns)
        if asked is None and self.settings.generate is not None and _PROMPT in columns:
            asked = _PROMPT
        flag = named("prompt_column" if self.settings.prompt_column else "text_column")
        if asked is not None and asked not in columns:
            raise DatasetError(f"there is no column {asked!r}: the dataset has {found}; name one with {flag}")
        if asked is not None:
            return _Content(_kind_of(_first_value(rows, asked)), asked)
        for column, kind in _USUAL.items():
            if column in columns and (kind != "chat" or _kind_of(_first_value(rows, column)) == "chat"):
                return _Content(kind, column)
        texts = self.rows.text_columns
        if len(texts) == 1:
            return _Content("text", texts[0])
        raise DatasetError(
            f"there is no column 'text', and {len(texts)} columns hold text: the dataset has {found}; "
            f"name one with {named('text_column')}"
        )

    def _check(self, content: _Content) -> None:
        """Refuse content that this tokenizer or these settings cannot be used with."""
        template = getattr(self.tokenizer, "chat_template", None) or self.settings.chat_template
        holds, settings = f"column {content.column!r} holds {content.kind}", self.settings
        if content.kind != "ids" and self.tokenizer is None:
            raise DatasetError(
                f"{holds}, and the model comes without a tokenizer: {to_give('tokenizer', 'AutoTokenizer')}, or give "
                "token ids in a column input_ids"
            )
        if content.kind != "ids" and self.tokenizer is not None and not knows_text(self.tokenizer):
            raise DatasetError(
                f"{holds}, and the tokenizer knows no text, only {len(self.tokenizer.get_vocab())} added tokens "
                "(transformers makes such a tokenizer of a folder without tokenizer files): "
                f"{to_give('tokenizer', 'AutoTokenizer')}, or give token ids in a column input_ids"
            )
        if content.kind == "chat" and not template:
            raise DatasetError(
                f"column {content.column!r} holds chats, and the tokenizer has no chat template: set one "
                f"({named('chat_template')}), or give texts"
            )
        if settings.rule.is_assistant and content.kind != "chat":
            raise DatasetError(
                f"{named('positions', 'assistant')}: {holds}, not chats; name a column of chats with "
                f"{named('text_column')}, or for token ids give the mask as a column and use column:NAME"
            )
        if settings.chat_settings and content.kind != "chat":
            raise DatasetError(f"{settings.chat_settings[0]} is for chats, and {holds}: leave it out")
        if settings.add_special_tokens and content.kind != "text":
            raise DatasetError(
                f"{named('add_special_tokens', self.settings.add_special_tokens)} is for texts, and {holds}: leave it "
                "out"
            )
        if content.kind == "chat":
            self._chats  # noqa: B018  # refuses settings that the template cannot be used with

    @cached_property
    def _chats(self) -> Chats:
        column = self.settings.tools_column or (TOOLS if TOOLS in self.rows.columns else "")
        return Chats(tokenizer=cast("Tokenizer", self.tokenizer), settings=self.settings, tools_column=column)

    def _encoded(self, content: _Content, rows: Sequence[tuple[int, Row]]) -> list[_Encoded]:
        values = [(number, _value(row, content.column, number)) for number, row in rows]
        if content.kind == "text":
            found = self._texts(values, content.column)
        elif content.kind == "chat":
            found = [
                self._chat(value, row, number, content.column)
                for (_, row), (number, value) in zip(rows, values, strict=True)
            ]
        else:
            found = [_Encoded(self._ids(value, number)) for number, value in values]
        return [
            encoded._replace(counts={**encoded.counts, "n_doubled_start": int(self._is_doubled(encoded.ids))})
            for encoded in found
        ]

    def _source(
        self, number: int, row: Row, content: _Content, encoded: _Encoded, token_columns: TokenColumns
    ) -> Source:
        ids, marked, counts = encoded
        rule = self.settings.rule
        used = {content.column, rule.column, self.settings.image_column}  # images are the tower's
        if content.kind == "chat":
            used.add(self._chats.tools_column)
        if rule.column:
            marked = marks_of(_value(row, rule.column, number), ids.size, column=rule.column, row=number)
        own = slice(0, ids.size)
        if content.kind == "ids" and row.get("attention_mask") is not None:
            used.add("attention_mask")
            own = _unpadded(row["attention_mask"], ids.size, number)
        columns = {name: value for name, value in row.items() if name not in used}
        token_columns.see(number, columns, ids.size)
        return Source(
            row=number,
            input_ids=ids[own],
            marked=None if marked is None else marked[own],
            columns=token_columns.cut(number, columns, ids.size, own),
            token_columns=token_columns,
            counts={**counts, "n_padding": ids.size - (own.stop - own.start)},
        )

    def _texts(self, values: Sequence[tuple[int, object]], column: str) -> list[_Encoded]:
        for number, text in values:
            if not isinstance(text, str | None):
                raise DatasetError(f"row {number}: column {column!r} should hold a text, found {text!r:.80}")
        # An empty text stays empty, although the tokenizer may make a lone BOS of it.
        full = [(number, text) for number, text in values if isinstance(text, str) and text]
        chosen = self.settings.add_special_tokens
        encoded = self._tokenized(full, with_special=chosen is not False)
        begun = [(number, text) for number, text in full if chosen is None and self._is_doubled(encoded[number])]
        plain = self._tokenized(begun, with_special=False)
        encoded |= plain
        empty = np.zeros(0, np.int32)
        return [
            _Encoded(encoded.get(number, empty), counts={"n_own_start": int(number in plain)}) for number, _ in values
        ]

    def _tokenized(self, texts: Sequence[tuple[int, str]], *, with_special: bool) -> dict[int, IntArray]:
        """Return the token ids of texts by the numbers of their rows."""
        tokenizer = cast("Tokenizer", self.tokenizer)
        found = token_ids(tokenizer, [text for _, text in texts], with_special=with_special)
        return {number: self._ids(ids, number) for (number, _), ids in zip(texts, found, strict=True)}

    def _is_doubled(self, ids: IntArray) -> bool:
        """Return whether a row begins with the tokenizer's start tokens, and then with them once more."""
        start = self.start_ids
        return bool(start.size) and np.array_equal(ids[: 2 * start.size], np.tile(start, 2))

    def _chat(self, chat: object, row: Row, number: int, column: str) -> _Encoded:
        if not chat:
            return _Encoded(np.zeros(0, np.int32), np.zeros(0, np.bool_) if self.settings.rule.is_assistant else None)
        if _kind_of(chat) != "chat":
            raise DatasetError(f"row {number}: column {column!r} should hold a chat, found {chat!r:.80}")
        tools = row.get(self._chats.tools_column) if self._chats.tools_column else None
        ids, marked, counts = self._chats.encoded(cast("Sequence[object]", chat), tools, number)
        return _Encoded(self._ids(ids, number), marked, counts)

    def _ids(self, value: object, number: int) -> IntArray:
        try:
            ids = np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DatasetError(f"row {number}: {value!r:.80} is not a list of token ids: {error}") from error
        if ids.ndim != 1 or not (ids.size == 0 or ids.dtype.kind in "iu"):
            raise DatasetError(f"row {number}: a flat list of whole numbers is needed, found {value!r:.80}")
        n_known = _MAX_ID if self.vocab_size is None else self.vocab_size
        if ids.size and (ids.min() < 0 or ids.max() >= n_known):
            wrong = np.flatnonzero((ids < 0) | (ids >= n_known))
            raise DatasetError(
                f"row {number}: token id {ids[wrong[0]]} at position {wrong[0]} is not one of the model's, 0 to "
                f"{n_known - 1}; do dataset, tokenizer and model belong together?"
            )
        return ids.astype(np.int32, copy=False)


def _kind_of(value: object) -> _Kind:
    """Return what a value looks like; a missing value counts as an empty text."""
    if value is None or isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        return "chat"
    return "ids"


def _first_value(rows: Sequence[Row], column: str) -> object:
    """Return the first value of a column that is not missing or empty; a missing one if there is none."""
    values = (row.get(column) for row in rows)
    return next((value for value in values if value is not None and len(cast("Sequence[object]", value))), None)


def _one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the items; each is yielded when the next is there, or when there is none because of an error."""
    last: list[_Item] = []
    while True:
        try:
            following = [next(items)]
        except StopIteration:
            yield from last
            return
        except Exception:  # whatever reading raises: after what was read before
            yield from last
            raise
        yield from last
        last = following


def _batches(rows: Iterable[tuple[int, Row]]) -> Iterator[_Batch]:
    batch: _Batch = []
    n_letters = 0
    for number, row in rows:
        batch.append((number, row))
        n_letters += sum(len(value) for value in row.values() if hasattr(value, "__len__"))
        if len(batch) >= _TEXTS_AT_ONCE or n_letters >= _LETTERS_AT_ONCE:
            yield batch
            batch, n_letters = [], 0
    if batch:
        yield batch


def _value(row: Row, column: str, number: int) -> object:
    if column not in row:
        raise DatasetError(f"row {number}: there is no column {column!r}; the row has {', '.join(row)}")
    return row[column]


def _unpadded(mask: object, n_tokens: int, number: int) -> slice:
    """Return the range of tokens that an attention mask does not mark as padding."""
    flags = np.asarray(mask)
    if flags.shape != (n_tokens,) or not (n_tokens == 0 or flags.dtype.kind in "biu"):
        raise DatasetError(
            f"row {number}: its attention_mask has shape {flags.shape}, the example has {n_tokens} tokens"
        )
    real = np.flatnonzero(flags)
    start, stop = (int(real[0]), int(real[-1]) + 1) if real.size else (0, 0)
    if real.size != stop - start:
        raise DatasetError(f"row {number}: its attention_mask has gaps; only padding at the ends can be removed")
    return slice(start, stop)
