"""A small dataset of token ids in a file, with examples of very different lengths, and the command that captures it."""

import json
import random
from pathlib import Path

MODEL = Path(__file__).parent.parent / "models" / "pydoc-1m"
VOCABULARY = 1024
ROWS_PER_SHARD = 32
LENGTHS = (1, 3, 5, 20, 31, 32, 33, 80, 150)
"""Lengths of examples, from one token to more than four shards."""


def write_dataset(path: Path, n_examples: int, *, seed: int = 0) -> Path:
    """Write `n_examples` examples as JSON lines to `path`, each with a column ``label``, and return the path."""
    chosen = random.Random(seed)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(n_examples)]
    chosen.shuffle(lengths)
    with path.open("w") as file:
        for i, length in enumerate(lengths):
            ids = [chosen.randrange(3, VOCABULARY) for _ in range(length)]
            file.write(json.dumps({"input_ids": ids, "label": f"example {i}"}) + "\n")
    return path


def capture_words(dataset: Path, out: Path | str, *more: str) -> list[str]:
    """Return the command line that captures `dataset` into `out`, in small shards and small batches."""
    job = ["capture", "--model", str(MODEL), "--dataset", str(dataset), "--out", str(out)]
    return [*job, "--rows-per-shard", str(ROWS_PER_SHARD), "--batch-tokens", "160", *more]
