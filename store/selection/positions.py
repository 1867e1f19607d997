"""Position rules: which positions of an example become rows, decided while a capture is planned.

A rule looks at one example, which is one window of a long source. ``all`` and ``every:N`` are conditions as
everywhere else. The others are not: ``last`` is the last position that is left once special tokens are taken out;
``column:NAME`` and ``assistant`` are marks that the dataset or the chat template gives, token by token; ``prompt`` and
``generated`` lie before and after the place where the model began to generate. No condition on the token alone could
say these.
"""

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from residua.store.base.errors import DatasetError
from residua.store.base.naming import named
from residua.store.selection.evaluate import Mask, at_positions

IntArray = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """A parsed rule.

    Attributes:
        kind: ``all``; ``last``; ``every`` N-th, from position 0; ``marked``: those that a column of the dataset or
            the assistant's turns of a chat mark; ``generated``: those that the model generated; or ``prompt``: those
            before them.
        stride: N of ``every``, in positions.
        column: Name of the column that marks positions; empty for the assistant's turns.
    """

    kind: Literal["all", "last", "every", "marked", "generated", "prompt"]
    stride: int = 1
    column: str = ""

    @property
    def is_assistant(self) -> bool:
        """Whether the marks come from the chat template."""
        return self.kind == "marked" and not self.column

    @property
    def of_generation(self) -> bool:
        """Whether the rule needs to know which tokens the model generated."""
        return self.kind in ("generated", "prompt")

    def most_rows(self, n_tokens: int) -> int:
        """Return how many rows an example of at most `n_tokens` tokens may have."""
        return 1 if self.kind == "last" else -(-n_tokens // self.stride)


def parse_positions(text: str) -> PositionRule:
    """Parse ``all``, ``last``, ``every:N``, ``column:NAME``, ``assistant``, ``generated`` or ``prompt``.

    >>> parse_positions("every:4").stride
    4

    Raises:
        DatasetError: The text is none of these.
    """
    if text in ("all", "last", "generated", "prompt"):
        return PositionRule(kind=cast("Literal['all', 'last', 'generated', 'prompt']", text))
    if text == "assistant":
        return PositionRule(kind="marked")
    name, _, value = text.partition(":")
    if name == "column" and value:
        return PositionRule(kind="marked", column=value)
    if name == "every" and value.isascii() and value.isdigit() and int(value) > 0:
        return PositionRule(kind="every", stride=int(value))
    raise DatasetError(
        f"{named('positions', text)}: give one of all, last, every:N (N from 1), column:NAME, assistant, generated, "
        "prompt"
    )


def kept_positions(
    rule: PositionRule,
    n_tokens: int,
    *,
    marked: Mask | None = None,
    dropped: Mask | None = None,
    n_prompt: int | None = None,
) -> IntArray:
    """Return the positions that `rule` keeps, int32, increasing.

    Args:
        rule: The rule.
        n_tokens: Tokens of the example.
        marked: For the rule ``marked``: which positions are, (tokens).
        dropped: Positions that are never kept, such as those of special tokens, (tokens).
        n_prompt: For the rules ``generated`` and ``prompt``: tokens before the first one that the model generated.
    """
    kept = at_positions(slice(None, None, rule.stride), n_tokens)
    if rule.of_generation:
        kept &= at_positions(slice(n_prompt, None) if rule.kind == "generated" else slice(n_prompt), n_tokens)
    if marked is not None:
        kept &= marked
    if dropped is not None:
        kept &= ~dropped
    positions = np.flatnonzero(kept).astype(np.int32)
    return positions[-1:] if rule.kind == "last" else positions


def marks_of(value: object, n_tokens: int, *, column: str, row: int) -> Mask:
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
    if np.unique(marks).size != marks.size:
        raise DatasetError(f"{where}: a position is named twice; name each once")
    return at_positions(marks, n_tokens)
