"""Texts and tokens, by the tokenizer that lies in the archive."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from residua.store.base.errors import DamagedArchiveError, PlanError, few

_MOST_SHOWN = 8


def read_tokenizer(content: bytes, path: Path) -> Tokenizer:
    """Return the tokenizer (of the `tokenizers` package) that `content` describes.

    Args:
        content: What a ``tokenizer.json`` holds.
        path: Where it lies, for messages.

    Raises:
        DamagedArchiveError: It is no tokenizer.
    """
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the Rust library raises plain Exception for any bad file
        raise DamagedArchiveError(f"{path} is not a tokenizer that can be read ({error}): restore it") from error


def text_around(tokenizer: Tokenizer, tokens: Sequence[int], at: int, context: int) -> str:
    """Return the text of `tokens` around number `at`, `context` tokens on either side, with its own between « and »."""
    pieces = (tokens[max(0, at - context) : at], tokens[at : at + 1], tokens[at + 1 : at + 1 + context])
    before, here, after = (tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces)
    return f"{before}«{here}»{after}"


def token_id(tokenizer: Tokenizer | None, text: str) -> int:
    """Return the id of the token that `text` is.

    Raises:
        PlanError: There is no tokenizer, or the text is no token or several; the message says which.
    """
    if tokenizer is None:
        raise PlanError(f"there is no tokenizer in the archive to look {text[:60]!r} up with: give the token's id")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return single_token(text, ids, lambda token: tokenizer.decode([token], skip_special_tokens=False))


def single_token(text: str, ids: Sequence[int], spelled: Callable[[int], str]) -> int:
    """Return the only token of a text.

    Args:
        text: The text.
        ids: Its tokens.
        spelled: Gives the text of a token.

    Raises:
        PlanError: It is no token, or several; the message says which.
    """
    if len(ids) == 1:
        return ids[0]
    listed = few([f"{spelled(token)!r} ({token})" for token in ids], _MOST_SHOWN)
    found = f"{len(ids)} tokens, {listed}" if ids else "no token"
    raise PlanError(f"the text {text[:60]!r} is {found}: give a text that is one token, or an id")
