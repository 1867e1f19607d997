"""One example, and what is known of all of them without their tokens.

The digest is defined on the content, so that a table may be rewritten with another compression, or be
checked without Parquet, and keep it. It is the SHA-256 of, for every example in order: n_tokens and n_rows as
little-endian int64, then input_ids and positions as little-endian int32. The user's own columns are no part
of it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from residua.store.base.errors import DatasetError

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]

# The table's own columns, in the order in which they are stored; the user's follow.
OWN_COLUMNS: Mapping[str, pa.DataType] = {
    "first_row": pa.int64(),
    "n_rows": pa.int32(),
    "n_tokens": pa.int32(),
    "input_ids": pa.list_(pa.int32()),
    "positions": pa.list_(pa.int32()),
}
DIGEST_KEY = b"residua.digest"
MAX_PART_EXAMPLES = 2**20  # a reader takes memory for these counts before it can check them
MAX_PART_VALUES = 2**28
MAX_PART_BYTES = 2**32


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One token sequence, the positions of it that become rows, and what the dataset says about it.

    Attributes:
        input_ids: Token ids, int32, (positions of the example).
        positions: Kept positions, int32, strictly increasing, one a row.
        columns: The dataset's other columns: plain Python values that Arrow can store.

    Raises:
        DatasetError: An array has another dtype or rank, an id is negative, or the positions do not fit.
    """

    input_ids: IntArray
    positions: IntArray
    columns: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (("input_ids", self.input_ids), ("positions", self.positions)):
            if values.dtype != np.int32 or values.ndim != 1:
                raise DatasetError(f"{name}: one row of int32 is needed, found {values.dtype} {values.shape}")
        problem = content_problem(self.input_ids, self.positions)
        if problem:
            raise DatasetError(f"this example cannot be stored: {problem}")


def content_problem(input_ids: IntArray, positions: IntArray) -> str:
    """Return what is wrong with one example's numbers, or an empty text."""
    if input_ids.size and input_ids.min() < 0:
        return f"token id {input_ids.min()} is negative"
    if not positions.size:
        return ""
    if positions[0] < 0 or positions[-1] >= input_ids.size:
        return f"positions {positions[0]} to {positions[-1]} do not lie in its {input_ids.size} tokens"
    if positions.size > 1 and (positions[1:] <= positions[:-1]).any():
        return "its positions are not strictly increasing"
    return ""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleIndex:
    """Lengths of all examples and where their rows start: 16 bytes an example.

    Attributes:
        n_tokens: Tokens of each example, int32, (examples).
        n_rows: Rows of each example, int32, (examples).
        first_row: First row of each example and, last, the number of all rows, int64, (examples + 1).
        first_example: First example of each part and, last, the number of examples, int64, (parts + 1).
        digest: The digest of the whole content, in hex; as a reader finds it recorded until it verifies.
    """

    n_tokens: IntArray
    n_rows: IntArray
    first_row: LongArray
    first_example: LongArray
    digest: str

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return len(self.n_tokens)

    @property
    def total_rows(self) -> int:
        """Number of rows of all examples."""
        return int(self.first_row[-1])

    @property
    def total_tokens(self) -> int:
        """Number of tokens of all examples, kept or not."""
        return int(self.n_tokens.sum(dtype=np.int64))


class ContentDigest:
    """The running digest of a table; the module's head defines it."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def copy(self) -> "ContentDigest":
        """Return a digest that goes on from here by itself."""
        other = ContentDigest()
        other._sha256 = self._sha256.copy()
        return other

    def add(self, input_ids: IntArray, positions: IntArray) -> None:
        """Append one example."""
        self._sha256.update(np.array([input_ids.size, positions.size], "<i8").tobytes())
        self._sha256.update(input_ids.astype("<i4").tobytes())
        self._sha256.update(positions.astype("<i4").tobytes())

    def hexdigest(self) -> str:
        """Return the digest of what was added so far."""
        return self._sha256.hexdigest()


def starts(counts: IntArray) -> LongArray:
    """Return where each run of `counts` starts and, last, their sum: int64, one longer than `counts`."""
    bounds = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    return bounds


def part_name(part_index: int) -> str:
    """Return the file name of a part.

    >>> part_name(3)
    'part-00003.parquet'
    """
    return f"part-{part_index:05d}.parquet"
