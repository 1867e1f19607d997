"""The example table of a replay's archive: the chosen examples, with their numbers in the replayed archive."""

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
        folder: Folder of the new example table; it must not exist.
        archive: The replayed archive.
        examples: Numbers of the chosen examples, ascending.

    Raises:
        PlanError: The dataset has a column of its own with the name of the column of these numbers.
    """
    table = archive.example_table
    if REPLAYED_EXAMPLE in table.column_types() and not is_replay(archive):
        raise PlanError(
            f"the examples of {archive.path} have a column {REPLAYED_EXAMPLE!r} of their own, and the archive of a "
            "replay keeps the number of each replayed example there: replay without capturing"
        )
    writer = ExampleWriter(folder)
    for number, columns in _dataset_columns(archive, examples):
        [(input_ids, positions)] = table.batch([number])
        writer.add(Example(input_ids=input_ids, positions=positions, columns={**columns, REPLAYED_EXAMPLE: number}))
    return writer.close()


def _dataset_columns(archive: Archive, examples: npt.NDArray[np.int64]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each chosen example with its columns of the dataset; one file is in memory at a time."""
    table = archive.example_table
    names = [name for name in table.column_types() if name != REPLAYED_EXAMPLE]  # that of an earlier replay goes
    start = 0
    for file in table.parts(["n_rows", *names]):  # n_rows for its length: there may be no other column
        inside = examples[(examples >= start) & (examples < start + file.num_rows)]
        for number, line in zip(inside.tolist(), file.take(inside - start).to_pylist(), strict=True):
            yield number, {name: line.get(name) for name in names}
        start += file.num_rows
