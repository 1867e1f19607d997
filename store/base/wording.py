"""Long things in few words, for messages and for what objects print of themselves."""

from collections.abc import Sequence

_MOST_LETTERS = 80


def few(items: Sequence[object], most: int = 5, between: str = ", ") -> str:
    """Return the first of `items` as text, and how many more there are.

    Example:
        >>> few([1, 2, 3, 4], most=2)
        '1, 2 and 2 more'
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(map(str, items[:most])) + more


def shortened(text: str) -> str:
    """Return `text`, or its beginning if it is long."""
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 3] + "..."
