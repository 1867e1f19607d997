"""What capturing costs: `python benchmarks/capture.py`.

The first table shows the overhead alone. A model whose forward pass costs nothing returns trained bfloat16 residuals
at eight sites of width 1,024, and every case keeps all of them, 8 GiB. Residua captures them as `residua capture`
does, from the batches of an example table to the last commit; making the plan and the empty archive is not timed. The
first comparison writes the same bytes from memory, without a model, hooks or host buffers. The others are what people
write by hand, which neither checks values nor makes them durable. Every run allocates new memory: for the 256 MiB of
host buffers this costs a capture about half a second, once, whatever its length.

The second table shows a real model (Llama, 59M parameters, random weights, float32): a capture of every `resid_post`
in bfloat16, compared with the plain forward pass of the same batches.

Speed is processor time, kernel included, on one torch thread and one encoder thread.
"""

import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from free_model import (
    BATCH_ROWS,
    EXAMPLES,
    PASSES,
    POSITIONS,
    SITES,
    WIDTH,
    FreeModel,
    with_memmap,
    with_safetensors,
    with_torch_save,
    with_zarr,
)
from measure import Timings, in_turns, machine, parser, publish, speedups, spread, table
from residuals import trained_residuals
from transformers import LlamaConfig, LlamaForCausalLM

import residua
from residua.capture.recording.record import record
from residua.store.encoding.shard import ShardEncoder, shard_path
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.read.archive import Archive
from residua.store.storage.files import write_file

ROWS_PER_SHARD = 8192
ROWS_PER_CHUNK = 256


def plan_of(codec: str, n_rows: int) -> Plan:
    """Return the plan of a capture of every block."""
    names = (f"module:blocks.{i}@output" for i in range(SITES))
    return Plan(
        model={},
        dataset={},
        rules={},
        sites=tuple(SitePlan(name=name, row_shape=(WIDTH,), dtype="bfloat16", codec=codec) for name in names),
        rows_per_shard=ROWS_PER_SHARD,
        batch_tokens=BATCH_ROWS,
        n_rows=n_rows,
    )


def make_archives(model: FreeModel, folder: Path) -> None:
    """Make one empty archive for each codec; the captures fill them."""
    n_examples = PASSES * len(model.batches) * EXAMPLES
    example = Example(input_ids=np.zeros(POSITIONS, np.int32), positions=np.arange(POSITIONS, dtype=np.int32))
    for codec in ("raw", "fast"):
        with workspace(folder / codec) as made:
            writer = ExampleWriter(made / "examples")
            for _ in range(n_examples):
                writer.add(example)
            writer.close()
            create_archive(made, folder / codec, plan_of(codec, n_examples * POSITIONS), {})


def with_residua(model: FreeModel, folder: Path, *, codec: str) -> None:
    """Capture every batch."""
    archive = Archive(folder / codec)
    record(model, archive.path, archive.plan)


