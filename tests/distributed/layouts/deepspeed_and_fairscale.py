"""Models distributed by other libraries than torch and transformers: DeepSpeed and fairscale."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from tests.distributed.layouts.case import Row
from tests.models.tiny import SPLIT


def zero3(model: nn.Module) -> nn.Module:
    """Cut every parameter of a model up with DeepSpeed; the engine around it."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for a minute and more
    sharding = {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # without one there is no backward pass
    engine: nn.Module = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    asked = HfDeepSpeedConfig(config)  # type: ignore[no-untyped-call]  # theirs; as Trainer and Accelerate ask
    vars(engine)["asked"] = asked
    assert all(parameter.numel() == 0 for parameter in engine.parameters()), "nothing is sharded: no test"
    return engine


def fairscale_parallel() -> tuple[PreTrainedModel, dist.ProcessGroup]:
    """A Llama with the layers of fairscale's model parallelism, and the ranks that hold its parts."""
    from fairscale.nn.model_parallel import initialize
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear

    initialize.initialize_model_parallel(dist.get_world_size())
    group: dist.ProcessGroup = initialize.get_model_parallel_group()
    model = SPLIT["llama"]()
    for layer in model.get_submodule("model.layers").children():
        for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            _replace(layer, path, ColumnParallelLinear, 0, group, gather_output=False)
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            _replace(layer, path, RowParallelLinear, 1, group, input_is_parallel=True)
    return model, group


def _replace(layer: nn.Module, path: str, kind: Any, dim: int, group: dist.ProcessGroup, **options: bool) -> None:
    linear = layer.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    split = kind(linear.in_features, linear.out_features, bias=False, **options)
    part = linear.weight.detach().chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]
    split.weight.data.copy_(part)
    layer.set_submodule(path, split)


def fairscale_fsdp(layout: str, name: str, inputs: Mapping[str, Any]) -> Row:
    """Run a model in fairscale's FSDP, without any tap; it has no code for the CPU, and the row says what it says."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    reason = ""
    try:
        FullyShardedDataParallel(SPLIT[name](), compute_device=torch.device("cpu"))(**inputs)
    except Exception as error:  # noqa: BLE001  # the boundary to a library whose failure is the result
        reason = f"{type(error).__name__}: {error}"
    assert reason, "it runs now: compare it with one process, as the other layouts"
    return Row(layout=layout, model=name, what="none", n_sites=0, error=0.0, bound=0.0, reason=reason)
