"""Texts and tokens, with the tokenizer in the archive."""

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path

from tokenizers import Tokenizer

from residua.store.base.errors import DamagedArchiveError, PlanError, few

_MAX_SHOWN = 8
_BROKEN = "\ufffd"  # what a decoder gives for a part of a character
_CHARACTER = 3  # tokens that may be missing from a character, which is four bytes at most


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
    """Return the text of token `at`, between « and », with `context` tokens on either side.

    A token that is a part of a character is shown as that character.
    """
    first, last = max(0, at - context), min(len(tokens), at + 1 + context)
    base, text = _decoded_around(tokenizer, tokens, first, last)

    def length_before(stop: int, step: int) -> int | None:
        """Return the length of the text before token `stop`, or before the next one at which a character begins."""
        for until in range(stop, stop + step * (_CHARACTER + 1), step):
            before = tokenizer.decode(tokens[base : max(base, until)], skip_special_tokens=False)
            if text.startswith(before):
                return len(before)
        return None

    cuts = [length_before(first, -1), length_before(at, -1), length_before(at + 1, 1), length_before(last, 1)]
    bounds = [cut for cut in cuts if cut is not None]
    if len(bounds) == len(cuts):
        pieces = [text[start:stop] for start, stop in pairwise(bounds)]
        if pieces[1] == f" {tokenizer.id_to_token(tokens[at])}":  # the decoder's space, between tokens that have none
            pieces[:2] = pieces[0] + " ", pieces[1][1:]
    else:  # the decoder joins texts in another way
        parts = (tokens[first:at], tokens[at : at + 1], tokens[at + 1 : last])
        pieces = [tokenizer.decode(part, skip_special_tokens=False) for part in parts]
    return "{}«{}»{}".format(*pieces)


def _decoded_around(tokenizer: Tokenizer, tokens: Sequence[int], first: int, last: int) -> tuple[int, str]:
    """Decode tokens `first` to `last` in one piece, with as many around them as make whole characters.

    One token more comes before them: a decoder drops the space in front of what it is given.

    Returns:
        The number of the first token that is decoded, and the text.
    """
    tried: list[tuple[int, str]] = []
    for more in sorted(product(range(_CHARACTER + 1), repeat=2), key=sum):
        base = max(0, first - 1 - more[0])
        tried.append((base, tokenizer.decode(tokens[base : last + more[1]], skip_special_tokens=False)))
        if _BROKEN not in tried[-1][1]:
            break
    return min(tried, key=lambda found: found[1].count(_BROKEN))


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str | None]:
    """Return the text of each token as it stands inside a text; None for a part of a character.

    Each is decoded after itself, since a decoder drops the space in front of what it is given.
    """
    alone = tokenizer.decode_batch([[token] for token in tokens], skip_special_tokens=False)
    twice = tokenizer.decode_batch([[token, token] for token in tokens], skip_special_tokens=False)
    found: list[str | None] = []
    for token, one, two in zip(tokens, alone, twice, strict=True):
        text = two[len(one) :] if two.startswith(one) else one
        if text == f" {tokenizer.id_to_token(token)}":  # the decoder's space, between tokens that have none
            text = text[1:]
        found.append(None if _BROKEN in one + two else text)
    return found


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
