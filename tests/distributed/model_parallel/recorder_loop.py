"""A user's own loop with `Recorder`: on every rank that holds a model together, and in one process.

As a program, ``recorder_loop.py OUT`` records until one of its two ranks is killed in the middle of the loop.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from residua.capture.forward.inputs import forward_kwargs, padded_batch
from residua.capture.recording.recorder import Recorder
from residua.capture.runtime.wrappers import core_of
from residua.store.base.errors import CaptureError
from residua.store.read.archive import Archive
from tests.distributed.layouts.tensor_parallel_llama import parallel_llama
from tests.models.tiny import VOCABULARY

LENGTHS = ((5, 3, 21, 40), (2, 9, 33), (12, 30, 1, 7))
"""Of the examples of each call: the first reaches into four shards."""
SHARDS_OF_FIRST = 4
LONGEST = 40
KILLED_SITES = "resid_post.*,q.1"


def calls() -> Iterator[tuple[dict[str, list[object]], Tensor, Tensor, Tensor]]:
    """Columns, token ids, mask and kept positions of each call; the second is padded on the left."""
    generator = torch.Generator().manual_seed(4)
    for number, lengths in enumerate(LENGTHS):
        sequences = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
        batch = padded_batch(sequences, side="left" if number == 1 else "right")
        keep = torch.rand(batch.attention_mask.shape, generator=generator) < (1.0, 0.7, 0.3)[number]
        columns: dict[str, list[object]] = {"call": [number] * len(lengths), "length": [*lengths]}
        yield columns, batch.input_ids, batch.attention_mask, keep


def record(
    model: nn.Module, out: Path, sites: str, *, n_calls: int = len(LENGTHS), group: dist.ProcessGroup | None = None
) -> None:
    """Record the first `n_calls` calls."""
    options: dict[str, Any] = {"rows_per_shard": 16, "max_length": LONGEST, "tensor_parallel": group}
    with Recorder(model, sites=sites, out=out, **options) as recorder, torch.no_grad():
        for _, (columns, ids, mask, keep) in zip(range(n_calls), calls(), strict=False):
            recorder.annotate(columns=columns, keep=keep)
            model(**forward_kwargs(core_of(model), ids, mask))


def other_calls_are_refused(model: PreTrainedModel, out: Path) -> None:
    """Ranks that hold a model together and are called with different batches all say so, also after the first call."""
    _, ids, mask, keep = next(calls())
    with pytest.raises(CaptureError, match=f"was called on rank {dist.get_rank()} with another batch"):
        _record_two(model, out, forward_kwargs(model, ids, mask), keep if dist.get_rank() else ~keep)
    if dist.get_rank() == 0:  # which waits for what the others have written
        assert not Archive(out).is_sealed
        assert len(Archive(out).commits) == int(mask.sum()) // 16, "the full shards of the first call are there"


def parts_are_refused(model: PreTrainedModel, out: Path) -> None:
    """A model that was split by hand is not taken for one of several replicas."""
    words = rf"'mlp_act.1' on rank {dist.get_rank()} .*, 49\].*, 98\].*tensor_parallel="
    with pytest.raises(CaptureError, match=words):
        record(model, out, "mlp_act.1", n_calls=1)


def _record_two(model: nn.Module, out: Path, kwargs: dict[str, Any], keep: Tensor) -> None:
    with Recorder(model, sites="resid_post.1,q.0", out=out, rows_per_shard=16) as recorder, torch.no_grad():
        model(**kwargs)
        recorder.annotate(keep=keep)
        model(**kwargs)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    model = parallel_llama(init_device_mesh("cpu", (2,)))
    with Recorder(model, sites=KILLED_SITES, out=sys.argv[1], rows_per_shard=16) as recorder, torch.no_grad():
        for number in range(len(LENGTHS) + 1):
            if number == len(LENGTHS) and dist.get_rank() == 1:
                while len(list(Path(sys.argv[1]).glob("commits/*.json"))) < SHARDS_OF_FIRST:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            columns, ids, mask, keep = list(calls())[number % len(LENGTHS)]
            recorder.annotate(columns=columns, keep=keep)
            model(**forward_kwargs(model, ids, mask))


if __name__ == "__main__":
    main()
