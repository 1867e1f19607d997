"""The data of the storage benchmarks: bfloat16 residuals of the trained model that ships with Residua.

The residuals of four blocks, one after the other, fill four shards of 32 MiB. Random numbers would compress
differently from trained values.
"""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive

MODEL = Path(__file__).parent.parent / "models" / "pydoc-1m"
LAYERS = (1, 2, 3, 4)
N_TOKENS = 131_072
ROWS_PER_SHARD = 32_768
SITE = "resid_post.0"
_LENGTH = 256
_BATCH = 64


def trained_residuals(n_tokens: int = N_TOKENS) -> npt.NDArray[np.uint16]:
    """Return residuals over Python's own documentation, (4 x tokens, width), one block after the other.

    Values are the bits of bfloat16, in uint16.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL)
    model.eval()
    tokens = tokenizer("\n\n".join(topics.values()), verbose=False)["input_ids"][:n_tokens]
    examples = torch.tensor(tokens).view(-1, _LENGTH)
    rows: list[list[npt.NDArray[np.int16]]] = [[] for _ in LAYERS]
    with torch.inference_mode():
        for start in range(0, len(examples), _BATCH):
            states = model.model(examples[start : start + _BATCH], output_hidden_states=True).hidden_states
            for block, layer in zip(rows, LAYERS, strict=True):
                block.append(states[layer].flatten(0, 1).to(torch.bfloat16).view(torch.int16).numpy())
    return np.concatenate([batch for block in rows for batch in block]).view(np.uint16)


def residual_archive(folder: Path, rows: npt.NDArray[np.uint16], preset: str) -> Archive:
    """Write `rows` as an archive with one site, in the folder `preset`."""
    site = SitePlan(name=SITE, row_shape=rows.shape[1:], dtype="bfloat16", codec=preset)
    plan = Plan(model={}, dataset={}, rules={}, sites=(site,), rows_per_shard=ROWS_PER_SHARD, n_rows=len(rows))
    path = folder / preset
    example = Example(input_ids=np.zeros(_LENGTH, np.int32), positions=np.arange(_LENGTH, dtype=np.int32))
    with workspace(path) as made:
        examples = ExampleWriter(made / "examples")
        for _ in range(len(rows) // _LENGTH):
            examples.add(example)
        examples.close()
        create_archive(made, path, plan, {})
    with ShardWriter(path, plan) as writer:
        for shard, first in enumerate(range(0, len(rows), ROWS_PER_SHARD)):
            block = rows[first : first + ROWS_PER_SHARD]
            numbers = np.arange(len(block), dtype=np.int32)
            columns: dict[str, npt.NDArray[np.generic]] = {
                "token": numbers,
                "position": numbers,
                "example": np.zeros(len(block), np.int64),
            }
            writer.submit(FilledShard(index=shard, first_row=first, sites={SITE: block}, columns=columns))
    return Archive(path, threads=1)
