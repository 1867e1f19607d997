"""The processes that hold one replica, in a loop that the user owns: all call the model, with the same batch.

What a capture of a dataset gets from its launch they find out among themselves: who they are, and whether they still
do the same.
"""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from residua.capture.layout.process_layout import Part, is_split, part_of
from residua.capture.recording.call import Call
from residua.capture.runtime.collectives import device_of, everyones, on_rank
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.capture.scheduling.membership import Crew
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import CaptureError
from residua.store.storage.crc import crc32c


@contextmanager
def team_in_loop(model: nn.Module, sites: Mapping[str, SiteInfo]) -> Iterator[tuple[Crew, Part] | None]:
    """Yield the processes that hold `model` together and this one's part of it; None if it has all of it.

    A collective of those that hold it. Inside, each is seen to live by the others. Data-parallel replicas know
    nothing of each other.

    Args:
        model: The model.
        sites: The sites to record, as the unsharded model has them.

    Raises:
        CaptureError: They were asked for different sites, or a site is in no stage.
    """
    if not is_split(model):
        yield None
        return
    mine = (dist.get_rank(), secrets.token_hex(8), list(sites))
    over = everyones(pipeline_group(model), everyones(tensor_parallel_group(model, None), mine))
    everyone = sorted(told for stage in over for told in stage)
    if any(names != list(sites) for *_, names in everyone):
        raise CaptureError(
            "the ranks that hold the model together were asked for different sites: make the same recorder on all"
        )
    first_token = everyone[0][1]  # a place in the store that no other recorder has, whatever each process did before
    store = PrefixStore(f"residua/loop/{first_token}", _get_default_store())
    with Crew(store, everyone.index(mine), len(everyone)) as crew:
        yield crew, part_of(model, sites, crew)


class SameCalls:
    """Finds out whether all processes that hold a replica call it with the same batch.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        groups = (tensor_parallel_group(model, None), pipeline_group(model))
        self._groups = [group for group in groups if group is not None]

    def check(self, call: Call, keep: npt.NDArray[np.bool_] | None) -> None:
        """Compare a call with the others'; a collective of all that hold the replica.

        Raises:
            CaptureError: Tokens, mask or kept positions differ; every one of them raises it.
        """
        if not self._groups:
            return
        mark = 0
        for array in (np.array(call.shape), call.input_ids, call.mask, keep):
            if array is not None:
                mark = crc32c(np.ascontiguousarray(array).view(np.uint8).reshape(-1), mark)
        ends = torch.tensor([mark, -mark])
        for group in self._groups:
            ends = ends.to(device_of(group))
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
        largest, smallest = ends.tolist()
        if largest != -smallest:
            raise CaptureError(
                f"the model was called{on_rank()} with another batch than on other ranks that hold it together: give "
                "all of them the same tokens, mask and keep. Only data-parallel replicas have batches of their own."
            )
