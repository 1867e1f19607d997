"""Turn rows of a dataset into token ids: tokenize texts and chats, check lists of token ids.

Every row gives one source, in order; a row without tokens gives an empty one. Unused columns are kept. The content
is in the column that the user names, else in ``input_ids``, ``text`` or ``messages``, else in the only text column.
The first row shows what the column holds.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, cast

import numpy as np

from residua.pipelines.data.sources import Row, Rows
from residua.store.base.errors import DatasetError
from residua.store.selection.evaluate import Mask
from residua.store.selection.positions import IntArray, PositionRule, marks_of

_TEXTS_AT_ONCE = 256
_LETTERS_AT_ONCE = 2**22  # or token ids: bounds memory where rows are long
_MAX_ID = 2**31 - 1
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")

_Kind: TypeAlias = Literal["text", "chat", "ids"]
_Encoded: TypeAlias = tuple[IntArray, Mask | None]
_USUAL: Mapping[str, _Kind] = {"input_ids": "ids", "text": "text", "messages": "chat"}


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Tokenize texts."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render chats as text and tokenize them."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """One row of the dataset as tokens.

    Attributes:
        row: Its number in the dataset, from 0.
        input_ids: Token ids, int32, (tokens).
        marked: Which tokens the position rule's column or the assistant's turns mark, (tokens); None for other rules.
        columns: The row's other columns.
        n_padding: Padding tokens that were removed, as the row's attention_mask marks them.
    """

    row: int
    input_ids: IntArray
    marked: Mask | None
    columns: Row
    n_padding: int = 0


@dataclass(frozen=True)
class _Content:
    """Which column holds a row's content, and as what."""

    kind: _Kind
    column: str


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Turns rows into sources, in order; tokenizes some hundred texts at a time.

    Attributes:
        rows: The dataset.
        rule: The position rule, which may need marks from a column or from the chat template.
        text_column: The column with the content; None finds it.
        tokenizer: Needed for texts and chats.
        vocab_size: Token ids must lie below it; None skips this check.

    Raises:
        DatasetError: The position rule names a column that the dataset does not have.
    """

    rows: Rows
    rule: PositionRule
    text_column: str | None
    tokenizer: Tokenizer | None
    vocab_size: int | None

    def __post_init__(self) -> None:
        if self.rule.column and self.rule.column not in self.rows.columns:
            found = ", ".join(self.rows.columns)
            raise DatasetError(f"positions column:{self.rule.column}: the dataset has no such column, it has {found}")

    def __iter__(self) -> Iterator[Source]:
        """Yield the sources; raises DatasetError that names a row which cannot be used."""
        content: _Content | None = None
        for batch in _batches(enumerate(self.rows.rows)):
            if content is None:
                content = self._find_content(batch[0][1])
                self._check(content)
            values = [(number, _value(row, content.column, number)) for number, row in batch]
            for (number, row), (ids, marked) in zip(batch, self._encoded(content, values), strict=True):
                yield self._source(number, row, content, ids, marked)

    def _find_content(self, first: Row) -> _Content:
        asked, columns, found = self.text_column, self.rows.columns, ", ".join(self.rows.columns)
        if asked is not None and asked not in columns:
            raise DatasetError(f"there is no column {asked!r}: the dataset has {found}; name one with --text-column")
        if asked is not None:
            return _Content(_kind_of(first.get(asked)), asked)
        for column, kind in _USUAL.items():
            if column in columns and (kind != "chat" or _kind_of(first.get(column)) == "chat"):
                return _Content(kind, column)
        texts = self.rows.text_columns
        if len(texts) == 1:
            return _Content("text", texts[0])
        raise DatasetError(
            f"there is no column 'text', and {len(texts)} columns hold text: the dataset has {found}; "
            "name one with --text-column"
        )

    def _check(self, content: _Content) -> None:
        """Refuse content that this tokenizer or this position rule cannot be used with."""
        template = getattr(self.tokenizer, "chat_template", None)
        if content.kind != "ids" and self.tokenizer is None:
            raise DatasetError(
                f"column {content.column!r} holds {content.kind}, and the model comes without a tokenizer: "
                "pass one, or give token ids in a column input_ids"
            )
        if content.kind == "chat" and not template:
            raise DatasetError(
                f"column {content.column!r} holds chats, and the tokenizer has no chat template: set one, or give texts"
            )
        if self.rule.is_assistant and content.kind != "chat":
            raise DatasetError(
                f"--positions assistant: column {content.column!r} holds {content.kind}, not chats; name a column "
                "of chats with --text-column, or for token ids give the mask as a column and use column:NAME"
            )
        # Without this mark the library returns a mask of zeros and only logs a line.
        if self.rule.is_assistant and not _GENERATION.search(str(template)):
            raise DatasetError(
                "--positions assistant: the tokenizer's chat template does not mark the assistant's turns with "
                "{% generation %}; use a template that does, or another position rule"
            )

    def _encoded(self, content: _Content, values: Sequence[tuple[int, object]]) -> list[_Encoded]:
        if content.kind == "text":
            return self._texts(values, content.column)
        if content.kind == "chat":
            return [self._chat(value, number, content.column) for number, value in values]
        return [(self._ids(value, number), None) for number, value in values]

    def _source(self, number: int, row: Row, content: _Content, ids: IntArray, marked: Mask | None) -> Source:
        used = {content.column, self.rule.column}
        if self.rule.column:
            value = _value(row, self.rule.column, number)
            marked = marks_of(value, ids.size, column=self.rule.column, row=number)
        own = slice(0, ids.size)
        if content.kind == "ids" and row.get("attention_mask") is not None:
            used.add("attention_mask")
            own = _unpadded(row["attention_mask"], ids.size, number)
        return Source(
            row=number,
            input_ids=ids[own],
            marked=None if marked is None else marked[own],
            columns={name: value for name, value in row.items() if name not in used},
            n_padding=ids.size - (own.stop - own.start),
        )

    def _texts(self, values: Sequence[tuple[int, object]], column: str) -> list[_Encoded]:
        tokenizer = cast("Tokenizer", self.tokenizer)
        for number, text in values:
            if not isinstance(text, str | None):
                raise DatasetError(f"row {number}: column {column!r} should hold a text, found {text!r:.80}")
        # An empty text stays empty, although the tokenizer may make a lone BOS of it.
        full = [text for _, text in values if text]
        ids = iter(tokenizer(full, verbose=False)["input_ids"] if full else ())
        return [(self._ids(next(ids) if text else [], number), None) for number, text in values]

    def _chat(self, chat: object, number: int, column: str) -> _Encoded:
        if not chat:
            return np.zeros(0, np.int32), np.zeros(0, np.bool_)
        if _kind_of(chat) != "chat":
            raise DatasetError(f"row {number}: column {column!r} should hold a chat, found {chat!r:.80}")
        messages = [_message(message, number) for message in cast("Sequence[object]", chat)]
        try:
            encoded = cast("Tokenizer", self.tokenizer).apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=self.rule.is_assistant
            )
        except Exception as error:
            # The boundary to the chat template, a program that comes with the tokenizer and may raise anything.
            raise DatasetError(f"row {number}: the chat template refuses this chat: {error}") from error
        marked = np.asarray(encoded["assistant_masks"], np.bool_) if self.rule.is_assistant else None
        return self._ids(encoded["input_ids"], number), marked

    def _ids(self, value: object, number: int) -> IntArray:
        try:
            ids = np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DatasetError(f"row {number}: {value!r:.80} is not a list of token ids: {error}") from error
        if ids.ndim != 1 or not (ids.size == 0 or ids.dtype.kind in "iu"):
            raise DatasetError(f"row {number}: a flat list of whole numbers is needed, found {value!r:.80}")
        n_known = _MAX_ID if self.vocab_size is None else self.vocab_size
        wrong = np.flatnonzero((ids < 0) | (ids >= n_known))
        if wrong.size:
            raise DatasetError(
                f"row {number}: token id {ids[wrong[0]]} at position {wrong[0]} is not one of the model's, 0 to "
                f"{n_known - 1}; do dataset, tokenizer and model belong together?"
            )
        return ids.astype(np.int32)


def _kind_of(value: object) -> _Kind:
    """Return what a value looks like; a missing value counts as an empty text."""
    if value is None or isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        return "chat"
    return "ids"


def start_tokens(tokenizer: Tokenizer | None) -> IntArray:
    """Return the tokens that `tokenizer` puts before every text, such as a BOS: int32, often none or one."""
    if tokenizer is None:
        return np.zeros(0, np.int32)
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    n_start = next((i for i in range(len(full)) if plain and full[i : i + len(plain)] == plain), 0)
    return np.array(full[:n_start], np.int32)


def _batches(rows: Iterable[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    batch: list[tuple[int, Row]] = []
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


def _message(message: object, number: int) -> dict[str, object]:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise DatasetError(f"row {number}: a message needs role and content, found {message!r:.80}")
    # Arrow gives each message the fields of all others, with None; a template would take them as given.
    return {key: value for key, value in message.items() if value is not None or key == "content"}


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
