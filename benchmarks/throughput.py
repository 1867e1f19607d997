"""Two data-parallel workers compared with one: `python benchmarks/throughput.py`.

A Llama of 6M parameters (random weights) runs over ragged examples, and every `resid_post` is captured in bfloat16.
Each worker is a process with one torch thread and one encoder thread, which share the worker's core. Both processes
stay for all rounds. Four cases take turns in a round: one worker; two workers that share one capture; two independent
captures of half of the examples each, which is the best that the machine offers to two processes; and one worker with
both cores, so that its encoder thread runs in parallel with the forward pass.

Seconds run from the first batch to the last commit, for the worker that ends last; starting Python, importing torch,
loading the model, planning and sealing are not counted. CPU seconds are those of both processes, from the first batch
to the sealed archive, including the time in which they wait for each other. The difference to one worker is the cost of
sharing.
"""

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import machine, parser, publish, spread, table
from transformers import LlamaConfig, LlamaForCausalLM

from residua.pipelines.capture.capture import capture_dataset

VOCABULARY = 2048
TARGET = 1.7
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ONE, TWO, APART = "one worker", "two workers, a core each", "two captures, nothing shared, a core each"
BOTH_CORES = "one worker that has both cores"
Figures = dict[str, float]


def prepare(folder: Path, n_examples: int) -> None:
    """Write a model, a dataset, and the dataset's halves."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    chosen = random.Random(0)
    lines = [
        json.dumps({"input_ids": [chosen.randrange(3, VOCABULARY) for _ in range(chosen.randrange(16, 384))]}) + "\n"
        for _ in range(n_examples)
    ]
    for name, chosen_lines in {"all": lines, "even": lines[::2], "odd": lines[1::2]}.items():
        (folder / f"{name}.jsonl").write_text("".join(chosen_lines))


class Worker:
    """A process that captures on request; it runs `serve`."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder)],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, dataset: str, out: str, cores: Sequence[int], **launch: str) -> None:
        """Ask for a capture of a dataset on some cores, with the environment variables of a launcher."""
        assert self._process.stdin is not None
        asked = {"dataset": dataset, "out": out, "cores": cores, "launch": launch}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Figures:
        """Wait for the capture, and return its figures."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with exit code {self._process.wait()}: see its output above")
        figures: Figures = json.loads(line)
        return figures

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(folder: Path) -> None:
    """Capture what each line of standard input asks for, and print the figures."""
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    begun = [0.0]
    options: dict[str, Any] = {"sites": "resid_post.*", "dtype": "bfloat16", "batch_tokens": 512}
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.update({"WORLD_SIZE": "1", **asked["launch"]})
        for thread in Path("/proc/self/task").iterdir():  # threads that start later inherit the cores
            os.sched_setaffinity(int(thread.name), asked["cores"])
        result = capture_dataset(
            model,
            folder / f"{asked['dataset']}.jsonl",
            out=folder / asked["out"],
            rows_per_shard=1024,
            on_plan=lambda *_: begun.append(time.process_time()),
            **options,
        )
        stats = result.stats
        cpu = time.process_time() - begun[-1]
        print(json.dumps({"wall": stats.seconds, "cpu": cpu, "tokens": stats.n_tokens}), flush=True)


def capture(workers: list[Worker], folder: Path, case: str) -> Figures:
    """Run one case, and return the seconds of the slowest worker, and tokens and CPU seconds of all."""
    asked = workers[: 1 if case in {ONE, BOTH_CORES} else 2]
    cores = sorted(os.sched_getaffinity(0))[:2]
    if case == APART:
        for worker, half, core in zip(asked, ("even", "odd"), cores, strict=True):
            worker.ask(half, f"{half}.zarr", [core])
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            launch = {
                "WORLD_SIZE": str(len(asked)),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(free.getsockname()[1]),
            }
        for rank, worker in enumerate(asked):
            worker.ask("all", "all.zarr", cores if case == BOTH_CORES else [cores[rank]], **launch, RANK=str(rank))
    found = [worker.answer() for worker in asked]
    for out in folder.glob("*.zarr"):
        shutil.rmtree(out)
    tokens = [figures["tokens"] for figures in found]
    return {
        "wall": max(figures["wall"] for figures in found),
        "cpu": sum(figures["cpu"] for figures in found),
        "tokens": tokens[0] if case == TWO else sum(tokens),  # each of two workers reports the tokens of both
    }


def main() -> None:
    """Measure and print the table."""
    options = parser(__doc__ or "", rounds=3)
    options.add_argument("--examples", type=int, default=720, help="examples of the dataset")
    options.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.serve:
        serve(chosen.serve)
        return
    cases: dict[str, list[Figures]] = {case: [] for case in (ONE, TWO, APART, BOTH_CORES)}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        prepare(folder, chosen.examples)
        workers = [Worker(folder) for _ in range(2)]
        capture(workers, folder, APART)  # to warm up
        for _ in range(chosen.rounds):
            for case, figures in cases.items():
                figures.append(capture(workers, folder, case))
        for worker in workers:
            worker.close()
    publish(report(cases, chosen.rounds), chosen.out)


def report(cases: dict[str, list[Figures]], n_rounds: int) -> str:
    """Return the table; every ratio is taken within a round."""
    lines = [
        [case, *(spread([f[key] for f in found]) for key in ("wall", "cpu")), *_ratios(cases, found)]
        for case, found in cases.items()
    ]
    head = [
        "",
        "seconds",
        "CPU seconds",
        "times as fast as one",
        "as one with both cores",
        "CPU of one's",
        "tokens of one's",
    ]
    return (
        f"{table(head, lines)}\n\n{n_rounds} rounds in turns; target {TARGET} times as fast; "
        f"start-up left out. {machine('torch', 'transformers')}"
    )


def _ratios(cases: dict[str, list[Figures]], found: list[Figures]) -> list[str]:
    one, both = cases[ONE], cases[BOTH_CORES]
    return [
        spread([a["wall"] / b["wall"] for a, b in zip(one, found, strict=True)]),
        spread([a["wall"] / b["wall"] for a, b in zip(both, found, strict=True)]),
        spread([b["cpu"] / a["cpu"] for a, b in zip(one, found, strict=True)]),
        spread([b["tokens"] / a["tokens"] for a, b in zip(one, found, strict=True)]),
    ]


if __name__ == "__main__":
    main()
