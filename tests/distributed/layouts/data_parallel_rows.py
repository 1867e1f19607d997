"""Rows of one process, and of data-parallel replicas: every rank has its own batch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.checks.capture import captured
from tests.distributed.checks.replay import replay_row
from tests.distributed.layouts import deepspeed_and_fairscale
from tests.distributed.layouts.case import Case, Row
from tests.distributed.layouts.registry import FOLDER, all_of, layout, uncaptured, wanted
from tests.distributed.layouts.single_process import batch
from tests.models.tiny import SPLIT


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
        seed=seed,
        **options,
    )


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
        yield from all_of(data_parallel("device_map, cpu and disk offload", name, spread))


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
        yield from uncaptured(data_parallel("FSDP1", name, spread))  # a capture refuses it, with what to do instead


@layout("FSDP2")
def fsdp2() -> Iterator[Row]:
    for name in ("llama", "gpt2"):
        yield from all_of(data_parallel("FSDP2", name, sharded(SPLIT[name]())))


@layout("FSDP2, mixed precision")
def fsdp2_mixed() -> Iterator[Row]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name in ("llama", "gpt2"):
        model = sharded(SPLIT[name](), mp_policy=policy)
        yield from all_of(data_parallel("FSDP2, mixed precision", name, model, dtype=torch.bfloat16))


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
        yield from all_of(data_parallel("Accelerate prepare", name, model))


@layout("DeepSpeed ZeRO-3")
def zero3() -> Iterator[Row]:
    for name in ("llama", "gpt2"):
        case = data_parallel("DeepSpeed ZeRO-3", name, deepspeed_and_fairscale.zero3(SPLIT[name]()))
        yield case.forward()
        yield case.edits()
        yield replay_row(case)
        yield captured(case)
        case = replace(case, bound=2e-6)  # it adds gradients up in an order of its own
        yield case.gradients()
        yield case.training()


@layout("fairscale FSDP")
def fairscale_fsdp() -> Iterator[Row]:
    yield deepspeed_and_fairscale.fairscale_fsdp("fairscale FSDP", "llama", batch(0))