def from_memory(model: FreeModel, folder: Path, *, preset: str, write: bool = True) -> None:
    """Encode the same bytes from memory as shards; write them unless `write` is false."""
    rows = model.batches.view(torch.int16).numpy().view(np.uint16).reshape(-1, WIDTH)
    for site in range(SITES):
        spec = ArraySpec(
            path=f"sites/resid_post/{site}",
            row_shape=(WIDTH,),
            dtype="bfloat16",
            preset=preset,
            rows_per_shard=ROWS_PER_SHARD,
            rows_per_chunk=ROWS_PER_CHUNK,
        )
        for shard in range(PASSES * len(rows) // ROWS_PER_SHARD):
            start = shard * ROWS_PER_SHARD % len(rows)
            encoded = ShardEncoder(rows[start : start + ROWS_PER_SHARD], spec)
            if write:
                write_file(shard_path(folder, spec, shard), encoded)
            else:
                deque(encoded, maxlen=0)


RAW, FAST = "Residua, raw", "Residua, fast"
RAW_BYTES, FAST_BYTES = "the same bytes from memory, raw", "the same bytes from memory, fast"
ENCODER = "the fast encoder alone, nothing written"
CASES: dict[str, Callable[[FreeModel, Path], None]] = {
    RAW_BYTES: partial(from_memory, preset="raw"),
    RAW: partial(with_residua, codec="raw"),
    FAST_BYTES: partial(from_memory, preset="fast"),
    FAST: partial(with_residua, codec="fast"),
    ENCODER: partial(from_memory, preset="fast", write=False),
    "hooks with torch.save": with_torch_save,
    "hooks with safetensors": with_safetensors,
    "hooks with np.memmap": with_memmap,
    "hooks with zarr-python, its defaults": with_zarr,
}


def size_of(folder: Path) -> int:
    """Return the bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def overhead(folder: Path, rounds: int) -> str:
    """Measure the free model, and return its report."""
    model = FreeModel(trained_residuals())
    n_bytes = SITES * PASSES * model.batches.nbytes
    sizes: dict[str, int] = {}

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make_archives(model, folder)

    def run(name: str) -> Callable[[int], None]:
        def case(_: int) -> None:
            before = size_of(folder)
            with torch.no_grad():
                CASES[name](model, folder)
            sizes[name] = size_of(folder) - before

        return case

    timings = in_turns({name: run(name) for name in CASES}, rounds=rounds, prepare=clear)
    clear()
    return overhead_report(timings, sizes, n_bytes)


def overhead_report(timings: Timings, sizes: dict[str, int], n_bytes: int) -> str:
    """Return the table of the free model and the figures with a target."""
    lines = []
    for name, runs in timings.items():
        cpu = spread([run.cpu * 2**30 / n_bytes for run in runs])
        ratio = f"{n_bytes / sizes[name]:.2f}" if sizes[name] else "-"
        lines.append([name, cpu, spread(speedups(runs, timings[RAW_BYTES], clock="cpu")), ratio])
    raw = spread(speedups(timings[RAW], timings[RAW_BYTES], clock="cpu"))
    fast = spread(speedups(timings[FAST], timings[FAST_BYTES], clock="cpu"))
    return "\n".join(
        [
            table(["case", "CPU seconds a GiB", "of the raw bytes from memory", "ratio on disk"], lines),
            "",
            f"- Capture with `raw` over writing the same bytes with `raw`: {raw}, target at most 1.3.",
            f"- Capture with `fast` over encoding and writing the same bytes with `fast`: {fast}, target at most 1.2.",
        ]
    )


def forward(folder: Path, rounds: int) -> str:
    """Measure a real model with and without capture, and return the table."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    tokens = torch.randint(0, 4096, (32, 256))
    batches = tokens.view(4, 8, 256)

    def plain(_: int) -> None:
        with torch.inference_mode():
            for batch in batches:
                model(input_ids=batch, use_cache=False)

    def captured(codec: str) -> Callable[[int], None]:
        def case(number: int) -> None:
            out = folder / f"{codec}-{number}.zarr"
            settings: dict[str, Any] = {"sites": "resid_post.*", "codec": codec, "dtype": "bfloat16"}
            with (
                residua.Recorder(model, out=out, rows_per_shard=2048, **settings),
                torch.inference_mode(),
            ):
                for batch in batches:
                    model(input_ids=batch, use_cache=False)

        return case

    captured("fast")(-1)  # so that host buffers and code pages are warm in the first round, too
    timings = in_turns(
        {"plain forward": plain, "capture, raw": captured("raw"), "capture, fast": captured("fast")}, rounds=rounds
    )
    lines = [
        [name, spread([run.cpu for run in runs]), spread(speedups(runs, timings["plain forward"], clock="cpu"), 3)]
        for name, runs in timings.items()
    ]
    return table(["8,192 tokens", "CPU seconds", "of the plain forward"], lines)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__ or "", rounds=3).parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="residua-capture-", dir=arguments.folder))
    try:
        first = overhead(folder, arguments.rounds)
        second = forward(folder, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    head = machine("torch", "transformers", "safetensors", "zarr", "numpy")
    publish("\n".join([head, "", first, "", second]), arguments.out)


if __name__ == "__main__":
    main()
