"""How fast an autoencoder trains from an archive: `python benchmarks/trainers.py`.

An autoencoder with 16 times 512 latents (ReLU, L1 penalty, Adam) trains for one epoch on trained bfloat16 residuals,
with four tokens joined to one row of 512 values. The base has all rows in memory, as one float32 tensor that is scaled
already, and takes batches of it by a random permutation. The others read the archive (`raw` and `fast`) through
`archive.loader`, which decodes, shuffles, casts to float32 and scales (`normalise="mean_norm"`); its buffer holds all
rows, so that each epoch begins with reading them. Everything runs in this process, on one thread.
"""

import shutil
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from measure import Timings, in_turns, machine, parser, publish, speedups, spread, table
from residuals import SITE, residual_archive, trained_residuals
from torch import Tensor, nn

from residua.analysis.loader.loader import Loader

WIDTH, EXPANSION, BATCH_ROWS = 512, 16, 1_024
IN_MEMORY = "a tensor in memory"
TARGET = 0.8


def train(batches: Iterable[Tensor]) -> None:
    """Train a new autoencoder on all batches."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(WIDTH, EXPANSION * WIDTH), nn.Linear(EXPANSION * WIDTH, WIDTH)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-4)
    for rows in batches:
        latents = torch.relu(encoder(rows))
        loss = (decoder(latents) - rows).pow(2).mean() + 1e-3 * latents.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def from_memory(rows: Tensor, epoch: int) -> None:
    """Train on a tensor."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
    train(rows[order[start : start + BATCH_ROWS]] for start in range(0, len(rows), BATCH_ROWS))


def from_archive(loader: Loader, epoch: int) -> None:
    """Train on an archive."""
    loader.set_epoch(epoch)
    train(batch[SITE] for batch in loader)


def measure(folder: Path, rows: npt.NDArray[np.uint16], rounds: int) -> Timings:
    """Return the timings of every case."""
    cases = {}
    for preset in ("raw", "fast"):
        archive = residual_archive(folder, rows, preset)
        loader = archive.loader(SITE, batch_size=BATCH_ROWS, normalise="mean_norm", dtype=torch.float32)
        cases[preset] = partial(from_archive, loader)
        scaled = loader.normalisation[SITE].apply(archive[SITE].torch())
    return in_turns({IN_MEMORY: partial(from_memory, scaled), **cases}, rounds=rounds + 1)


def report(timings: Timings, n_rows: int) -> str:
    """Return the table, without the first round, which also checks every crc32c."""
    base, lines = timings[IN_MEMORY][1:], []
    for case, all_runs in timings.items():
        runs = all_runs[1:]
        lines.append(
            [
                case,
                spread([n_rows / run.wall for run in runs], 0),
                spread([n_rows / run.cpu for run in runs], 0),
                spread(speedups(base, runs, clock="wall")),
                spread(speedups(base, runs, clock="cpu")),
                "" if case == IN_MEMORY else f"at least {TARGET}",
            ]
        )
    head = ["rows from", "rows/s", "rows a CPU second", "speed of the tensor's", "by CPU", "target"]
    return "\n".join(
        [
            f"{n_rows:,} rows of {WIDTH} values, batches of {BATCH_ROWS:,}, {EXPANSION * WIDTH:,} latents; median "
            "(least to greatest) of rounds after the first.",
            machine("numpy", "torch"),
            "",
            table(head, lines),
        ]
    )


def main() -> None:
    """Measure and report."""
    made = parser(__doc__ or "", rounds=5)
    made.add_argument("--rows", type=int, default=16 * BATCH_ROWS, help="rows of the archive")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    rows = trained_residuals().reshape(-1, WIDTH)
    rows = np.tile(rows, (-(-arguments.rows // len(rows)), 1))[: arguments.rows]
    folder = Path(tempfile.mkdtemp(prefix="residua-trainers-", dir=arguments.folder))
    try:
        timings = measure(folder, rows, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    publish(report(timings, len(rows)), arguments.out)


if __name__ == "__main__":
    main()
