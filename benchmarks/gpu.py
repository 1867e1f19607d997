"""What capturing costs on a GPU: `python benchmarks/gpu.py`. It needs CUDA and 10 GiB of memory-backed storage.

The first table: a Llama of 1.3B parameters (random weights, bfloat16) runs 32 batches of 8 by 512 tokens. A capture
of every `resid_post` with codec `raw` writes to memory-backed storage (`/dev/shm`, or `--folder`), so that no disk
limits it. The plain forward pass of the same batches, without logits, and the capture take turns. Both end when the
device is idle; the capture also ends with its last commit. Making the plan and the empty archive is not timed. A line
of its own shows what a capture does before its first batch: mostly page-locking its host buffers.

The second table: the rate of copies to the host. Rows of one tensor on the device are copied as a capture copies them,
without a running model. A bare copy moves as many bytes into page-locked memory of torch, one batch and site at a
time.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from measure import in_turns, machine, parser, publish, speedups, spread, table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from residua.capture.buffers.host_buffers import ShardFiller
from residua.capture.buffers.row_index import ExampleRows, batch_rows
from residua.capture.forward.inputs import forward_kwargs
from residua.capture.recording.record import record
from residua.capture.scheduling.work_queue import WorkQueue
from residua.store.examples.index import Example
from residua.store.examples.schedule import Schedule
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import FilledShard, ShardWriter

MOST_COST, LEAST_RATE = 1.05, 0.8
EXAMPLES, POSITIONS = 8, 512
ROWS = EXAMPLES * POSITIONS  # rows of a batch, and of a shard
PLAIN, CAPTURE, STARTUP = "plain forward", "capture, from its first batch on", "before the first batch"
BUFFERED, BARE = "copied as in a capture", "bare copy"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model and of the run."""

    layers: int = 18
    width: int = 2048
    vocabulary: int = 32_000
    n_batches: int = 32

    def plan(self) -> Plan:
        """Return the plan of a capture of the residual stream after every block."""
        names = (f"resid_post.{layer}" for layer in range(self.layers))
        return Plan(
            model={},
            dataset={},
            rules={},
            sites=tuple(SitePlan(name=name, row_shape=(self.width,), dtype="bfloat16", codec="raw") for name in names),
            rows_per_shard=ROWS,
            batch_tokens=ROWS,
            n_rows=self.n_batches * ROWS,
        )

    def model(self, device: torch.device) -> LlamaForCausalLM:
        """Return a model with random weights."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            max_position_embeddings=POSITIONS,
        )
        with device:
            model = LlamaForCausalLM(config)
        nn.Module.to(model, torch.bfloat16)
        nn.Module.train(model, False)
        return model


class Nowhere:
    """A writer that waits for the copies of a shard and releases its memory without writing."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def submit(self, shard: FilledShard) -> None:
        """Release a shard in the background, once its copies are done."""
        self._pool.submit(self._drop, shard)

    def _drop(self, shard: FilledShard) -> None:
        shard.ready()
        shard.release()

    def raise_failure(self) -> None:
        """Do nothing: nothing is written."""

    def close(self) -> None:
        """Return when every copy is done."""
        self._pool.shutdown()


def make_archive(sizes: Sizes, out: Path) -> None:
    """Make the empty archive for a capture."""
    positions = np.arange(POSITIONS, dtype=np.int32)
    with workspace(out) as made:
        writer = ExampleWriter(made / "examples")
        for _ in range(sizes.n_batches * EXAMPLES):
            writer.add(Example(input_ids=positions % sizes.vocabulary, positions=positions))
        writer.close()
        create_archive(made, out, sizes.plan(), {})


def cost(sizes: Sizes, device: torch.device, folder: Path, rounds: int, threads: int) -> list[list[str]]:
    """Return the lines of the table for the forward pass with and without capture."""
    model, out = sizes.model(device), folder / "a.zarr"
    ids = torch.arange(POSITIONS, device=device).repeat(EXAMPLES, 1) % sizes.vocabulary

    def plain(_: int) -> None:
        with torch.inference_mode():
            for _batch in range(sizes.n_batches):
                kwargs = forward_kwargs(model, ids, torch.ones_like(ids), needs_logits=False)
                model(**kwargs)
        idle(device)

    startups: list[float] = []

    def captured(_: int) -> None:
        began = time.perf_counter()

        def work(schedule: Schedule) -> WorkQueue:
            startups.append(time.perf_counter() - began)
            return iter([range(schedule.n_shards)])

        record(model, out, sizes.plan(), work=work, threads=threads)
        idle(device)

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)
        make_archive(sizes, out)

    cases: dict[str, Callable[[int], None]] = {PLAIN: plain, CAPTURE: captured}
    in_turns(cases, rounds=1, prepare=clear)  # to warm up
    startups.clear()
    timings = in_turns(cases, rounds=rounds, prepare=clear)
    timings[CAPTURE] = [
        replace(run, wall=run.wall - startup) for run, startup in zip(timings[CAPTURE], startups, strict=True)
    ]
    lines = [
        [name, spread([run.wall for run in runs]), spread(speedups(runs, timings[PLAIN], clock="wall"), 3)]
        for name, runs in timings.items()
    ]
    return [*lines, [STARTUP, spread(startups), ""]]


