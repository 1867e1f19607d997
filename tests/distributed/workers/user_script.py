"""A user's own distributed script: it makes the process group and the model, and calls the library.

    torchrun --nproc-per-node 2 -m tests.distributed.workers.user_script OUT

Writes `replicas.zarr`, `ddp.zarr`, `fsdp.zarr` and `zero3.zarr` into OUT, and on every rank a JSON file of the results.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import residua
from tests.distributed.layouts.deepspeed_and_fairscale import zero3
from tests.distributed.model_parallel.recorder_loop import record
from tests.models.tiny import TINY, VOCABULARY

LENGTHS = (5, 3, 21, 40, 2, 9, 7, 33, 1, 12, 30, 4) * 4


def tokens() -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def capture(model: Any, out: Path) -> residua.Archive:
    options: dict[str, Any] = {"sites": "resid_post.*,q.1,final", "rows_per_shard": 16, "batch_tokens": 48}
    result = residua.capture_dataset(model, tokens(), out=out, **options)
    said = {"rows": result.stats.committed_rows, "workers": [asdict(worker) for worker in result.workers]}
    rank = dist.get_rank() if dist.is_initialized() else 0
    out.with_suffix(f".{rank}.json").write_text(json.dumps(said))
    return result.archive


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if os.environ["RANK"] == "0":  # what one rank did alone does not keep it from meeting the others later
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "1"}):
            capture(TINY["llama"](), folder / "alone.zarr")
    dist.init_process_group("gloo")
    for name, model in (("replicas", TINY["llama"]()), ("ddp", DistributedDataParallel(TINY["llama"]()))):
        archive = capture(model, folder / f"{name}.zarr")
        assert archive.is_sealed, "nobody goes on before the archive is whole"
    assert capture(sharded(), folder / "fsdp.zarr").is_sealed
    assert capture(zero3(TINY["llama"]()), folder / "zero3.zarr").is_sealed
    recordings(folder)
    dist.destroy_process_group()


def recordings(folder: Path) -> None:
    """Record in loops of data-parallel replicas: each has an archive of its own, and none goes into another's."""
    rank = dist.get_rank()
    for name, model in (("ddp", DistributedDataParallel(TINY["llama"]())), ("fsdp", sharded())):
        record(model, folder / f"{name}.recorded.{rank}.zarr", "resid_post.*,q.1,final")
    said: list[str | None] = [None, None]
    refusal = None
    try:
        record(TINY["llama"](), folder / "contended.zarr", "embed")
    except (FileExistsError, BlockingIOError) as error:
        refusal = str(error)
    dist.all_gather_object(said, refusal)
    refused = [refusal for refusal in said if refusal is not None]
    assert len(refused) == 1, said
    assert "data-parallel replica" in refused[0]
    assert "contended.zarr" in refused[0]


def sharded() -> nn.Module:
    model = TINY["llama"]()
    for block in model.get_submodule("model.layers").children():
        fully_shard(block)
    fully_shard(model)
    return model


if __name__ == "__main__":
    main()
