"""One example, the lengths of all examples, and the digest of their content.

The digest is a SHA-256 over every example in order: n_tokens and n_rows as little-endian int64, then input_ids and
positions as little-endian int32, then the SHA-256 of each of its images. The user's own columns are left out. It does
not depend on Parquet: a table that is rewritten with another compression keeps its digest.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from residua.store.base.canonical import Json
from residua.store.base.errors import DatasetError

IntArray = NDArray[np.int32]
LongArray = NDArray[np.int64]

# The table's own columns, as they are stored; the user's follow.
OWN_COLUMNS: Mapping[str, pa.DataType] = {
    "first_row": pa.int64(),
    "n_rows": pa.int32(),
    "n_tokens": pa.int32(),
    "input_ids": pa.list_(pa.int32()),
    "positions": pa.list_(pa.int32()),
}
NO_TOKEN = -1
"""Token id of a position without a token: an image, or an embedding that was passed itself. All of an example's are."""

OTHER_INPUTS = "other_inputs"
"""Column of the example table of a user's own loop: names of what the call had beside tokens and mask."""
INPUT_PREFIX = "input."
"""With the name of such an input: a column of its values, where they are whole numbers, one or few for each token, or
one for the example."""

EXAMPLES = "examples"
"""Folder of an archive with the parts of the example table."""

IMAGES = "image_sha256"
"""Column of the example table with the SHA-256 of each image of an example, in hex."""
SOURCE_SHA256 = "source_sha256"
"""Column of the example table of an encoder-decoder over audio: the SHA-256 of each source's features, in hex."""

SOURCE_IDS = "source_ids"
"""Column of the example table of a decoder: the tokens of each source; -1 for each position of one without tokens."""

DIGEST_KEY = b"residua.digest"
IMAGES_KEY = b"residua.digest_covers"  # in the metadata of a part whose digest covers the column `IMAGES`
MAX_PART_EXAMPLES = 2**20  # readers take memory for these counts before they can check them
MAX_PART_VALUES = 2**28
MAX_PART_BYTES = 2**32


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One token sequence, its positions that become rows, and the dataset's other columns.

    Attributes:
        input_ids: Token ids, int32, (positions of the example); every one is `NO_TOKEN` for an example without tokens.
        positions: Kept positions, int32, strictly increasing, (rows of the example).
        columns: Values of the dataset's other columns: plain Python values that Arrow can store.
        images: SHA-256 of each of its images, in hex; None for an example of a dataset without images.

    Raises:
        DatasetError: An array has another dtype or rank, an id is negative, or a position lies outside the example.
    """

    input_ids: IntArray
    positions: IntArray
    columns: Mapping[str, object] = field(default_factory=dict)
    images: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, values in (("input_ids", self.input_ids), ("positions", self.positions)):
            if values.dtype != np.int32 or values.ndim != 1:
                raise DatasetError(f"{name}: give a one-dimensional int32 array, found {values.dtype} {values.shape}")
        problem = content_problem(self.input_ids, self.positions)
        if problem:
            raise DatasetError(f"this example cannot be stored: {problem}")


def has_no_tokens(input_ids: IntArray) -> bool:
    """Return whether an example has positions but no tokens."""
    return bool(input_ids.size and (input_ids == NO_TOKEN).all())


def content_problem(input_ids: IntArray, positions: IntArray) -> str:
    """Return what is wrong with one example's numbers; an empty text if nothing is."""
    if input_ids.size and input_ids.min() < 0 and not has_no_tokens(input_ids):
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
    """Lengths of all examples, and where their rows start: 16 bytes for each example.

    Attributes:
        n_tokens: Tokens of each example, int32, (examples).
        n_rows: Rows of each example, int32, (examples).
        first_row: First row of each example, then the number of all rows, int64, (examples + 1).
        first_example: First example of each part, then the number of examples, int64, (parts + 1).
        digest: Digest of the content, in hex. A reader takes it from the files, and `ExampleTable.verify` checks it.
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


def dataset_entry(index: ExampleIndex) -> dict[str, Json]:
    """Return what a plan records of its examples."""
    return {
        "digest": index.digest,
        "n_examples": index.n_examples,
        "n_tokens": index.total_tokens,
        "longest_example": int(index.n_tokens.max()),
    }


def add_to_digest(
    digest: "hashlib._Hash", input_ids: IntArray, positions: IntArray, images: Iterable[str] = ()
) -> None:
    """Add one example to the running SHA-256 of a table."""
    digest.update(np.array([input_ids.size, positions.size], "<i8").tobytes())
    digest.update(input_ids.astype("<i4").tobytes())
    digest.update(positions.astype("<i4").tobytes())
    for image in images:
        digest.update(bytes.fromhex(image))


def starts(counts: IntArray) -> LongArray:
    """Return the sum of the counts before each one, then the sum of all: int64, (counts + 1)."""
    bounds = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    return bounds


def part_name(part_index: int) -> str:
    """Return the file name of a part.

    >>> part_name(3)
    'part-00003.parquet'
    """
    return f"part-{part_index:05d}.parquet"
