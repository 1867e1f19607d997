"""How fast rows are read back: `python benchmarks/read.py`.

The same bfloat16 residuals lie in a plain file behind `np.memmap` and in our arrays, `raw` and `fast`, at 128 MiB
(1x) and at 1 GiB (8x). All of it is in the page cache. A scan reads blocks of 16,384 rows in order and adds the
columns in float32, the least that an analysis does; a second scan only copies. A random batch is 4,096 rows from
anywhere. A block-shuffled batch is the 4,096 rows of 8 chunks drawn at random, in random order, as training from a
shuffle buffer reads them. It is compared with a random batch of the memory map, which it replaces, and with the memory
map reading the same rows.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from measure import Timings, in_turns, machine, parser, publish, speedups, spread, table
from residuals import trained_residuals

from residua.store.encoding.dtypes import to_float32
from residua.store.encoding.shard import ShardEncoder, shard_path
from residua.store.encoding.spec import ArraySpec
from residua.store.read.rows_in_shards import ArrayReader
from residua.store.storage.files import write_file

ROWS_PER_SHARD = 32_768
ROWS_PER_CHUNK = 512
WIDTH = 512
BLOCK_ROWS = 16_384
BATCH_ROWS = 4_096
N_BATCHES = 32
MEMMAP = "np.memmap"
OTHER_ROWS = "np.memmap, rows from anywhere"
RANDOM, BLOCKS, SCAN, COPY = "random rows", "block-shuffled rows", "scan", "scan, copy only"
SCALES = (1, 8)

Rows = npt.NDArray[np.uint16]
Array = npt.NDArray[np.generic]
Indices = npt.NDArray[np.int64]


def make_specs() -> dict[str, ArraySpec]:
    """Return the measured arrays by preset."""
    return {
        preset: ArraySpec(
            path=f"sites/{preset}/1",
            row_shape=(WIDTH,),
            dtype="bfloat16",
            preset=preset,
            rows_per_shard=ROWS_PER_SHARD,
            rows_per_chunk=ROWS_PER_CHUNK,
        )
        for preset in ("raw", "fast")
    }


def write(folder: Path, rows: Rows, scale: int) -> int:
    """Write `rows` `scale` times as a plain file and as our arrays, and return the number of rows written."""
    shards = range(0, len(rows), ROWS_PER_SHARD)
    with (folder / "plain").open("wb") as plain:
        for _ in range(scale):
            plain.write(rows.data)
    for spec in make_specs().values():
        encoded = [list(ShardEncoder(rows[start : start + ROWS_PER_SHARD], spec)) for start in shards]
        for shard in range(scale * len(encoded)):
            write_file(shard_path(folder, spec, shard), encoded[shard % len(encoded)])
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()
    return scale * len(rows)


class Memmap:
    """The plain file, read as users of `np.memmap` read it."""

    def __init__(self, path: Path, n_rows: int) -> None:
        self._rows = np.memmap(path, np.uint16, "r").reshape(n_rows, WIDTH)

    def read(self, start: int, stop: int) -> Array:
        """Return a copy of rows `start` to `stop`."""
        return np.array(self._rows[start:stop])

    def take(self, rows: Indices) -> Array:
        """Return the given rows."""
        return np.asarray(self._rows[rows])


Store = Memmap | ArrayReader


def open_stores(folder: Path, n_rows: int) -> dict[str, Store]:
    """Return the measured stores by name."""
    ours: dict[str, Store] = {name: ArrayReader(folder, spec, n_rows) for name, spec in make_specs().items()}
    return {MEMMAP: Memmap(folder / "plain", n_rows), **ours}


def scan(n_rows: int, store: Store, _: int) -> None:
    """Add the columns in float32, block by block."""
    sums = np.zeros(WIDTH, np.float32)
    for start in range(0, n_rows, BLOCK_ROWS):
        sums += to_float32(store.read(start, min(start + BLOCK_ROWS, n_rows)), "bfloat16").sum(axis=0)


def copy(n_rows: int, store: Store, _: int) -> None:
    """Read all rows in order, without using them."""
    for start in range(0, n_rows, BLOCK_ROWS):
        store.read(start, min(start + BLOCK_ROWS, n_rows))


def take(batches: list[Indices], store: Store, number: int) -> None:
    """Read one batch."""
    store.take(batches[number % len(batches)])


def random_batches(n_rows: int) -> list[Indices]:
    """Return batches of rows from anywhere."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, n_rows, BATCH_ROWS) for _ in range(N_BATCHES)]


