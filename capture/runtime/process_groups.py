"""Process groups of one model replica: its tensor-parallel group and the stages of its pipeline.

Tensor parallelism: Shoeybi et al. 2019, arXiv:1909.08053. Pipelines: Huang et al. 2019, arXiv:1811.06965.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from residua.capture.runtime.compat import device_meshes_of, fsdp_meshes, pipeline_stage_of
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.wrappers import core_of
from residua.store.base.errors import PlanError

_declared: WeakKeyDictionary[nn.Module, ProcessGroup] = WeakKeyDictionary()


@contextmanager
def declared_group(model: nn.Module, given: ProcessGroup | DeviceMesh | None) -> Iterator[None]:
    """Declare the tensor-parallel group of `model`, as the user gave it, while the context lasts.

    Args:
        model: The model, wrapped or not.
        given: The ranks over which its activations are split: a group, or a mesh of one dimension or with a dimension
            named ``tp``; None declares nothing.

    Raises:
        PlanError: The mesh has several dimensions, and none is named ``tp``.
    """
    if given is None:
        yield
        return
    core = core_of(model)
    before = _declared.get(core)
    _declared[core] = _given(given)
    try:
        yield
    finally:
        del _declared[core]
        if before is not None:
            _declared[core] = before


def declared_group_of(model: nn.Module) -> ProcessGroup | None:
    """Return the group that `declared_group` declares; None if there is none, or it has only this process."""
    group = _declared.get(core_of(model))
    return None if group is None or dist.get_world_size(group) == 1 else group


def tensor_parallel_group(model: nn.Module, given: ProcessGroup | DeviceMesh | None) -> ProcessGroup | None:
    """Find the processes over which the activations of this model replica may be split.

    The search goes in this order: the group that the caller gave, here or by `declared_group`; transformers' own mesh;
    the meshes of the parameters, except those over which FSDP shards them (FSDP gathers parameters, so each process
    has full activations).

    Args:
        model: The model, wrapped or not.
        given: The group, or a mesh of one dimension or with a dimension named ``tp``.

    Returns:
        The group; None if this process has full activations.

    Raises:
        PlanError: The mesh has several dimensions, and none is named ``tp``; or the parameters lie on several groups.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    core = core_of(model)
    if given is not None:
        group: ProcessGroup | None = _given(given)
    else:
        group = _declared.get(core) or _of_transformers(core) or _of_parameters(core)
    return group if group is not None and dist.get_world_size(group) > 1 else None


def pipeline_group(model: nn.Module) -> ProcessGroup | None:
    """Return the processes of the pipeline that a model is a stage of; None for any other model.

    The pipeline is transformers' own, or the torch pipeline that a capture is running
    (`residua.capture.runtime.pipeline_schedule`).
    """
    stage_model, stage = stage_model_of(core_of(model)), pipeline_stage_of(core_of(model))
    group: ProcessGroup | None = (
        stage.pp_group if stage is not None else None if stage_model is None else stage_model.group
    )
    return group if group is not None and dist.get_world_size(group) > 1 else None


def _given(given: ProcessGroup | DeviceMesh) -> ProcessGroup:
    if isinstance(given, ProcessGroup):
        return given
    names = given.mesh_dim_names or ()
    if given.ndim == 1 or "tp" in names:
        return given.get_group() if given.ndim == 1 else given.get_group("tp")
    raise PlanError(
        f"tensor_parallel was given a mesh of shape {tuple(given.shape)} with dimensions {names or 'without names'}; "
        "give the dimension over which activations are split, for example mesh['tp']"
    )


def _of_transformers(core: nn.Module) -> ProcessGroup | None:
    meshes = device_meshes_of(core)
    return None if meshes is None else meshes.get_mesh("tp").get_group()


def _of_parameters(core: nn.Module) -> ProcessGroup | None:
    data_parallel = {
        ranks
        for module in core.modules()
        if isinstance(module, FSDPModule)
        for mesh in fsdp_meshes(module)
        for ranks in _groups(mesh)
    }
    found: dict[tuple[int, ...], ProcessGroup] = {}
    for parameter in core.parameters():
        if isinstance(parameter, DTensor):
            found |= {r: g for r, g in _groups(parameter.device_mesh).items() if r not in data_parallel}
    found = {ranks: group for ranks, group in found.items() if len(ranks) > 1}
    if len(found) > 1:
        raise PlanError(
            f"the parameters are split over several groups of ranks, {', '.join(map(str, found))}: pass the group "
            "over which activations are split as tensor_parallel="
        )
    return next(iter(found.values()), None)


def _groups(mesh: DeviceMesh) -> dict[tuple[int, ...], ProcessGroup]:
    """Return the groups of a mesh that this process is in, one for each dimension, by their ranks."""
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    return {tuple(dist.get_process_group_ranks(group)): group for group in groups}
