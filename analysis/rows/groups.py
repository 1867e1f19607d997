"""Groups of examples that belong together, so that a held-out split never divides them.

The windows of one document (``source_index``) resemble each other, and so do copies of a text. A probe that has seen
one of them recognises the others, whatever it was asked to learn. By default a group is therefore everything that is
connected by

* the same document;
* the same content: all tokens of two documents are equal, or a window of at least 16 tokens is.

Examples whose tokens are all the same, such as images, whose tokens are placeholders, have no content to compare.
"""

from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from residua.store.base.errors import AnalysisError
from residua.store.examples.table import ExampleTable
from residua.store.read.archive import Archive

Numbers = npt.NDArray[np.int64]

EXAMPLE, DOCUMENT = "example", "source_index"
_SHORTEST_WINDOW = 16  # tokens: shorter ones, such as the last of a document, are equal by chance
_NONE = -1


def example_groups(archive: Archive, group: str | None = None) -> Numbers:
    """Return the group of each example: the number of the group's first example, (examples,) int64.

    Args:
        archive: The archive.
        group: None: documents and equal contents, as this module's head says. A column of the example table, for
            example ``author``: examples with equal values belong together as well; a null value joins nothing.
            ``source_index``: documents alone, whatever their content. ``example``: every example for itself.

    Raises:
        AnalysisError: There is no such column, or it holds lists or mappings.
    """
    table = archive.example_table
    n_examples = table.index().n_examples
    if group == EXAMPLE:
        return np.arange(n_examples)
    columns = table.column_types()
    documents = _by_value(table, DOCUMENT) if DOCUMENT in columns else np.full(n_examples, _NONE)
    if group == DOCUMENT:
        return _connected([documents])
    keys = [documents, *_by_content(table, documents)]
    if group is not None:
        if group not in columns:
            known = ", ".join([EXAMPLE, *columns])
            raise AnalysisError(f"there is no column {group!r} to group the examples by: choose one of {known}")
        keys.append(_by_value(table, group))
    return _connected(keys)


def _by_value(table: ExampleTable, name: str) -> Numbers:
    """Return a number for each different value of a column, -1 for null, (examples,)."""
    column = table.table([name])[name].combine_chunks()
    if pa.types.is_nested(column.type):
        raise AnalysisError(
            f"examples cannot be grouped by the column {name!r}, which holds {column.type}: choose a column of texts "
            "or numbers"
        )
    encoded: Any = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    if pa.types.is_null(column.type):
        return np.full(len(column), _NONE)
    return np.asarray(encoded.indices.cast(pa.int64()).fill_null(_NONE).to_numpy(zero_copy_only=False))


def _by_content(table: ExampleTable, documents: Numbers) -> list[Numbers]:
    """Return a number for each different content of a document, and of a window; -1 for none, (examples,) each."""
    hashes, is_said = _token_hashes(table)
    is_long = is_said & (table.index().n_tokens >= _SHORTEST_WINDOW)
    whole = hashes.copy()
    order = np.argsort(documents, kind="stable")
    order = order[np.searchsorted(documents[order], 0) :]  # -1 is no document
    for members in np.split(order, np.flatnonzero(np.diff(documents[order])) + 1):
        if len(members) > 1:
            whole[members] = _hash(hashes[members].tobytes())
            is_said[members] = is_said[members].any()
    return [_numbered(whole, is_said), _numbered(hashes, is_long)]


def _token_hashes(table: ExampleTable) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Return a hash of each example's tokens, and whether they differ from each other."""
    hashes = [np.zeros(0, np.uint64)]
    is_said = [np.zeros(0, np.bool_)]
    for part in table.parts(["input_ids"]):
        for chunk in part["input_ids"].chunks:
            tokens: npt.NDArray[np.int32] = chunk.values.to_numpy(zero_copy_only=False)
            bounds: list[int] = chunk.offsets.to_numpy(zero_copy_only=False).tolist()
            pieces = [tokens[start:stop] for start, stop in pairwise(bounds)]
            hashes.append(np.array([_hash(piece.tobytes()) for piece in pieces], np.uint64))
            is_said.append(np.array([len(piece) > 1 and bool((piece != piece[0]).any()) for piece in pieces], np.bool_))
    return np.concatenate(hashes), np.concatenate(is_said)


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _numbered(hashes: npt.NDArray[np.uint64], is_used: npt.NDArray[np.bool_]) -> Numbers:
    numbers = np.unique(hashes, return_inverse=True)[1].astype(np.int64)
    return np.where(is_used, numbers, _NONE)


def _connected(keys: Sequence[Numbers]) -> Numbers:
    """Return the first of all examples that an example is connected with by equal keys, over any number of steps."""
    n_examples = len(keys[0])
    examples, nodes, n_nodes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], n_examples
    for key in keys:
        members = np.flatnonzero(key != _NONE)
        examples.append(members)
        nodes.append(n_nodes + key[members])
        n_nodes += int(key.max(initial=_NONE)) + 1
    edges = np.concatenate(examples), np.concatenate(nodes)
    graph = coo_array((np.ones(len(edges[0]), np.bool_), edges), shape=(n_nodes, n_nodes))
    components = connected_components(graph, directed=False)[1][:n_examples]
    first = np.full(n_nodes, n_examples)
    np.minimum.at(first, components, np.arange(n_examples))
    return np.asarray(first[components], np.int64)
