"""This process's place in a replica under tensor, sequence, expert or pipeline parallelism."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.collectives import all_gather_objects
from residua.capture.runtime.compat import PrefixStore, default_store
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.capture.runtime.sharded import is_sharded, is_zero3
from residua.capture.scheduling.membership import Membership
from residua.capture.scheduling.sites_per_rank import Ownership
from residua.capture.scheduling.worker_group import WorkerGroup
from residua.capture.sites.pipeline_stages import target_of
from residua.store.base.errors import CaptureError
from residua.store.format.plan import Plan


def spans_processes(model: nn.Module) -> bool:
    """Return whether several processes hold this model together, so that one of them alone cannot run it."""
    return tensor_parallel_group(model, None) is not None or pipeline_group(model) is not None


def describe_process_layout(model: nn.Module) -> str:
    """Return how a model is spread over processes, for people: ``tensor parallel 2 x fsdp2``, or ``single``."""
    groups = {"pipeline": pipeline_group(model), "tensor parallel": tensor_parallel_group(model, None)}
    over = [f"{name} {dist.get_world_size(group)}" for name, group in groups.items() if group is not None]
    if is_sharded(model):
        over.append("zero3" if is_zero3(model) else "fsdp2")
    return " x ".join(over) or "single"


@dataclass(frozen=True, kw_only=True)
class ProcessLayout:
    """What this process holds of a replica.

    Attributes:
        worker_group: The workers that hold the replica.
        sites: The sites that this process's pipeline stage stores; all sites where there is no pipeline.
        group: The ranks over which the activations of this stage may be split; None where it has full ones.
        is_stage: Whether it is a pipeline stage, so that other stages wait for its output.
    """

    worker_group: WorkerGroup
    sites: Mapping[str, SiteInfo]
    group: ProcessGroup | None
    is_stage: bool

    def ownership(self, plan: Plan) -> Ownership:
        """Return what this process stores of `plan`."""
        sites = [site for site in plan.sites if site.name in self.sites]
        has_columns = self.worker_group.is_leader
        if self.group is None:
            return Ownership(sites, has_columns=has_columns)
        return Ownership(sites, dist.get_rank(self.group), dist.get_world_size(self.group), has_columns=has_columns)


def worker_group_of(model: nn.Module, membership: Membership) -> WorkerGroup:
    """Return the workers that hold a model together with this one; a collective of them."""
    group, stages = tensor_parallel_group(model, None), pipeline_group(model)
    numbers = [
        number for found in all_gather_objects(stages, all_gather_objects(group, membership.number)) for number in found
    ]
    return WorkerGroup(membership, sorted(numbers))


def process_layout_of(model: nn.Module, sites: Mapping[str, SiteInfo], membership: Membership) -> ProcessLayout:
    """Find out what this process holds of a split model; a collective of the processes that hold it.

    Args:
        model: The model.
        sites: The sites to capture, as the unsharded model has them.
        membership: All workers of the capture.

    Raises:
        CaptureError: No stage has one of the sites.
    """
    stages, here = pipeline_group(model), target_of(model).here(sites)
    return ProcessLayout(
        worker_group=worker_group_of(model, membership),
        sites=here if stages is None else _sites_of_stage(sites, here, stages),
        group=tensor_parallel_group(model, None),
        is_stage=stages is not None,
    )


def _sites_of_stage(
    sites: Mapping[str, SiteInfo], here: Mapping[str, SiteInfo], stages: ProcessGroup
) -> dict[str, SiteInfo]:
    """Return the sites that this stage stores.

    The first stage that has a site stores it. All stages have the logits; the last one stores them.
    """
    everyone: list[list[str]] = all_gather_objects(stages, list(here))
    mine = {}
    for name, info in sites.items():
        holders = [stage for stage, names in enumerate(everyone) if name in names]
        if not holders:
            raise CaptureError(f"No pipeline stage has the site {name!r} ({info.where}): choose another site")
        if dist.get_rank(stages) == holders[-1 if info.via == "logits" else 0]:
            mine[name] = info
    return mine


@contextmanager
def process_layout_in_loop(
    model: nn.Module, sites: Mapping[str, SiteInfo]
) -> Iterator[tuple[Membership, ProcessLayout] | tuple[None, None]]:
    """Find out what this process holds of a model that the user's own loop calls; a collective of its processes.

    Inside, these processes send heartbeats to each other. Data-parallel replicas are independent of each other.

    Args:
        model: The model.
        sites: The sites to record, as the unsharded model has them.

    Yields:
        This process among those that hold the model, and what it holds; None, None if it has all of it.

    Raises:
        CaptureError: The processes record different sites, or no stage has one of the sites.
    """
    if not spans_processes(model):
        yield None, None
        return
    mine = (dist.get_rank(), secrets.token_hex(8), list(sites))
    over = all_gather_objects(pipeline_group(model), all_gather_objects(tensor_parallel_group(model, None), mine))
    everyone = sorted(found for stage in over for found in stage)
    if any(names != list(sites) for *_, names in everyone):
        raise CaptureError(
            "the ranks that hold the model together record different sites: make the same recorder on all of them"
        )
    first_token = everyone[0][1]  # a place in the store that no other recorder has, whatever each process did before
    store = PrefixStore(f"residua/loop/{first_token}", default_store())
    with Membership(store, everyone.index(mine), len(everyone)) as membership:
        yield membership, process_layout_of(model, sites, membership)
