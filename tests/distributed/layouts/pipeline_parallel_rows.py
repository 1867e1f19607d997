"""Rows of pipelines, alone and combined with tensor parallelism."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.layouts.case import Case, Row
from tests.distributed.layouts.registry import all_of, layout, loaded, wanted
from tests.distributed.layouts.single_process import batch
from tests.distributed.layouts.torch_pipeline import PipelineCase


@layout("transformers PP 2")
def transformers_pp() -> Iterator[Row]:
    for name in ("llama", "qwen3", "mixtral"):
        model = loaded(name, pp_size=2)
        case = Case(
            layout="transformers PP 2",
            name=name,
            model=model,
            inputs=batch(0),
            expected=wanted(name, 0),
            owns=True,
            bound=1e-5,
            staged=True,
        )
        yield from all_of(case)


@layout("transformers PP 2 x TP 2")
def transformers_pp_tp() -> Iterator[Row]:
    case = Case(
        layout="transformers PP 2 x TP 2",
        name="llama",
        model=loaded("llama", pp_size=2, tp_size=2),
        inputs=batch(0),
        expected=wanted("llama", 0),
        owns=dist.get_rank() % 2 == 0,
        bound=1e-5,
        staged=True,
    )
    yield from all_of(case)


@layout("torch PipelineStage, 2 stages")
def torch_pp() -> Iterator[Row]:
    for name in ("llama", "qwen3", "mixtral"):
        for n_microbatches in (2, 4):
            case = PipelineCase(
                layout=f"torch PipelineStage, 2 stages, {n_microbatches} microbatches",
                name=name,
                model=nn.Identity(),
                inputs=batch(0),
                expected=wanted(name, 0),
                owns=True,
                bound=1e-5,
                staged=True,
            )
            yield from case.rows(n_microbatches)


@layout("torch PP 2 x TP 2")
def pp_tp() -> Iterator[Row]:
    case = PipelineCase(
        layout="torch PP 2 x TP 2, 2 microbatches",
        name="llama",
        model=nn.Identity(),
        inputs=batch(0),
        expected=wanted("llama", 0),
        owns=True,
        bound=1e-5,
        staged=True,
    )
    yield from case.rows(2, init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp")))
