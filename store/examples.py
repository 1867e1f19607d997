"""The example table: one line an example, in Parquet, to trace rows back to their tokens and texts.

``examples/part-00000.parquet`` and so on hold first_row (int64), n_rows and n_tokens (int32), input_ids and
positions (lists of int32), and then the user's own columns. Rows of the archive follow the examples in order:
those of example i are ``first_row[i]`` up to ``first_row[i] + n_rows[i]``, one for each of its positions.
`ExampleWriter` writes parts, `ExampleTable` reads them, `ExampleIndex` is what both know of the lengths;
its digest names the content.
"""

from residua.store.example_index import Example, ExampleIndex
from residua.store.example_table import ExampleTable
from residua.store.example_writer import ExampleWriter

__all__ = ["Example", "ExampleIndex", "ExampleTable", "ExampleWriter"]
