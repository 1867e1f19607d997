"""What reading for analysis costs: `python benchmarks/analysis.py`.

The data are 512 MiB of trained bfloat16 residuals, with four tokens joined to one row of 512 values. They lie in an
archive (`raw` and `fast`) and in a plain file behind `np.memmap`. All of it is in the page cache, and everything runs
on one thread.

A Gram matrix X^T X in float32: numpy over the memory map, block by block, against `residua.analysis.array` on Dask's
synchronous scheduler. CPU seconds include reading, checking, converting, multiplying, and Dask itself.

Loading: batches of 4,096 rows in random order, as tensors. The memory map takes the rows of each batch from anywhere,
which is a full shuffle and the best case for a memory map; `archive.loader` shuffles blocks within its buffer of 64
MiB. All of it happens in this process; workers of a `DataLoader` would add the time that torch takes to move tensors.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measure import Timings, in_turns, machine, parser, publish, speedups, spread, table
from residuals import ROWS_PER_SHARD, SITE, residual_archive, trained_residuals

from residua.analysis.rows.dask_array import array
from residua.store.encoding.dtypes import to_float32
from residua.store.read.archive import Archive

WIDTH = 512
BATCH_ROWS = 4_096
BUFFER_BYTES = 64 * 2**20
SCALE = 4
MEMMAP = "np.memmap"
GRAM, LOAD = "Gram matrix", "shuffled batches"

Rows = npt.NDArray[np.uint16]


def gram_of_memmap(mapped: Rows, _: int) -> None:
    """Add the Gram matrices of the blocks of a memory map."""
    total = np.zeros((WIDTH, WIDTH), np.float32)
    for start in range(0, len(mapped), ROWS_PER_SHARD):
        block = to_float32(mapped[start : start + ROWS_PER_SHARD], "bfloat16")
        total += block.T @ block


def gram_of_array(archive: Archive, _: int) -> None:
    """Compute the Gram matrix of a Dask array, on this thread."""
    acts: Any = array(archive, SITE)
    (acts.T @ acts).compute(scheduler="synchronous")


def load_memmap(mapped: Rows, epoch: int) -> None:
    """Read batches of rows from anywhere, as tensors."""
    order = np.random.default_rng(epoch).permutation(len(mapped))
    for start in range(0, len(order), BATCH_ROWS):
        batch = np.asarray(mapped[order[start : start + BATCH_ROWS]])
        torch.from_numpy(batch.view(np.int16)).view(torch.bfloat16)


def load_archive(archive: Archive, epoch: int) -> None:
    """Read the batches of one epoch."""
    loader = archive.loader(SITE, batch_size=BATCH_ROWS, buffer_bytes=BUFFER_BYTES)
    loader.set_epoch(epoch)
    for _ in loader:
        pass


def measure(folder: Path, rows: Rows, rounds: int) -> dict[str, Timings]:
    """Return the timings of every job."""
    plain = folder / "plain"
    plain.write_bytes(rows.tobytes())
    mapped = np.memmap(plain, np.uint16, "r").reshape(rows.shape)
    archives = {preset: residual_archive(folder, rows, preset) for preset in ("raw", "fast")}
    jobs: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
        GRAM: (gram_of_memmap, gram_of_array),
        LOAD: (load_memmap, load_archive),
    }
    measured = {}
    for job, (base, ours) in jobs.items():
        cases = {MEMMAP: partial(base, mapped)}
        cases |= {preset: partial(ours, archive) for preset, archive in archives.items()}
        measured[job] = in_turns(cases, rounds=rounds + 1)
    return measured


TARGETS = {
    (GRAM, "raw"): "at most 1.3 (CPU)",
    (GRAM, "fast"): "at most 1.3 (CPU)",
    (LOAD, "raw"): "at least 0.5 (rate)",
}


def line(job: str, case: str, timings: Timings, n_rows: int) -> list[str]:
    """Return one line of the table, without the first round, which also checks every crc32c."""
    runs, base = timings[case][1:], timings[MEMMAP][1:]
    costs = [1 / speed for speed in speedups(base, runs, clock="cpu")]
    return [
        f"{job}, {case}",
        spread([run.cpu for run in runs]),
        spread([n_rows / run.wall / 1000 for run in runs], 0),
        spread(costs),
        spread(speedups(base, runs, clock="wall")),
        TARGETS.get((job, case), ""),
    ]


def report(measured: dict[str, Timings], rows: Rows) -> str:
    """Return the table."""
    lines = [line(job, case, timings, len(rows)) for job, timings in measured.items() for case in timings]
    head = ["job", "CPU s", "thousand rows/s", "CPU of np.memmap's", "rate of np.memmap's", "target"]
    return "\n".join(
        [
            f"{len(rows):,} rows, {rows.nbytes / 2**20:.0f} MiB; median (least to greatest) of rounds after the first.",
            machine("numpy", "dask", "torch"),
            "",
            table(head, lines),
        ]
    )


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__ or "", rounds=5).parse_args()
    torch.set_num_threads(1)
    rows = np.tile(trained_residuals().reshape(-1, WIDTH), (SCALE, 1))
    folder = Path(tempfile.mkdtemp(prefix="residua-analysis-", dir=arguments.folder))
    try:
        measured = measure(folder, rows, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    publish(report(measured, rows), arguments.out)


if __name__ == "__main__":
    main()
