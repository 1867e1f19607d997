"""What one rank does in a launch of several: build each layout, compare it with one process, write rows as JSON.

Run by `test_layouts.py` under torchrun: ``worker.py FOLDER LAUNCH``; rank 0 writes ``FOLDER/LAUNCH.json``.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.distributed import others, prehooks
from tests.distributed.checks import Case, Row
from tests.distributed.expected import Expected, batch, expected
from tests.distributed.launches import LAUNCHES
from tests.distributed.pipelines import PipelineCase
from tests.distributed.plans import parallel_llama
from tests.distributed.refusals import CHECKS, Load
from tests.models import SPLIT

FOLDER = Path(sys.argv[1])
FP32, FP64 = 2e-5, 5e-7
ROWS: dict[str, Callable[[], Iterator[Row]]] = {}
_expected: dict[tuple[str, int, str], Expected] = {}


def layout(name: str) -> Callable[[Callable[[], Iterator[Row]]], Callable[[], Iterator[Row]]]:
    def note(rows: Callable[[], Iterator[Row]]) -> Callable[[], Iterator[Row]]:
        ROWS[name] = rows
        return rows

    return note


def wanted(name: str, seed: int, dtype: torch.dtype = torch.float32) -> Expected:
    """What one process gives; computed once a launch, model and batch."""
    key = (name, seed, str(dtype))
    if key not in _expected:
        _expected[key] = expected(cast(SPLIT[name](), dtype), name, batch(seed))
    return _expected[key]


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the parameters alone: rotary frequencies stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def data_parallel(layout: str, name: str, model: nn.Module, **options: Any) -> Case:
    """A case in which every rank is a replica with a batch of its own."""
    seed = dist.get_rank()
    dtype = options.pop("dtype", torch.float32)
    return Case(
        layout=layout,
        name=name,
        model=model,
        inputs=batch(seed),
        expected=wanted(name, seed, dtype),
        owns=True,
        **options,
    )


def all_of(case: Case) -> Iterator[Row]:
    yield case.forward()
    yield case.gradients()
    yield case.edits()
    yield case.training()


@layout("single")
def single() -> Iterator[Row]:
    for name in SPLIT:
        yield from all_of(data_parallel("single", name, SPLIT[name]()))


@layout("device_map, cpu and disk offload")
def offloaded() -> Iterator[Row]:
    from accelerate import dispatch_model  # type: ignore[import-untyped]  # it ships no types

    for name in SPLIT:
        model = SPLIT[name]()
        base = model.base_model_prefix
        blocks = {f"{base}.{path}": module for path, module in model.base_model.named_children()}
        where: dict[str, Any] = dict.fromkeys([*blocks, "lm_head"], "cpu")
        inner = next(path for path, module in blocks.items() if isinstance(module, nn.ModuleList))
        del where[inner]
        where |= {f"{inner}.{index}": place for index, place in enumerate(("cpu", "disk", "disk"))}
        spread = dispatch_model(
            model, where, main_device=torch.device("cpu"), offload_dir=str(FOLDER / f"offload-{name}"), force_hooks=True
        )
        case = data_parallel("device_map, cpu and disk offload", name, spread)
        yield case.forward()
        yield case.edits()


@layout("DDP")
def ddp() -> Iterator[Row]:
    for name in ("llama", "gpt2"):
        yield from all_of(
            data_parallel("DDP", name, DistributedDataParallel(SPLIT[name](), find_unused_parameters=True))
        )


@layout("FSDP1")
def fsdp1() -> Iterator[Row]:
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    for name in ("llama", "gpt2"):
        model = SPLIT[name]()
        policy = ModuleWrapPolicy({type(block) for block in blocks_of(model)})
        spread = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
        yield from all_of(data_parallel("FSDP1", name, spread))


@layout("FSDP2")
def fsdp2() -> Iterator[Row]:
    for name in ("llama", "gpt2"):
        yield from all_of(data_parallel("FSDP2", name, sharded(SPLIT[name]())))


@layout("FSDP2, mixed precision")
def fsdp2_mixed() -> Iterator[Row]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name in ("llama", "gpt2"):
        model = sharded(SPLIT[name](), mp_policy=policy)
        case = data_parallel("FSDP2, mixed precision", name, model, dtype=torch.bfloat16)
        yield case.forward()
        yield case.edits()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList))


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


@layout("Accelerate prepare")
def accelerated() -> Iterator[Row]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for name in ("llama", "gpt2"):
        model = accelerator.prepare(SPLIT[name]())
        case = data_parallel("Accelerate prepare", name, model)
        yield case.forward()
        yield case.edits()


@layout("DeepSpeed ZeRO-3")
def zero3() -> Iterator[Row]:
    for name in ("llama", "gpt2"):
        case = data_parallel("DeepSpeed ZeRO-3", name, others.zero3(SPLIT[name]()))
        yield case.forward()
        yield case.edits()
        case = replace(case, bound=2e-6)  # it adds gradients up in an order of its own
        yield case.gradients()
        yield case.training()


@layout("fairscale FSDP")
def fairscale_fsdp() -> Iterator[Row]:
    yield others.fairscale_fsdp("fairscale FSDP", "llama", batch(0))


def loaded(name: str, dtype: torch.dtype = torch.float32, **config: int) -> PreTrainedModel:
    """Load what rank 0 saved, in the way users of transformers' own parallelism do."""
    sizes: dict[str, Any] = dict(config)
    path = FOLDER / name
    if dist.get_rank() == 0 and not path.exists():
        SPLIT[name]().save_pretrained(path)
    dist.barrier()
    with mock.patch("transformers.distributed.mixin.apply_tensor_parallelism", split_what_is_here):
        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**sizes), dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    nn.Module.train(model, False)
    return model


