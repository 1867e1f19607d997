"""Archives of rows that a test makes up: values, tokens and columns of its own, in small shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, seal, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive
from residua.store.storage.files import write_file

VOCABULARY = 50


def write_rows(
    path: Path,
    lengths: Sequence[int],
    values: Mapping[str, npt.NDArray[Any]],
    *,
    columns: Mapping[str, Sequence[object]] | None = None,
    rows_per_shard: int = 64,
    tokenizer: bool = True,
) -> Archive:
    """Write an archive of examples of `lengths` whose sites have `values`, (rows, *row shape), and open it.

    Token r % 50 stands at row r; with a tokenizer it reads ``w<r % 50>``. `columns` have one value an example.
    """
    starts = np.cumsum([0, *lengths])
    tokens = (np.arange(starts[-1]) % VOCABULARY).astype(np.int32)
    rows = {
        "token": tokens,
        "position": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "example": np.repeat(np.arange(len(lengths)), lengths),
    }
    sites = tuple(
        SitePlan(name=name, row_shape=array.shape[1:], dtype=str(array.dtype), codec="fast")
        for name, array in values.items()
    )
    with workspace(path) as folder:
        writer = ExampleWriter(folder / "examples")
        for i, length in enumerate(lengths):
            own = {name: column[i] for name, column in (columns or {}).items()}
            ids, positions = tokens[starts[i] : starts[i + 1]], np.arange(length, dtype=np.int32)
            writer.add(Example(input_ids=ids, positions=positions, columns=own))
        digest = writer.close().digest
        if tokenizer:
            words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))  # noqa: S106
            write_file(folder / "tokenizer" / "tokenizer.json", [words.to_str().encode()])
        plan = Plan(
            model={},
            dataset={"digest": digest},
            rules={},
            sites=sites,
            rows_per_shard=rows_per_shard,
            n_rows=len(tokens),
        )
        create_archive(folder, path, plan, {})
    with ShardWriter(path, plan) as shards:
        for index, first in enumerate(range(0, len(tokens), rows_per_shard)):
            part = slice(first, first + rows_per_shard)
            shards.submit(
                FilledShard(
                    index=index,
                    first_row=first,
                    sites={name: np.ascontiguousarray(array[part]) for name, array in values.items()},
                    columns={name: np.ascontiguousarray(column[part]) for name, column in rows.items()},
                )
            )
    archive = Archive(path)
    seal(path, archive.metadata, archive.commits)
    return Archive(path)
