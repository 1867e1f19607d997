"""From rows of a dataset to token ids: texts and chats through the tokenizer, token lists after a check.

Every row comes out, in order; one without tokens comes out empty. Columns that were not used are carried along.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import numpy as np

from residua.pipelines.data.content import Content, find_content, kind_of
from residua.pipelines.data.positions import BoolArray, IntArray, PositionRule, marks_of
from residua.pipelines.data.sources import Row, Rows
from residua.store.base.errors import DatasetError

_TEXTS_AT_ONCE = 256
_LETTERS_AT_ONCE = 2**22  # or token ids: what bounds memory where rows are long
_MAX_ID = 2**31 - 1
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")

_Encoded: TypeAlias = list[tuple[IntArray, BoolArray | None]]


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
        marked: Which tokens the position rule's column or the assistant's turns mark; None for other rules.
        columns: The row's other columns.
        n_padding: Tokens that its attention_mask called padding, already taken off.
    """

    row: int
    input_ids: IntArray
    marked: BoolArray | None
    columns: Row
    n_padding: int = 0


class Tokens:
    """Turns rows into sources, in order; texts and chats are tokenized some hundreds at a time.

    Args:
        rows: The dataset.
        rule: The position rule, which may need marks from a column or from the chat template.
        text_column: The column with the content; None finds it.
        tokenizer: Needed for texts and chats.
        vocab_size: Token ids must lie below it; None leaves that unchecked.
    """

    def __init__(
        self,
        rows: Rows,
        rule: PositionRule,
        *,
        text_column: str | None,
        tokenizer: Tokenizer | None,
        vocab_size: int | None,
    ) -> None:
        self._rows = rows
        self._rule = rule
        self._text_column = text_column
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        if rule.column and rule.column not in rows.columns:
            found = ", ".join(rows.columns)
            raise DatasetError(f"positions column:{rule.column}: the dataset has no such column, it has {found}")

    def __iter__(self) -> Iterator[Source]:
        """Yield the sources; raises DatasetError naming the row that cannot be used."""
        content: Content | None = None
        for batch in _batches(enumerate(self._rows.rows)):
            content = content or self._content(batch[0][1])
            yield from self._tokenized(content, batch)

    def _content(self, first: Row) -> Content:
        content = find_content(self._rows, first, self._text_column)
        if content.kind != "ids" and self._tokenizer is None:
            raise DatasetError(
                f"column {content.column!r} holds {content.kind}, and the model comes without a tokenizer: "
                "pass one, or give token ids in a column input_ids"
            )
        if content.kind == "chat" and not getattr(self._tokenizer, "chat_template", None):
            raise DatasetError(
                f"column {content.column!r} holds chats, and the tokenizer has no chat template: set one, or give texts"
            )
        if self._rule.is_assistant:
            self._check_assistant(content)
        return content

    def _check_assistant(self, content: Content) -> None:
        if content.kind != "chat":
            raise DatasetError(
                f"--positions assistant: column {content.column!r} holds {content.kind}, not chats; name a column "
                "of chats with --text-column, or for token ids give the mask as a column and say column:NAME"
            )
        # Without this mark the library returns a mask of zeros and a log line.
        if not _GENERATION.search(str(getattr(self._tokenizer, "chat_template", ""))):
            raise DatasetError(
                "--positions assistant: the tokenizer's chat template does not mark the assistant's turns with "
                "{% generation %}; use a template that does, or another position rule"
            )

    def _tokenized(self, content: Content, batch: Sequence[tuple[int, Row]]) -> Iterator[Source]:
        values = [_value(row, content.column, number) for number, row in batch]
        numbers = [number for number, _ in batch]
        encoded = self._encoded(content, values, numbers)
        for (number, row), (input_ids, marked) in zip(batch, encoded, strict=True):
            yield self._source(number, row, content, input_ids, marked)

    def _encoded(self, content: Content, values: Sequence[object], numbers: Sequence[int]) -> _Encoded:
        if content.kind == "text":
            return self._texts(values, numbers, content.column)
        if content.kind == "chat":
            return self._chats(values, numbers, content.column)
        return [(self._ids(value, number), None) for value, number in zip(values, numbers, strict=True)]

    def _source(self, number: int, row: Row, content: Content, input_ids: IntArray, marked: BoolArray | None) -> Source:
        used = {content.column, self._rule.column}
        if self._rule.column:
            value = _value(row, self._rule.column, number)
            marked = marks_of(value, input_ids.size, column=self._rule.column, row=number)
        own = slice(0, input_ids.size)
        if content.kind == "ids" and row.get("attention_mask") is not None:
            used.add("attention_mask")
            own = _unpadded(row["attention_mask"], input_ids.size, number)
        return Source(
            row=number,
            input_ids=input_ids[own],
            marked=None if marked is None else marked[own],
            columns={name: value for name, value in row.items() if name not in used},
            n_padding=input_ids.size - (own.stop - own.start),
        )

    def _texts(self, texts: Sequence[object], numbers: Sequence[int], column: str) -> _Encoded:
        tokenizer = cast("Tokenizer", self._tokenizer)
        for text, number in zip(texts, numbers, strict=True):
            if not isinstance(text, str | None):
                raise DatasetError(f"row {number}: column {column!r} should hold a text, found {text!r:.80}")
        # Not what the tokenizer makes of an empty text, which may be a lone BOS: there is nothing to look at.
        full = [text for text in texts if text]
        ids = iter(tokenizer(full, verbose=False)["input_ids"] if full else ())
        return [
            (self._ids(next(ids) if text else [], number), None) for text, number in zip(texts, numbers, strict=True)
        ]

    def _chats(self, chats: Sequence[object], numbers: Sequence[int], column: str) -> _Encoded:
        return [
            self._chat(chat, number, column) if chat else (self._ids([], number), _no_marks())
            for chat, number in zip(chats, numbers, strict=True)
        ]

    def _chat(self, chat: object, number: int, column: str) -> tuple[IntArray, BoolArray | None]:
        tokenizer = cast("Tokenizer", self._tokenizer)
        if kind_of(chat) != "chat":
            raise DatasetError(f"row {number}: column {column!r} should hold a chat, found {chat!r:.80}")
        messages = [_message(message, number) for message in cast("Sequence[object]", chat)]
        try:
            encoded = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=self._rule.is_assistant
            )
        except Exception as error:
            # The boundary to the chat template, a program of the tokenizer's that may raise anything.
            raise DatasetError(f"row {number}: the chat template refuses this chat: {error}") from error
        input_ids = self._ids(encoded["input_ids"], number)
        if not self._rule.is_assistant:
            return input_ids, None
        return input_ids, np.asarray(encoded["assistant_masks"], np.bool_)

    def _ids(self, value: object, number: int) -> IntArray:
        try:
            ids = np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DatasetError(f"row {number}: {value!r:.80} is no list of token ids: {error}") from error
        if ids.ndim != 1 or not (ids.size == 0 or ids.dtype.kind in "iu"):
            raise DatasetError(f"row {number}: a flat list of whole numbers is needed, found {value!r:.80}")
        n_known = _MAX_ID if self._vocab_size is None else self._vocab_size
        wrong = np.flatnonzero((ids < 0) | (ids >= n_known))
        if wrong.size:
            raise DatasetError(
                f"row {number}: token id {ids[wrong[0]]} at position {wrong[0]} is not one of the model's, 0 to "
                f"{n_known - 1}; do dataset, tokenizer and model belong together?"
            )
        return ids.astype(np.int32)


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


def _no_marks() -> BoolArray:
    return np.zeros(0, np.bool_)


def _message(message: object, number: int) -> dict[str, object]:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise DatasetError(f"row {number}: a message needs role and content, found {message!r:.80}")
    # Arrow fills the fields that other messages have with None; a template would take them for given.
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _unpadded(mask: object, n_tokens: int, number: int) -> slice:
    """Return where the tokens are that an attention mask does not call padding."""
    flags = np.asarray(mask)
    if flags.shape != (n_tokens,) or not (n_tokens == 0 or flags.dtype.kind in "biu"):
        raise DatasetError(
            f"row {number}: its attention_mask has shape {flags.shape}, the example has {n_tokens} tokens"
        )
    real = np.flatnonzero(flags)
    start, stop = (int(real[0]), int(real[-1]) + 1) if real.size else (0, 0)
    if real.size != stop - start:
        raise DatasetError(f"row {number}: its attention_mask has gaps; only padding at the ends can be taken off")
    return slice(start, stop)
