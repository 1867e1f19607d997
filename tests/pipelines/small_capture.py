"""A capture of a few ragged examples in small shards and batches."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.capture.result import CaptureResult
from tests.models.tiny import VOCABULARY

HEIGHT = 16
BATCH_TOKENS = 48
LENGTHS = (5, 3, 21, 21, 2, 9, 40, 7, 7, 7, 1, 12, 30, 4)


def make_tokens() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]


def capture(model: PreTrainedModel, dataset: Any, out: Path | str, **options: Any) -> CaptureResult:
    settings = {"rows_per_shard": HEIGHT, "batch_tokens": BATCH_TOKENS, **options}
    return capture_dataset(model, dataset, out=out, **settings)


def embedding_of(model: PreTrainedModel) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight
