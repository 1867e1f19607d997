"""Arrays on disk for the tests of the store: arbitrary bit patterns, with NaN and infinities."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.shard import ShardEncoder, shard_path
from residua.store.encoding.spec import ArraySpec
from residua.store.format.array_metadata import create_array
from residua.store.read.mapped import MappedShard
from residua.store.read.rows_in_shards import ArrayReader
from residua.store.storage.files import write_file

Array = npt.NDArray[np.generic]
N_ROWS = 16 * 3 + 7  # of a stored array: the last shard is short, and so is its last chunk

# Every pair of preset and dtype that one stored array may have.
COMBINATIONS = [
    (name, dtype) for name, codec in PRESETS.items() for dtype in codec.dtypes if len(codec.arrays((1,), dtype)) == 1
]


def make_spec(
    preset: str = "fast",
    dtype: str = "bfloat16",
    row_shape: Sequence[int] = (6,),
    *,
    rows_per_shard: int = 16,
    rows_per_chunk: int = 4,
) -> ArraySpec:
    return ArraySpec(
        path="sites/resid_post/7",
        row_shape=tuple(row_shape),
        dtype=dtype,
        preset=preset,
        rows_per_shard=rows_per_shard,
        rows_per_chunk=rows_per_chunk,
    )


def make_rows(spec: ArraySpec, n_rows: int, seed: int = 0) -> Array:
    """Return rows of random bits; a third of the values look like activations, so that they compress."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, n_rows * spec.row_bytes, dtype=np.uint8).view(spec.storage_dtype)
    ordinary = rng.standard_normal(rows.size).astype(np.float32)
    if spec.dtype == "bfloat16":
        values: Array = (ordinary.view(np.uint32) >> 16).astype(np.uint16)
    else:
        values = (ordinary * 9).astype(spec.storage_dtype)
    rows = np.where(rng.random(rows.size) < 0.3, values, rows).astype(spec.storage_dtype)
    return rows.reshape(n_rows, *spec.row_shape)


def write_array(root: Path, spec: ArraySpec, rows: Array) -> list[Path]:
    """Write metadata and shards, and return the shard files."""
    create_array(root, spec, len(rows))
    paths = []
    for shard, start in enumerate(range(0, len(rows), spec.rows_per_shard)):
        paths.append(shard_path(root, spec, shard))
        write_file(paths[-1], ShardEncoder(rows[start : start + spec.rows_per_shard], spec))
    return paths


def same_bits(left: Array, right: Array) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def flip_every_bit(path: Path) -> Iterator[int]:
    """Flip every bit of a file in turn: yield while it is flipped, then restore it."""
    data = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(data)):
            at = bit // 8
            file.seek(at)
            file.write(bytes([data[at] ^ 1 << bit % 8]))
            yield bit
            file.seek(at)
            file.write(data[at : at + 1])


@dataclass(frozen=True)
class Stored:
    """An array on disk, with the rows that it holds."""

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