def check_space(sizes: Sizes, folder: Path) -> None:
    """Stop if the archive does not fit: memory-backed storage is often small."""
    needed = sizes.n_batches * sizes.layers * ROWS * sizes.width * 2
    free = shutil.disk_usage(folder).free
    if free < needed * 11 // 10:
        raise SystemExit(
            f"{folder} has {free / 2**30:.1f} GiB free, but the archive takes {needed / 2**30:.1f} GiB: "
            "choose a larger place with --folder"
        )


def idle(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(sizes: Sizes, device: torch.device, rounds: int) -> list[list[str]]:
    """Return the lines of the table for copies to the host, in GiB a second."""
    pinned = device.type == "cuda"
    hidden = torch.randn(EXAMPLES, POSITIONS, sizes.width, device=device, dtype=torch.bfloat16)
    ring = [torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=pinned) for _ in range(2 * sizes.layers)]
    plan, writer = sizes.plan(), Nowhere()
    filler = ShardFiller(plan, cast("ShardWriter", writer), n_buffers=4, pinned=pinned)
    n_bytes = sizes.n_batches * sizes.layers * hidden.nbytes

    def buffered(_: int) -> None:
        for batch in range(sizes.n_batches):
            filler.begin(batch_rows(rows_of(batch), POSITIONS))
            for site in plan.sites:
                filler.put(site.name, hidden)
            filler.finish()
        idle(device)

    def bare(_: int) -> None:
        for copy in range(sizes.n_batches * sizes.layers):
            ring[copy % len(ring)].copy_(hidden, non_blocking=True)
        idle(device)

    cases: dict[str, Callable[[int], None]] = {BARE: bare, BUFFERED: buffered}
    in_turns(cases, rounds=1)  # to warm up
    timings = in_turns(cases, rounds=rounds)
    writer.close()
    return [
        [
            name,
            spread([n_bytes / 2**30 / run.wall for run in runs]),
            spread(speedups(timings[BARE], runs, clock="wall")),
        ]
        for name, runs in timings.items()
    ]


def rows_of(batch: int) -> list[ExampleRows]:
    """Return the rows of one batch, with every token kept."""
    at = np.arange(POSITIONS)
    return [
        ExampleRows(
            example=number,
            first_row=number * POSITIONS,
            input_ids=at.astype(np.int32),
            positions=at.astype(np.int32),
            padded=at.astype(np.int64),
        )
        for number in range(batch * EXAMPLES, (batch + 1) * EXAMPLES)
    ]


def report(sizes: Sizes, device: torch.device, folder: Path, rounds: int, threads: int) -> str:
    """Measure and return both tables."""
    started = time.perf_counter()
    costs, rates = cost(sizes, device, folder, rounds, threads), rate(sizes, device, rounds)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    head = f"{what}, {threads} writer threads, {rounds} rounds in turns, {time.perf_counter() - started:.0f} s in all."
    return "\n".join(
        [
            f"{head} {machine('torch', 'transformers')}",
            "",
            table([f"{sizes.n_batches * ROWS:,} tokens", "seconds", "of the plain forward"], costs),
            "",
            table(["to the host", "GiB a second", "of the bare copy"], rates),
            "",
            f"Targets: at most {MOST_COST} of the plain forward, at least {LEAST_RATE} of the bare copy.",
        ]
    )


def main() -> None:
    """Measure and print the tables."""
    options = parser(__doc__ or "", rounds=5)
    options.add_argument("--threads", type=int, default=8, help="writer threads")
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/gpu.py measures copies from a GPU, but torch finds none: run it on a machine with CUDA"
        )
    with tempfile.TemporaryDirectory(dir=chosen.folder or "/dev/shm") as folder:  # noqa: S108  # memory, on purpose
        check_space(Sizes(), Path(folder))
        text = report(Sizes(), torch.device("cuda", 0), Path(folder), chosen.rounds, chosen.threads)
    publish(text, chosen.out)


if __name__ == "__main__":
    main()
