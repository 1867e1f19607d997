"""The text around a token, by the tokenizer that lies in the archive."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from residua.store.errors import DamagedArchiveError


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
