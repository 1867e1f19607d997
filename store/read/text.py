"""Texts and tokens, with the tokenizer in the archive."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from residua.store.base.errors import DamagedArchiveError, PlanError, few

_MAX_SHOWN = 8


def read_tokenizer(content: bytes, path: Path) -> Tokenizer:
    """Return the tokenizer (of the `tokenizers` package) that `content` describes.

    Args:
        content: Content of a ``tokenizer.json``.
        path: Path of the file, for messages.

    Raises:
        DamagedArchiveError: The content is no tokenizer.
    """
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the Rust library raises plain Exception for any bad file
        raise DamagedArchiveError(f"{path} cannot be read as a tokenizer ({error}): restore it from a copy") from error


def text_around(tokenizer: Tokenizer, tokens: Sequence[int], at: int, context: int) -> str:
    """Return the text of token `at`, between « and », with `context` tokens on either side."""
    pieces = (tokens[max(0, at - context) : at], tokens[at : at + 1], tokens[at + 1 : at + 1 + context])
    before, here, after = (tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces)
    return f"{before}«{here}»{after}"


def token_id(tokenizer: Tokenizer | None, text: str) -> int:
    """Return the id of a token by its text.

    Raises:
        PlanError: There is no tokenizer, or the text is no token or several. The message lists them.
    """
    if tokenizer is None:
        raise PlanError(f"the archive has no tokenizer to look up {text[:60]!r}: give the token's id")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return single_token(text, ids, lambda token: tokenizer.decode([token], skip_special_tokens=False))


def single_token(text: str, ids: Sequence[int], text_of: Callable[[int], str]) -> int:
    """Return the only token of a text.

    Args:
        text: The text.
        ids: Its tokens.
        text_of: Gives the text of a token.

    Raises:
        PlanError: The text is no token, or several. The message lists them.
    """
    if len(ids) == 1:
        return ids[0]
    listed = few([f"{text_of(token)!r} ({token})" for token in ids], _MAX_SHOWN)
    found = f"{len(ids)} tokens, {listed}" if ids else "no token"
    raise PlanError(f"the text {text[:60]!r} is {found}: give a text that is one token, or an id")