def block_batches(n_rows: int) -> list[Indices]:
    """Return batches of full chunks drawn at random, with their rows in random order."""
    rng = np.random.default_rng(1)
    n_chunks = BATCH_ROWS // ROWS_PER_CHUNK
    batches = []
    for _ in range(N_BATCHES):
        chunks = rng.choice(n_rows // ROWS_PER_CHUNK, n_chunks, replace=False)
        batches.append(rng.permutation((chunks[:, None] * ROWS_PER_CHUNK + np.arange(ROWS_PER_CHUNK)).ravel()))
    return batches


def measure(folder: Path, n_rows: int, rounds: int) -> dict[str, Timings]:
    """Return the timings of every job; each job opens the stores again, so its first round checks every crc32c."""
    anywhere, blocks = random_batches(n_rows), block_batches(n_rows)
    jobs: dict[str, tuple[Callable[[Store, int], None], int]] = {
        RANDOM: (partial(take, anywhere), 4 * N_BATCHES),
        BLOCKS: (partial(take, blocks), 4 * N_BATCHES),
        SCAN: (partial(scan, n_rows), rounds),
        COPY: (partial(copy, n_rows), rounds),
    }
    measured = {}
    for job, (work, n) in jobs.items():
        stores = open_stores(folder, n_rows)
        if job == RANDOM:  # each row would decode a full chunk: nobody reads compressed rows like this
            del stores["fast"]
        cases = {name: partial(work, store) for name, store in stores.items()}
        if job == BLOCKS:
            cases[OTHER_ROWS] = partial(take, anywhere, stores[MEMMAP])
        measured[job] = in_turns(cases, rounds=n)
    return measured


TARGETS = {
    (SCAN, "raw"): "at least 0.9",
    (SCAN, "fast"): "at least 0.5",
    (RANDOM, "raw"): "at least 0.33",
    (BLOCKS, "fast"): "at least 0.33",
}


def line(scale: int, job: str, case: str, timings: Timings) -> list[str]:
    """Return one line of the table; the first round, which also checks every crc32c, has its own column."""
    runs = timings[case][1:]
    base = timings[OTHER_ROWS if job == BLOCKS else MEMMAP][1:]
    return [
        f"{job}, {case}",
        f"{scale}x",
        f"{1000 * timings[case][0].wall:,.1f}",
        spread([1000 * run.wall for run in runs]),
        spread([1000 * run.cpu for run in runs]),
        spread(speedups(base, runs, clock="wall")),
        spread(speedups(timings[MEMMAP][1:], runs, clock="wall")),
        TARGETS.get((job, case), ""),
    ]


def report(measured: dict[int, dict[str, Timings]], n_bytes: int) -> str:
    """Return the table."""
    lines = [
        line(scale, job, case, measured[scale][job])
        for job in measured[SCALES[0]]
        for case in measured[SCALES[0]][job]
        for scale in SCALES
    ]
    head = ["job", "size", "first ms", "ms", "CPU ms", "speed of np.memmap", "on the same rows", "target"]
    return "\n".join(
        [
            f"1x is {n_bytes / 2**20:.0f} MiB, all of it in the page cache; median (least to greatest) of the rounds "
            "after the first.",
            machine("numpy", "zstandard", "crc32c"),
            "",
            table(head, lines),
        ]
    )


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__ or "", rounds=6).parse_args()
    torch.set_num_threads(1)
    # Four tokens are joined to one row, so that rows are as wide as those of real models.
    rows = trained_residuals().reshape(-1, WIDTH)
    measured = {}
    for scale in SCALES:
        folder = Path(tempfile.mkdtemp(prefix="residua-read-", dir=arguments.folder))
        try:
            n_rows = write(folder, rows, scale)
            measured[scale] = measure(folder, n_rows, arguments.rounds)
        finally:
            shutil.rmtree(folder)
    publish(report(measured, rows.nbytes), arguments.out)


if __name__ == "__main__":
    main()
