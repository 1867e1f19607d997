"""A small example table, and its digest as the format page defines it."""

import hashlib
import struct
from pathlib import Path

import numpy as np

from residua.store.examples.index import Example, ExampleIndex
from residua.store.examples.table import ExampleTable
from residua.store.examples.writer import ExampleWriter

Content = list[tuple[list[int], list[int]]]


CONTENT: Content = [([5, 6, 7], [0, 2]), ([], []), ([9], []), ([1, 2, 3, 4], [0, 1, 2, 3]), ([8, 8], [1])]


def example(ids: list[int], positions: list[int], /, **columns: object) -> Example:
    return Example(input_ids=np.array(ids, np.int32), positions=np.array(positions, np.int32), columns=columns)


def written(folder: Path, content: Content = CONTENT, examples_per_part: int = 2) -> ExampleIndex:
    writer = ExampleWriter(folder, examples_per_part=examples_per_part)
    for i, (ids, positions) in enumerate(content):
        assert writer.add(example(ids, positions, label=i, text=f"example {i}")) == i
    return writer.close()


def expected_digest(content: Content) -> str:
    """Return the digest that the format page defines, with `struct` alone."""
    sha256 = hashlib.sha256()
    for ids, positions in content:
        sha256.update(struct.pack("<qq", len(ids), len(positions)))
        sha256.update(struct.pack(f"<{len(ids)}i", *ids) + struct.pack(f"<{len(positions)}i", *positions))
    return sha256.hexdigest()


def as_lists(table: ExampleTable) -> Content:
    return [(ids.tolist(), positions.tolist()) for ids, positions in table.batch(range(len(table)))]
