"""The process group of one replica, where a model that is loaded here is split over several of the launched processes.

Each replica has a process group of its own, of neighbouring ranks, and knows of no other. So replicas do not wait for
each other, and one that dies takes no other with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from residua.capture.scheduling.membership import START_SECONDS, Membership
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.errors import PlanError


@contextmanager
def replica_group(settings: CaptureSettings, membership: Membership | None) -> Iterator[None]:
    """Make the process group of this process's replica for as long as it is needed.

    A process that is stopped, and not dead, holds the others of its replica for `START_SECONDS` at most.

    Args:
        settings: They say over how many processes a replica is split; nothing is made for one.
        membership: Those that were launched together.

    Raises:
        PlanError: As many processes cannot be shared out.
    """
    size = settings.tp * settings.pp
    if size == 1:
        yield
        return
    asked = f"--tp {settings.tp}" if settings.pp == 1 else f"--tp {settings.tp} --pp {settings.pp}"
    if dist.is_initialized():
        if dist.get_world_size() != size:
            raise PlanError(
                f"{asked} was asked for in a script with a process group of {dist.get_world_size()}: load the model "
                "there as it should lie, and pass it instead of its name"
            )
        yield
        return
    launched = None if membership is None else membership.launch
    if launched is None or launched.n_launched % size:
        found = "this process is alone" if launched is None else f"{launched.n_launched} were launched together"
        raise PlanError(
            f"{asked} splits a model over {size} processes, and {found}: start a multiple of {size}, for example "
            f"with torchrun --nproc-per-node {size} -m residua ..."
        )
    replica, rank = divmod(launched.rank, size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"group/{replica}", launched.store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=START_SECONDS),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
