"""The registry of layouts that are tested, by name, and what the functions that make their rows share.

`data_parallel_rows`, `tensor_parallel_rows` and `pipeline_parallel_rows` register functions here; `layout_worker` runs
those of its launch.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from residua.pipelines.setup.models import stages_in_parallel
from tests.distributed.checks.capture import captured
from tests.distributed.checks.one_process import computed_once
from tests.distributed.checks.replay import bare, multiplying, replay_row
from tests.distributed.layouts.case import Case, Row
from tests.distributed.layouts.single_process import Expected, batch, expected
from tests.models.tiny import SPLIT

FOLDER = Path(sys.argv[1])
ROWS: dict[str, Callable[[], Iterator[Row]]] = {}
_expected: dict[str, Expected] = {}


def layout(name: str) -> Callable[[Callable[[], Iterator[Row]]], Callable[[], Iterator[Row]]]:
    def note(rows: Callable[[], Iterator[Row]]) -> Callable[[], Iterator[Row]]:
        ROWS[name] = rows
        return rows

    return note


def wanted(name: str, seed: int, dtype: torch.dtype = torch.float32) -> Expected:
    """What one process gives for a model and a batch."""
    key = f"{name} {seed} {dtype}"
    if key not in _expected:
        found = computed_once(f"sites {key}", lambda: vars(expected(bare(name, dtype), name, batch(seed))))
        _expected[key] = Expected(**found)
    return _expected[key]


def uncaptured(case: Case) -> Iterator[Row]:
    yield case.forward()
    yield case.gradients()
    yield case.edits()
    yield case.training()
    yield replay_row(case)


def all_of(case: Case) -> Iterator[Row]:
    yield from uncaptured(case)
    yield captured(case)


def loaded(name: str, dtype: torch.dtype = torch.float32, **config: int) -> PreTrainedModel:
    """Load what rank 0 saved, in the way users of transformers' own parallelism do."""
    sizes: dict[str, Any] = dict(config)
    path = FOLDER / name
    if dist.get_rank() == 0 and not path.exists():
        SPLIT[name]().save_pretrained(path)
    dist.barrier()
    with stages_in_parallel() if {"tp_size", "pp_size"} <= config.keys() else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**sizes), dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    nn.Module.train(model, False)
    return multiplying(model, dtype)
