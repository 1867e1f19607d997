"""A Llama under torch's own tensor parallelism, plain and sequence parallel."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

from tests.models.tiny import SPLIT


def parallel_llama(mesh: DeviceMesh, *, sequence: bool = False) -> PreTrainedModel:
    """A Llama split over a mesh of one dimension; with `sequence` the residual stream is split by position."""
    model = SPLIT["llama"]()
    parallelize_module(model, mesh, plan_of(model, sequence=sequence))
    return model


def plan_of(model: PreTrainedModel, *, sequence: bool = False) -> dict[str, ParallelStyle]:
    """The plan for the blocks that the model still has."""
    stream = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {}
    for index, _ in model.get_submodule("model.layers").named_children():
        block = f"model.layers.{index}"
        for column in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"{block}.{column}"] = ColwiseParallel()
        for row in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"{block}.{row}"] = RowwiseParallel(output_layouts=stream, use_local_output=not sequence)
        if sequence:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                plan[f"{block}.{norm}"] = SequenceParallel()
            plan[f"{block}.self_attn"] = PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            )
            plan[f"{block}.mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    if sequence:
        plan["model.embed_tokens"] = RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
        )
        plan["model.norm"] = SequenceParallel()
        plan["lm_head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return plan
