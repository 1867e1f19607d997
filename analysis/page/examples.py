"""The examples that a page shows: which they are, their tokens as texts, and the columns of the dataset."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from residua.analysis.page.measures import ShownRows
from residua.analysis.page.scripts import packed
from residua.analysis.rows.blocks import stretches
from residua.store.base.errors import AnalysisError
from residua.store.examples.index import NO_TOKEN
from residua.store.read.archive import Archive
from residua.store.read.text import token_texts

Integers = npt.NDArray[np.int64]

_MOST_COLUMN_TEXT = 240  # characters of a value of a column
_LONG_COLUMNS = ("list", "struct", "map", "binary")  # types that are not shown


class Shown(NamedTuple):
    """Some examples of an archive, cut to a number of tokens.

    Attributes:
        numbers: Numbers of the examples, ascending.
        tokens: Token ids of each, cut, int32.
        n_tokens: Tokens of each, not cut.
        rows: Rows of each whose positions are among its tokens.
        positions: Positions of these rows, int32, for each example.
    """

    numbers: list[int]
    tokens: list[npt.NDArray[np.int32]]
    n_tokens: list[int]
    rows: list[ShownRows]
    positions: list[npt.NDArray[np.int32]]


def choose(archive: Archive, n_examples: int, besides: Iterable[int]) -> list[int]:
    """Return the numbers of captured examples that are spread evenly over the archive, and those of `besides`.

    Raises:
        AnalysisError: No example is fully captured.
    """
    captured = _captured(archive)
    if not len(captured):
        raise AnalysisError(f"{archive.place} has no example that is fully captured: resume its capture first")
    n_spread = min(n_examples, len(captured))
    spread = captured[np.arange(n_spread) * len(captured) // max(1, n_spread)]
    return sorted({*spread.tolist(), *(set(besides) & set(captured.tolist()))})


def _captured(archive: Archive) -> Integers:
    """Return the examples whose rows are all captured, and that have any."""
    index = archive.example_table.index()
    first, stop = index.first_row[:-1], index.first_row[1:]
    starts, ends = np.array(stretches(archive), np.int64).reshape(-1, 2).T
    at = np.searchsorted(starts, first, side="right") - 1
    inside = (at >= 0) & (stop <= np.append(ends, 0)[at]) & (stop > first)
    return np.flatnonzero(inside)


def read_shown(archive: Archive, numbers: Sequence[int], most_tokens: int) -> Shown:
    """Read tokens and positions of examples.

    Args:
        archive: The archive.
        numbers: Numbers of the examples, ascending.
        most_tokens: Tokens of an example that are shown, from its first one on.
    """
    table = archive.example_table
    found = Shown(list(numbers), [], [], [], [])
    for number in numbers:
        tokens, positions = table.tokens(number), table.positions(number)
        start, _ = table.rows(number)
        kept = positions[positions < most_tokens]
        found.tokens.append(tokens[:most_tokens])
        found.n_tokens.append(len(tokens))
        found.rows.append(ShownRows(start, start + len(kept)))
        found.positions.append(kept)
    return found


def texts_of(tokenizer: Tokenizer | None, tokens: Iterable[int]) -> dict[int, str | None]:
    """Return the text of each token id; None for a part of a character, and everywhere without a tokenizer."""
    ids = sorted({int(token) for token in tokens} - {NO_TOKEN})
    if tokenizer is None:
        return dict.fromkeys(ids)
    return dict(zip(ids, token_texts(tokenizer, ids), strict=True))


def to_json(archive: Archive, shown: Shown, texts: Mapping[int, str | None]) -> dict[str, Any]:
    """Return what the page needs to draw the examples; arrays are packed, one example after the other."""
    return {
        "numbers": shown.numbers,
        "n_tokens": shown.n_tokens,
        "n_shown": [len(tokens) for tokens in shown.tokens],
        "first_row": [rows.start for rows in shown.rows],
        "n_rows": [rows.stop - rows.start for rows in shown.rows],
        "tokens": packed(np.concatenate(shown.tokens)),
        "positions": packed(np.concatenate(shown.positions)),
        "texts": {str(token): text for token, text in texts.items()},
        "characters": _characters(archive.tokenizer, shown, texts),
        "columns": _columns(archive, shown.numbers),
    }


def _characters(
    tokenizer: Tokenizer | None, shown: Shown, texts: Mapping[int, str | None]
) -> dict[str, dict[str, str]]:
    """Return, for each example, the text of each run of tokens that are parts of characters, by its first position.

    The other tokens of the run have an empty text.
    """
    if tokenizer is None:
        return {}
    found: dict[str, dict[str, str]] = {}
    for at, tokens in enumerate(shown.tokens):
        parts = [position for position, token in enumerate(tokens.tolist()) if texts.get(token, "") is None]
        own: dict[str, str] = {}
        for run in _runs(parts):
            own |= dict.fromkeys(map(str, run), "")
            own[str(run[0])] = tokenizer.decode(tokens[run[0] : run[-1] + 1].tolist(), skip_special_tokens=False)
        if own:
            found[str(at)] = own
    return found


def _runs(positions: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs


def _columns(archive: Archive, numbers: Sequence[int]) -> dict[str, list[str]]:
    """Return the user's columns of the examples, as short texts."""
    types = archive.example_table.column_types()
    names = [name for name, kind in types.items() if not str(kind).startswith(_LONG_COLUMNS)]
    if not names:
        return {}
    table = archive.example_table.table(names).take(list(numbers))
    return {name: [_short(value) for value in table[name].to_pylist()] for name in names}


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _MOST_COLUMN_TEXT else f"{text[: _MOST_COLUMN_TEXT - 1]}…"
