"""The example table of a replay's archive: the chosen examples, and which they are in the archive that is replayed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import PlanError
from residua.store.examples.index import Example, ExampleIndex
from residua.store.examples.writer import ExampleWriter
from residua.store.read.archive import REPLAYED_EXAMPLE, Archive, is_replay


def write_replayed_examples(folder: Path, archive: Archive, examples: npt.NDArray[np.int64]) -> ExampleIndex:
    """Write the examples of a replay's archive, in their order, with all columns of the dataset.

    Args:
        folder: The new example table's folder; it is made.
        archive: The archive that is replayed.
        examples: Numbers of the chosen examples, ascending.

    Raises:
        PlanError: The dataset has a column of the name that is needed.
    """
    table = archive.example_table
    if REPLAYED_EXAMPLE in table.column_types() and not is_replay(archive):
        raise PlanError(
            f"the examples of {archive.path} have a column {REPLAYED_EXAMPLE!r} of their own, where the archive of a "
            "replay says which example is which: replay without capturing"
        )
    writer = ExampleWriter(folder)
    for number, columns in _chosen_lines(archive, examples):
        [(input_ids, positions)] = table.batch([number])
        writer.add(Example(input_ids=input_ids, positions=positions, columns={**columns, REPLAYED_EXAMPLE: number}))
    return writer.close()


def _chosen_lines(archive: Archive, examples: npt.NDArray[np.int64]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each chosen example with the dataset's own columns; one part is in memory at a time."""
    table = archive.example_table
    own, start = list(table.column_types()), 0
    for part in table.parts(["n_rows", *own]):  # the first for its length: there may be no other
        inside = examples[(examples >= start) & (examples < start + part.num_rows)]
        for number, line in zip(inside.tolist(), part.take(inside - start).to_pylist(), strict=True):
            yield (
                number,
                {name: line.get(name) for name in own if name != REPLAYED_EXAMPLE},
            )  # that of an earlier replay
        start += part.num_rows
