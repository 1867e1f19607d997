"""Which keys count for a query: the definitions behind the scores of attention heads.

A match is evaluated tile by tile, so nothing is ever as large as a pattern. Positions count from 0. `start` is the
first position that takes part: 1 if position 0 is a BOS token. A match never looks ahead, even in models that can.

Axes: `Q` query and `K` key positions.
"""

from collections.abc import Callable

from torch import Tensor

Match = Callable[[Tensor, Tensor], Tensor]
"""Takes query positions (Q, 1) and key positions (1, K), int64, and returns which pairs count, bool (Q, K)."""


def stripe(period: int, *, start: int = 0) -> Match:
    """Match the token after the same token one period before: the diagonal ``1 - period`` of the pattern.

    The usual demonstration of induction heads (in TransformerLens and FlexModel) averages this diagonal over a repeated
    random block. Here only queries of the second and later copies have a match: the first copy has no earlier one.
    """
    return lambda query, key: (key == query - period + 1) & (query >= start + period)


def self_attention() -> Match:
    """Match the token itself: the diagonal of the pattern."""
    return lambda query, key: key == query


def previous_token(*, start: int = 0) -> Match:
    """Match the token before: the diagonal -1 of the pattern.

    See Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", and Olsson et al. 2022. The first token
    has no match, and neither has the token after a BOS, because nearly every head attends to a BOS.
    """
    return lambda query, key: (key == query - 1) & (key >= start)


def duplicate_token(tokens: Tensor, *, start: int = 0) -> Match:
    """Match every earlier occurrence of the same token (Wang et al. 2022, "Interpretability in the Wild").

    Args:
        tokens: Token ids of the example, int64, (positions).
        start: First position that takes part.
    """
    return lambda query, key: (tokens[key] == tokens[query]) & (key < query) & (key >= start)


def prefix(tokens: Tensor, *, start: int = 0) -> Match:
    """Match every token that followed an earlier occurrence of the query's token.

    This is the "prefix matching" of Olsson et al. 2022, "In-context Learning and Induction Heads": the attention to all
    tokens that came after the same token. Queries whose token is new have no match.

    Args:
        tokens: Token ids of the example, int64, (positions).
        start: First position that takes part.
    """
    return lambda query, key: (tokens[key - 1] == tokens[query]) & (key <= query) & (key > start)


def left_out(*, bos: bool, current: bool) -> Match:
    """Match the pairs to leave out: with the first token as key if `bos`, of a token with itself if `current`."""
    return lambda query, key: ((key == 0) & bos) | ((key == query) & current)


def without(match: Match, others: Match) -> Match:
    """Match where `match` does and `others` does not."""
    return lambda query, key: match(query, key) & ~others(query, key)
