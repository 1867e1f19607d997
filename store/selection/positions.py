"""Which positions of an example become rows: a rule written as text, and what it keeps.

A rule looks at one example, that is at one window of a long source: ``last`` is the last position of every window.
Positions of special tokens are taken out before ``last`` looks for its position, and after the other rules.
"""

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from residua.store.base.errors import DatasetError

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """A parsed rule.

    Attributes:
        kind: ``all``; ``last``; ``every`` N-th, beginning with position 0; or those that are ``marked``, by a
            column of the dataset or by the assistant's turns of a chat.
        stride: N of ``every``, in positions.
        column: Name of the column that marks positions; empty for the assistant's turns.
    """

    kind: Literal["all", "last", "every", "marked"]
    stride: int = 1
    column: str = ""

    @property
    def is_assistant(self) -> bool:
        """Whether the marks come from the chat template."""
        return self.kind == "marked" and not self.column


def parse_positions(text: str) -> PositionRule:
    """Parse ``all``, ``last``, ``every:N``, ``column:NAME`` or ``assistant``.

    >>> parse_positions("every:4").stride
    4

    Raises:
        DatasetError: The text is none of these.
    """
    if text in ("all", "last"):
        return PositionRule(kind=cast("Literal['all', 'last']", text))
    if text == "assistant":
        return PositionRule(kind="marked")
    name, _, value = text.partition(":")
    if name == "column" and value:
        return PositionRule(kind="marked", column=value)
    if name == "every" and value.isascii() and value.isdigit() and int(value) > 0:
        return PositionRule(kind="every", stride=int(value))
    raise DatasetError(f"--positions {text!r}: give one of all, last, every:N (N from 1), column:NAME, assistant")


def kept_positions(
    rule: PositionRule, n_tokens: int, *, marked: BoolArray | None = None, dropped: BoolArray | None = None
) -> IntArray:
    """Return the positions that `rule` keeps, int32, increasing.

    Args:
        rule: The rule.
        n_tokens: Tokens of the example.
        marked: For the rule ``marked``: which positions are, (tokens).
        dropped: Positions that are never kept, such as those of special tokens, (tokens).
    """
    allowed = np.ones(n_tokens, np.bool_) if dropped is None else ~dropped
    if rule.kind == "last":
        return np.flatnonzero(allowed)[-1:].astype(np.int32)
    if rule.kind == "every":
        allowed &= np.arange(n_tokens) % rule.stride == 0
    if marked is not None:
        allowed &= marked
    return np.flatnonzero(allowed).astype(np.int32)


def marks_of(value: object, n_tokens: int, *, column: str, row: int) -> BoolArray:
    """Return which tokens a column's value marks: a list of positions, or a mask of the example's length.

    Raises:
        DatasetError: The value is neither, has another length, or names a position twice or one that is not there.
    """
    where = f"column {column!r}, row {row}"
    try:
        marks = np.asarray(value)
    except ValueError as error:
        raise DatasetError(f"{where}: {error}; give a list of positions or a mask") from error
    if marks.ndim != 1 or not (marks.size == 0 or marks.dtype.kind in "biu"):
        raise DatasetError(f"{where}: found {value!r:.80}; give a list of positions or a list of true and false")
    if marks.dtype.kind == "b":
        if marks.size != n_tokens:
            raise DatasetError(f"{where}: the mask has {marks.size} entries, the example has {n_tokens} tokens")
        return marks.astype(np.bool_)
    outside = marks[(marks < 0) | (marks >= n_tokens)]
    if outside.size:
        raise DatasetError(f"{where}: position {outside[0]} is not in the example, which has {n_tokens} tokens")
    flags = np.zeros(n_tokens, np.bool_)
    flags[marks.astype(np.int64)] = True
    if flags.sum() != marks.size:
        raise DatasetError(f"{where}: a position is named twice; name each once")
    return flags
