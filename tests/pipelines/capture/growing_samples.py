"""Datasets of many short rows, captured while they are read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.capture.result import CaptureResult
from tests.models.tiny import VOCABULARY

HEIGHT = 256
PART_BYTES = 2000
"""Bytes of the first part of the examples, in place of `growing.FIRST_PART_BYTES`: the rows make several."""


def make_rows(n: int = 500, seed: int = 3) -> list[dict[str, Any]]:
    """Return short rows, more than are read ahead of the first example."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, n)
    lengths[::60] = 50
    ids = [rng.integers(3, VOCABULARY, length).tolist() for length in lengths]
    return [
        {"input_ids": one, "mask": [i % 2 == 1 for i in range(len(one))], "label": f"{n}"} for n, one in enumerate(ids)
    ]


def capture(model: PreTrainedModel, dataset: Any, out: Path | str, **options: Any) -> CaptureResult:
    settings = {"sites": "resid_post.1", "rows_per_shard": HEIGHT, "batch_tokens": HEIGHT, "grow": True, **options}
    return capture_dataset(model, dataset, out=out, **settings)


def write_long_labels(path: Path) -> Path:
    """Write rows whose labels make parts of few examples, as the parts of a real dataset are of many."""
    rng = np.random.default_rng(4)
    with path.open("w") as file:
        for i in range(24):
            ids = rng.integers(3, 1024, 1 + 7 * (i % 9)).tolist()
            file.write(json.dumps({"input_ids": ids, "label": f"{i}" * 2**18}) + "\n")
    return path
