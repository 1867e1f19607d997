"""One array on disk beside the rows that it holds, for the tests of the reader."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from residua.store.encoding.spec import ArraySpec
from residua.store.read.mapped import MappedShard
from residua.store.read.reader import ArrayReader
from tests.store.samples import Array, make_rows, write_array

N_ROWS = 16 * 3 + 7  # the last shard is short, and so is its last chunk


@dataclass(frozen=True)
class Stored:
    root: Path
    spec: ArraySpec
    rows: Array
    shards: list[Path]

    def reader(self, **settings: object) -> ArrayReader:
        return ArrayReader(self.root, self.spec, len(self.rows), **settings)  # type: ignore[arg-type]  # as given

    def mapped(self, n_shards: int) -> Iterator[MappedShard]:
        for shard in range(n_shards):
            yield MappedShard(self.root, self.spec, shard, len(self.rows))


def store(root: Path, spec: ArraySpec, n_rows: int = N_ROWS) -> Stored:
    rows = make_rows(spec, n_rows)
    return Stored(root, spec, rows, write_array(root, spec, rows))
