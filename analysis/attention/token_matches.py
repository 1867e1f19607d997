"""Which keys count for a query: the definitions behind the scores of attention heads, each under its own name.

A match is asked for a tile at a time, so none is ever as large as a pattern. Positions count from 0; `start` is the
first position that takes part, 1 where position 0 is a BOS. A match never looks ahead, in models that can as well.

Axes: `Q` query and `K` key positions.
"""

from collections.abc import Callable

from torch import Tensor

Match = Callable[[Tensor, Tensor], Tensor]
"""Takes query positions (Q, 1) and key positions (1, K), int64, and gives bool (Q, K): which pairs count."""


def stripe(period: int, *, start: int = 0) -> Match:
    """Match the token after the same token, one period before: the diagonal ``1 - period`` of the pattern.

    The usual demonstration of induction heads (TransformerLens's and FlexModel's) averages this diagonal of a random
    block that is repeated. Here only queries of the second and later copies have a match: the first copy has nothing
    to look back to.
    """
    return lambda query, key: (key == query - period + 1) & (query >= start + period)


def previous_token(*, start: int = 0) -> Match:
    """Match the token before (Elhage et al. 2021; Olsson et al. 2022): the diagonal -1 of the pattern.

    The first token has no match, and neither has the one that follows a BOS, which nearly every head attends to.
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
    """Match every token that followed an earlier occurrence of the query's token (Olsson et al. 2022).

    Their "prefix matching": the attention from a token to what came after the same token before, whichever of the
    earlier copies it is in. Queries whose token is new have no match.

    Args:
        tokens: Token ids of the example, int64, (positions).
        start: First position that takes part.
    """
    return lambda query, key: (tokens[key - 1] == tokens[query]) & (key <= query) & (key > start)


def left_out(*, bos: bool, current: bool) -> Match:
    """Match the pairs that are left out: with the first token as key if `bos`, of a token with itself if `current`."""
    return lambda query, key: ((key == 0) & bos) | ((key == query) & current)


def without(match: Match, others: Match) -> Match:
    """Match where `match` does and `others` does not."""
    return lambda query, key: match(query, key) & ~others(query, key)
