"""The replica of a model that a worker captures with, out of whatever the user wrapped it in."""

from typing import TypeVar, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from residua.capture.runtime.compiled import uncompiled
from residua.capture.runtime.wrappers import inside
from residua.store.base.errors import PlanError

ModelT = TypeVar("ModelT", bound=nn.Module)


def replica_of(model: ModelT) -> ModelT:
    """Return `model` without what DDP, DeepSpeed and `torch.compile` wrapped around it.

    DDP's own forward pass talks to the other workers, and so would wait for those that have fewer batches.

    Raises:
        PlanError: The model is spread over processes in a way that a capture cannot share out.
    """
    inner: nn.Module = uncompiled(model)
    while isinstance(inner, DistributedDataParallel) or type(inner).__name__ == "DeepSpeedEngine":
        inner = uncompiled(inner.get_submodule("module"))
    if inside(inner) is not None:
        raise PlanError(
            f"the model is wrapped in {type(inner).__name__}: capture with the model inside, or shard it with FSDP2 "
            "(fully_shard), which wraps nothing"
        )
    return cast("ModelT", inner)
