"""Archives with values, tokens and columns that a test chooses, in small shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive
from residua.store.sealing.seal import seal
from residua.store.storage.files import write_file

VOCABULARY = 50


def tokenizer_files() -> dict[str, bytes]:
    """Return the file of a tokenizer that decodes token t to ``w<t>``."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))  # noqa: S106
    return {"tokenizer/tokenizer.json": words.to_str().encode()}


def write_rows(
    path: Path,
    lengths: Sequence[int],
    values: Mapping[str, npt.NDArray[Any]],
    *,
    columns: Mapping[str, Sequence[object]] | None = None,
    input_ids: Sequence[Sequence[int]] | None = None,
    files: Mapping[str, bytes] | None = None,
    rows_per_shard: int = 64,
    codec: str = "fast",
    sealed: bool = True,
) -> Archive:
    """Write an archive of examples whose sites have `values`, (rows, *row shape), and open it.

    Args:
        path: Path of the archive.
        lengths: Number of rows of each example, from its first position on.
        values: Values of each site, by name.
        columns: Columns of the example table, one value per example.
        input_ids: Tokens of each example, at least as many as it has rows; by default row r has token r % 50.
        files: Sidecar files by name; by default those of a tokenizer.
        rows_per_shard: Rows of a shard.
        codec: Codec of all sites.
        sealed: Whether to seal the archive.
    """
    n_rows = sum(lengths)
    none = np.zeros(0, np.int32)
    positions = [np.arange(length, dtype=np.int32) for length in lengths]
    if input_ids is None:
        tokens = np.split(np.arange(n_rows, dtype=np.int32) % VOCABULARY, np.cumsum(lengths)[:-1])
    else:
        tokens = [np.array(ids, np.int32) for ids in input_ids]
    rows = {
        "token": np.concatenate([none, *(ids[at] for ids, at in zip(tokens, positions, strict=True))]),
        "position": np.concatenate([none, *positions]),
        "example": np.repeat(np.arange(len(lengths)), np.array(lengths, np.int64)),
    }
    sites = tuple(
        SitePlan(name=name, row_shape=array.shape[1:], dtype=str(array.dtype), codec=codec)
        for name, array in values.items()
    )
    with workspace(path) as folder:
        writer = ExampleWriter(folder / "examples")
        for i, (ids, at) in enumerate(zip(tokens, positions, strict=True)):
            own = {name: column[i] for name, column in (columns or {}).items()}
            writer.add(Example(input_ids=ids, positions=at, columns=own))
        dataset = {"digest": writer.close().digest}
        for name, content in (tokenizer_files() if files is None else files).items():
            write_file(folder / name, [content])
        plan = Plan(model={}, dataset=dataset, rules={}, sites=sites, rows_per_shard=rows_per_shard, n_rows=n_rows)
        create_archive(folder, path, plan, {})
    with ShardWriter(path, plan) as shards:
        for index, first in enumerate(range(0, n_rows, rows_per_shard)):
            here = slice(first, first + rows_per_shard)
            of_sites, of_columns = (
                {name: np.ascontiguousarray(array[here]) for name, array in arrays.items()} for arrays in (values, rows)
            )
            shards.submit(FilledShard(index=index, first_row=first, sites=of_sites, columns=of_columns))
    archive = Archive(path)
    if sealed:
        seal(path, archive.metadata)
    return Archive(path)
