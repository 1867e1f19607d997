"""Shared by the tests of replay: a small archive of a tiny model with known batches, and its stored rows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.forward.inputs import forward_kwargs
from residua.capture.forward.plan_batch import plan_batch
from residua.store.read.archive import Archive
from tests.models.tiny import _GROUPED, ODD, TINY, VOCABULARY, _build

torch.set_num_threads(1)

LENGTHS = (12, 12, 7, 11, 3)
BATCH_TOKENS = 24
EVEN, PADDED, LAST = [0, 1], [3, 2], [4]
"""The batches of the plan; the second has padding."""


def _gemma4() -> PreTrainedModel:
    """Build a model with extra inputs for each layer and a last block that uses the keys of an earlier one."""
    options: dict[str, Any] = {
        "head_dim": 12,
        "global_head_dim": 12,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 1,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }
    return _build(hf.Gemma4ForCausalLM, hf.Gemma4TextConfig(**_GROUPED, **options))


MODELS = {**TINY, **ODD, "gemma4": _gemma4}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = MODELS[name]()
    nn.Module.to(model, dtype)  # the model's own ``to`` has no usable annotation
    return model


def tokens() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]


def captured(model: PreTrainedModel, out: Path, **options: Any) -> Archive:
    rows = [{"input_ids": ids, "label": "ab"[i % 2]} for i, ids in enumerate(tokens())]
    settings: dict[str, Any] = {
        "sites": "resid_post.*,resid_pre.2,z.1,final,logits",
        "rows_per_shard": 64,
        "batch_tokens": BATCH_TOKENS,
        "codec": "raw",
        **options,
    }
    return residua.capture_dataset(model, rows, out=out, **settings).archive


def stored(archive: Archive, site: str, example: int) -> Tensor:
    return archive[site].torch(slice(*archive.example_table.rows(example)))


def run_in_full(model: PreTrainedModel, archive: Archive, examples: list[int]) -> tuple[Tensor, Tensor]:
    """Return the logits of the full model for a batch of the plan, and which positions are tokens."""
    batch = plan_batch(archive.example_table, examples, side="right", device=torch.device("cpu")).padded
    with torch.no_grad():
        logits = model(**forward_kwargs(model, batch.input_ids, batch.attention_mask)).logits
    assert isinstance(logits, Tensor)
    return logits, batch.attention_mask.bool()
