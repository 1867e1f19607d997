"""How fast shards are written, and how small they are: `python benchmarks/write.py`.

Every case stores the same rows: 128 MiB of bfloat16 residuals of a trained model, in shards of 32 MiB and chunks of
512 KiB. Speed is megabytes of values a second of processor time, kernel included, so that a slow disk and idle cores
do not count. Residua makes every shard durable (flush, rename, flush of the folder) and looks for NaN; of the other
cases only the one named fdatasync is durable. A capture writes `raw` from its host buffers, which have the layout of
the file; from an array, the values are copied once.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore
import torch
import zarr
from measure import Timings, in_turns, machine, parser, publish, speedups, spread, table
from residuals import trained_residuals

from residua.store.encoding.shard import ShardEncoder, ShardMemory, shard_path
from residua.store.encoding.spec import ArraySpec
from residua.store.format.array_metadata import create_array
from residua.store.storage.files import write_file

ROWS_PER_SHARD = 131_072
ROWS_PER_CHUNK = 2_048
ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
EMPTY_CHUNKS = {"array.write_empty_chunks": True}
RAW = "ours, raw, from a host buffer"
FAST = "ours, fast"
PLAIN = "plain write()"
DURABLE = "plain write(), fdatasync"
DEFAULT = "zarr-python, its default (zstd)"

Rows = npt.NDArray[np.uint16]


def plain(rows: Rows, folder: Path, *, durable: bool) -> None:
    """Write every shard's values with one call."""
    for start in range(0, len(rows), ROWS_PER_SHARD):
        descriptor = os.open(folder / str(start), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, rows[start : start + ROWS_PER_SHARD].data)
        if durable:
            os.fdatasync(descriptor)
        os.close(descriptor)


def make_spec(rows: Rows, preset: str) -> ArraySpec:
    """Return the description of an array that holds the rows."""
    return ArraySpec(
        path="sites/resid_post/1",
        row_shape=rows.shape[1:],
        dtype="bfloat16",
        preset=preset,
        rows_per_shard=ROWS_PER_SHARD,
        rows_per_chunk=ROWS_PER_CHUNK,
    )


class BufferedRows:
    """The rows of `raw` shards in memory with the layout of their files, as in the host buffers of a capture."""

    def __init__(self) -> None:
        self._shards: list[ShardMemory] = []

    def fill(self, rows: Rows) -> None:
        """Copy `rows`."""
        spec = make_spec(rows, "raw")
        for start in range(0, len(rows), ROWS_PER_SHARD):
            memory = ShardMemory(spec, ROWS_PER_SHARD)
            for i, chunk in enumerate(memory.chunks):
                chunk[:] = rows[start + i * ROWS_PER_CHUNK :][:ROWS_PER_CHUNK]
            self._shards.append(memory)

    def write(self, rows: Rows, folder: Path) -> None:
        """Encode and write every shard from this memory."""
        spec = make_spec(rows, "raw")
        for shard, memory in enumerate(self._shards):
            write_file(shard_path(folder, spec, shard), ShardEncoder(memory, spec))


BUFFERED = BufferedRows()


def ours(rows: Rows, folder: Path, *, preset: str) -> None:
    """Encode and write every shard from a C-contiguous array."""
    spec = make_spec(rows, preset)
    for shard, start in enumerate(range(0, len(rows), ROWS_PER_SHARD)):
        write_file(shard_path(folder, spec, shard), ShardEncoder(rows[start : start + ROWS_PER_SHARD], spec))


def with_zarr(rows: Rows, folder: Path, *, config: dict[str, Any], **settings: Any) -> None:
    """Write through zarr-python, a shard at a time, with the same chunks and shards.

    The dtype is uint16: the bytes are the same, and zarrs cannot write bfloat16.
    """
    with zarr.config.set(config):
        array = zarr.create_array(
            str(folder),
            shape=rows.shape,
            dtype="uint16",
            chunks=(ROWS_PER_CHUNK, rows.shape[1]),
            shards=(ROWS_PER_SHARD, rows.shape[1]),
            fill_value=0,
            **settings,
        )
        for start in range(0, len(rows), ROWS_PER_SHARD):
            array[start : start + ROWS_PER_SHARD] = rows[start : start + ROWS_PER_SHARD]


def with_tensorstore(rows: Rows, folder: Path) -> None:
    """Write through tensorstore into an array with the metadata of our `raw` array."""
    spec = make_spec(rows, "raw")
    create_array(folder, spec, len(rows))
    store = {"driver": "file", "path": str(folder / spec.path)}
    array: Any = tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True).result()
    for start in range(0, len(rows), ROWS_PER_SHARD):
        values = rows[start : start + ROWS_PER_SHARD].view(array.dtype.numpy_dtype)
        array[start : start + ROWS_PER_SHARD].write(values).result()


RAW_ZARR: dict[str, Any] = {"compressors": ({"name": "crc32c"},)}
CASES: dict[str, Callable[[Rows, Path], None]] = {
    PLAIN: partial(plain, durable=False),
    DURABLE: partial(plain, durable=True),
    RAW: BUFFERED.write,
    "ours, raw, from an array": partial(ours, preset="raw"),
    FAST: partial(ours, preset="fast"),
    "ours, small": partial(ours, preset="small"),
    "tensorstore, raw with crc32c": with_tensorstore,
    "zarrs, raw with crc32c": partial(with_zarr, config=ZARRS, **RAW_ZARR),
    "zarr-python, raw with crc32c": partial(with_zarr, config={}, **RAW_ZARR),
    DEFAULT: partial(with_zarr, config={}),
    "zarr-python, zstd, write_empty_chunks": partial(with_zarr, config=EMPTY_CHUNKS),
}


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(timings: Timings, sizes: dict[str, int], n_bytes: int) -> str:
    """Return the table and the figures with a target."""
    lines = []
    for name, runs in timings.items():
        speed = spread([n_bytes / 1e6 / run.cpu for run in runs], 0)
        against = spread(speedups(timings[PLAIN], runs, clock="cpu"))
        wall = spread([n_bytes / 1e6 / run.wall for run in runs], 0)
        lines.append([name, speed, against, f"{n_bytes / sizes[name]:.3f}", wall])
    raw = spread(speedups(timings[PLAIN], timings[RAW], clock="cpu"))
    durable = spread(speedups(timings[DURABLE], timings[RAW], clock="cpu"))
    fast = spread(speedups(timings[DEFAULT], timings[FAST], clock="cpu"))
    return "\n".join(
        [
            f"{n_bytes / 2**20:.0f} MiB of values; median (least to greatest) of {len(timings[PLAIN])} rounds.",
            machine("numpy", "zarr", "tensorstore", "zarrs", "zstandard", "crc32c"),
            "",
            table(["case", "MB a CPU second", "of plain write()", "ratio", "MB a second"], lines),
            "",
            f"- `raw` against a plain write(): {raw}, target 0.8; against a durable one: {durable}.",
            f"- `fast` against zarr-python's default: {fast}, target 1.7, "
            f"at a ratio of {n_bytes / sizes[FAST]:.3f}, target 1.45.",
        ]
    )


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__ or "", rounds=7).parse_args()
    torch.set_num_threads(1)
    rows = trained_residuals()
    BUFFERED.fill(rows)
    folder = Path(tempfile.mkdtemp(prefix="residua-write-", dir=arguments.folder))
    sizes: dict[str, int] = {}

    def clear() -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    def run(name: str) -> Callable[[int], None]:
        return lambda _: CASES[name](rows, folder)

    try:
        for name in CASES:
            clear()
            CASES[name](rows, folder)
            sizes[name] = stored_bytes(folder)
        timings = in_turns({name: run(name) for name in CASES}, rounds=arguments.rounds, prepare=clear)
    finally:
        shutil.rmtree(folder)
    publish(report(timings, sizes, rows.nbytes), arguments.out)


if __name__ == "__main__":
    main()