def split_what_is_here(model: nn.Module, mesh: DeviceMesh, plan: dict[str, str]) -> nn.Module:
    """Leave out of the plan what another stage of a pipeline has: transformers 5.23 ends in a KeyError over it."""
    here = {name for name, module in model.named_modules() if type(module).__name__ != "PipelineIdentityLayer"}
    here |= {name for name, _ in model.named_parameters()}
    apply_tensor_parallelism(model, mesh, {name: style for name, style in plan.items() if name in here})
    return model


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
    model, group = others.fairscale_parallel()
    yield from all_of(replace(tensor_parallel("fairscale model parallel 2", "llama", model), group=group))


def transformers_tp() -> Iterator[Row]:
    size = dist.get_world_size()
    for name in ("llama", "qwen3", "mixtral"):
        yield from all_of(tensor_parallel(f"transformers TP {size}", name, loaded(name, tp_size=size)))
    for name in ("llama", "qwen3"):
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
            bound=FP32,
        )
        yield from all_of(case)


@layout("expert parallel 2")
def expert_parallel() -> Iterator[Row]:
    model = loaded("mixtral", tp_size=2, ep_size=2)
    yield from all_of(tensor_parallel("expert parallel 2", "mixtral", model))


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
        yield case.forward()
        yield case.edits()


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
    yield case.forward()
    yield case.edits()


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


def refused(check: Callable[[Load], None]) -> Callable[[], Iterator[Row]]:
    def load(name: str = "llama", **config: int) -> PreTrainedModel:
        return loaded(name, torch.float32, **(config or {"tp_size": 2}))

    def rows() -> Iterator[Row]:
        check(load)
        yield from ()

    return rows


ROWS |= {check.__name__: refused(check) for check in (*CHECKS, *prehooks.CHECKS)}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, dict[str, Any]] = {}
    for name in LAUNCHES[sys.argv[2]][1]:
        if len(sys.argv) > 3 and name not in sys.argv[3:]:
            continue
        try:
            found[name] = {"rows": [row.as_dict() for row in ROWS[name]()]}
        except Exception:  # noqa: BLE001  # the boundary to one layout: the others are tried all the same
            found[name] = {"failure": f"rank {dist.get_rank()}: {traceback.format_exc()}"}
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]  # an engine that lingers would ask for ZeRO-3
        everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, found[name])
        found[name] = next((result for result in everyone if "failure" in result), found[name])
    if dist.get_rank() == 0:
        (FOLDER / f"{sys.argv[2]}.json").write_text(json.dumps(found, indent=1))
    gc.collect()  # models that hold on to the group go first
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
