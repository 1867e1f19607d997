"""Two data-parallel workers against one: `python benchmarks/throughput.py`.

A Llama of 14M parameters (random weights) over ragged examples, every `resid_post` in bfloat16. Each worker is a
process of its own with one torch thread and one encoder thread. Whole processes run, by the command line; what is
compared is the time that the capture itself took, from the first batch to the last commit of the slowest worker, as
the run reports it. Starting Python, importing torch, loading the model and planning are left out.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import machine, parser, publish, spread, table
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 2048
TARGET = 1.7


def prepare(folder: Path, n_examples: int) -> list[str]:
    """Write a model and a dataset; return the command line that captures them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    chosen = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(n_examples):
            ids = [chosen.randrange(3, VOCABULARY) for _ in range(chosen.randrange(16, 384))]
            file.write(json.dumps({"input_ids": ids}) + "\n")
    words = ["-m", "residua", "capture", "--model", str(folder / "model"), "--dataset", str(folder / "data.jsonl")]
    return [*words, "--dtype", "bfloat16", "--batch-tokens", "1024", "--rows-per-shard", "1024", "--json"]


def run(words: list[str], out: Path, n_workers: int) -> dict[str, Any]:
    """Capture with `n_workers` processes; return the report of the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(n_workers)}
    processes = [
        subprocess.Popen(
            [sys.executable, *words, "--out", str(out)],
            env={**common, **launch, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(n_workers)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a worker failed: {said}")
    report: dict[str, Any] = json.loads(said[0])
    shutil.rmtree(out)
    return report


def main() -> None:
    """Measure and print the table."""
    options = parser(__doc__ or "", rounds=5)
    options.add_argument("--examples", type=int, default=400, help="examples of the dataset")
    chosen = options.parse_args()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    tokens: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        words = prepare(Path(folder), chosen.examples)
        for _ in range(chosen.rounds):
            for n_workers in seconds:
                figures = run(words, Path(folder) / "a.zarr", n_workers)
                n_tokens = figures["dataset"]["n_tokens"]
                seconds[n_workers].append(figures["run"]["seconds"])
                tokens[n_workers].append(n_tokens / figures["run"]["seconds"])
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    lines = [
        ["one worker", spread(seconds[1]), spread(tokens[1], 0), ""],
        ["two workers", spread(seconds[2]), spread(tokens[2], 0), spread(ratios)],
    ]
    text = table(["", "seconds", "tokens a second", "times as fast as one"], lines)
    said = f"{chosen.rounds} rounds in turns; target {TARGET}; start-up left out."
    publish(f"{text}\n\n{said} {machine('torch', 'transformers')}", chosen.out)


if __name__ == "__main__":
    main()
