"""Rows of models whose tensors or experts are split over ranks, alone and combined with data parallelism."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from tests.distributed.layouts import deepspeed_and_fairscale
from tests.distributed.layouts.case import Case, Row
from tests.distributed.layouts.registry import ROWS, all_of, layout, loaded, wanted
from tests.distributed.layouts.single_process import batch
from tests.distributed.layouts.tensor_parallel_llama import parallel_llama

FP32, FP64 = 2e-5, 5e-7


def tensor_parallel(layout: str, name: str, model: PreTrainedModel) -> Case:
    """A case in which all ranks share one replica and one batch."""
    owns = dist.get_rank() == 0
    bound = {torch.float32: FP32, torch.float64: FP64}[model.dtype]
    return Case(
        layout=layout,
        name=name,
        model=model,
        inputs=batch(0),
        expected=wanted(name, 0, model.dtype),
        owns=owns,
        bound=bound,
    )


@layout("fairscale model parallel 2")
def fairscale_parallel() -> Iterator[Row]:
    model, group = deepspeed_and_fairscale.fairscale_parallel()
    yield from all_of(replace(tensor_parallel("fairscale model parallel 2", "llama", model), group=group))


def transformers_tp() -> Iterator[Row]:
    size = dist.get_world_size()
    for name in ("llama", "qwen3", "mixtral"):
        yield from all_of(tensor_parallel(f"transformers TP {size}", name, loaded(name, tp_size=size)))
    for name in ("llama", "qwen3", "mixtral"):
        model = loaded(name, torch.float64, tp_size=size)
        yield from all_of(tensor_parallel(f"transformers TP {size}, float64", name, model))


ROWS["transformers TP 2"] = ROWS["transformers TP 4"] = transformers_tp


@layout("parallelize_module")
def parallelized() -> Iterator[Row]:
    yield from all_of(tensor_parallel("parallelize_module", "llama", parallel_llama(init_device_mesh("cpu", (2,)))))


@layout("parallelize_module, sequence parallel")
def sequence_parallel() -> Iterator[Row]:
    model = parallel_llama(init_device_mesh("cpu", (2,)), sequence=True)
    yield from all_of(tensor_parallel("parallelize_module, sequence parallel", "llama", model))


@layout("TP 2 x DP 2")
def tp_dp() -> Iterator[Row]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    seed, owns = mesh.get_local_rank("dp"), mesh.get_local_rank("tp") == 0
    case = Case(
        layout="TP 2 x DP 2",
        name="llama",
        model=parallel_llama(mesh["tp"]),
        inputs=batch(seed),
        expected=wanted("llama", seed),
        owns=owns,
        seed=seed,
        bound=FP32,
    )
    yield from all_of(case)
    yield from tp_times("TP 2 x DP 2", ("mixtral",), dp_replicate_size=2)


@layout("TP 2 x FSDP 2")
def tp_fsdp() -> Iterator[Row]:
    yield from tp_times("TP 2 x FSDP 2", ("llama", "mixtral"), fsdp_size=2)


def tp_times(layout: str, names: tuple[str, ...], **data_parallel: int) -> Iterator[Row]:
    for name in names:
        model = loaded(name, torch.float32, tp_size=2, **data_parallel)
        seed, tp_rank = divmod(dist.get_rank(), 2)
        case = Case(
            layout=layout,
            name=name,
            model=model,
            inputs=batch(seed),
            expected=wanted(name, seed),
            owns=tp_rank == 0,
            seed=seed,
            bound=FP32,
        )
        yield from all_of(case)


@layout("expert parallel 2")
def expert_parallel() -> Iterator[Row]:
    model = loaded("mixtral", tp_size=2, ep_size=2)
    yield from all_of(tensor_parallel("expert parallel 2", "mixtral", model))
