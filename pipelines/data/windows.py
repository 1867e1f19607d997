"""Cuts a long source into examples that the model takes.

Windows follow one another without overlap and none has more than `max_length` tokens. If a source begins with the
tokens that its tokenizer puts at the start (a BOS, say), every later window begins with them as well, as tokens of
its own: they are added, and count towards `max_length`.
"""

from dataclasses import dataclass

from residua.store.base.errors import DatasetError


@dataclass(frozen=True)
class Window:
    """The tokens ``start`` up to ``stop`` of a source, after `n_added` start tokens that are not from there."""

    start: int
    stop: int
    n_added: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of the window, added ones included."""
        return self.n_added + self.stop - self.start


def cut_windows(n_tokens: int, max_length: int, n_start: int) -> list[Window]:
    """Return the windows of a source of `n_tokens` tokens, in order.

    >>> cut_windows(7, 4, 1)
    [Window(start=0, stop=4, n_added=0), Window(start=4, stop=7, n_added=1)]

    Args:
        n_tokens: Tokens of the source, its own start tokens included.
        max_length: Most tokens of a window.
        n_start: Start tokens to put before every window but the first.

    Raises:
        DatasetError: There would be no room beside the start tokens.
    """
    if n_tokens <= max_length:
        return [Window(0, n_tokens)]
    step = max_length - n_start
    if step < 1:
        raise DatasetError(
            f"--max-length {max_length} leaves no room beside the {n_start} start tokens of each window; "
            f"give at least {n_start + 1}"
        )
    later = range(max_length, n_tokens, step)
    return [Window(0, max_length), *(Window(at, min(at + step, n_tokens), n_start) for at in later)]
