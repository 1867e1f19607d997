"""Which column of a dataset holds what the model is to read, and as what: text, chat or token ids.

The column that was asked for; else ``input_ids``, ``text``, ``messages``, or the only text column there is. What it
holds follows from the first row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from residua.pipelines.data.sources import Row, Rows
from residua.store.base.errors import DatasetError

Kind: TypeAlias = Literal["text", "chat", "ids"]

_USUAL: Mapping[str, Kind] = {"input_ids": "ids", "text": "text", "messages": "chat"}


@dataclass(frozen=True, kw_only=True)
class Content:
    """Which column holds a row's content, and as what."""

    kind: Kind
    column: str


def find_content(rows: Rows, first: Row, text_column: str | None) -> Content:
    """Find the column that holds the content; `first` is the first row.

    Raises:
        DatasetError: The column that was asked for is not there, or none suggests itself.
    """
    found = ", ".join(rows.columns)
    if text_column is not None and text_column not in rows.columns:
        raise DatasetError(f"there is no column {text_column!r}: the dataset has {found}; name one with --text-column")
    if text_column is not None:
        return Content(kind=kind_of(first.get(text_column)), column=text_column)
    for column, kind in _USUAL.items():
        if column in rows.columns and (kind != "chat" or kind_of(first.get(column)) == "chat"):
            return Content(kind=kind, column=column)
    if len(rows.text_columns) == 1:
        return Content(kind="text", column=rows.text_columns[0])
    raise DatasetError(
        f"there is no column 'text', and {len(rows.text_columns)} columns hold text: the dataset has {found}; "
        "name one with --text-column"
    )


def kind_of(value: object) -> Kind:
    """Return what a value looks like; a missing one passes for an empty text."""
    if value is None or isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        return "chat"
    return "ids"
