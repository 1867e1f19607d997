"""Columns of the example table with a list for each example: one value a token, such as labels."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from residua.store.base.errors import AnalysisError
from residua.store.examples.index import IntArray, LongArray, starts


class TokenValues(NamedTuple):
    """A column's values, token by token.

    Attributes:
        values: The values of the tokens of all examples, one after the other.
        starts: Where each example begins among them, then their number, (examples + 1).
    """

    values: pa.ChunkedArray
    starts: LongArray


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type has a list for each example."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def token_values(name: str, column: pa.ChunkedArray, n_tokens: IntArray) -> TokenValues:
    """Return the values of a column of lists; all tokens of an example without a list have null.

    Args:
        name: Its name, for messages.
        column: The column, a list for each example.
        n_tokens: Tokens of each example.

    Raises:
        AnalysisError: A list has not one value for each token of its example.
    """
    is_there = column.is_valid().to_numpy()
    lengths = pc.call_function("list_value_length", [column]).fill_null(0).to_numpy().astype(np.int64)
    wrong = np.flatnonzero(is_there & (lengths != n_tokens))
    if wrong.size:
        raise AnalysisError(
            f"column {name!r} holds lists, which must have one value per token, but example {wrong[0]} has "
            f"{lengths[wrong[0]]:,} values and {n_tokens[wrong[0]]:,} tokens: choose another column"
        )
    values = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
    if not is_there.all():
        has_value = np.repeat(is_there, n_tokens)
        places = np.cumsum(has_value) - 1
        values = values.take(pa.array(places, pa.int64(), mask=~has_value))
    return TokenValues(values, starts(n_tokens))
