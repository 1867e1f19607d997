"""Which sites of a split model can be stored as they lie: each rank stores its own columns, and nothing is sent."""

import torch
from torch import Tensor, nn

from residua.capture.buffers.row_index import FIRST_ROW_AXIS
from residua.capture.forward.inputs import forward_kwargs
from residua.capture.layout.layouts import Layout
from residua.capture.layout.local_shards import LocalShards
from residua.capture.layout.process_layout import ProcessLayout
from residua.capture.runtime.collectives import all_gather_objects
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.pipeline_schedule import runnable
from residua.capture.runtime.process_groups import pipeline_group
from residua.capture.runtime.sharded import without_gradients
from residua.capture.runtime.wrappers import evaluating
from residua.capture.taps.reading import reading
from residua.store.base.errors import PlanError
from residua.store.base.naming import named

_EXAMPLES, _POSITIONS = 2, 8


def column_shards(model: nn.Module, process_layout: ProcessLayout) -> dict[str, int]:
    """Run a few tokens to see how the sites lie; a collective of the processes that hold the model.

    Returns:
        The number of ranks for each site that is split along the first axis of its rows. Sites that are split by
        position or in another way are left out: their rows have to be gathered.

    Raises:
        PlanError: The ranks have shards of different widths, into which no Zarr array can be cut.
    """
    shards, found = LocalShards(process_layout.sites, process_layout.group), dict[str, Layout]()

    def look(site: str, tensor: Tensor) -> None:
        found[site] = shards.of(site, tensor, (_EXAMPLES, _POSITIONS))[1]

    ids = torch.arange(_EXAMPLES * _POSITIONS, device=input_device(model)).view(_EXAMPLES, _POSITIONS)
    with without_gradients(model), evaluating(model), reading(model, process_layout.sites, look):
        called = runnable(model)
        called(**forward_kwargs(called, ids, torch.ones_like(ids)))
    split = {site: layout.sizes for site, layout in found.items() if layout.dim == FIRST_ROW_AXIS}
    for site, sizes in split.items():
        if len(set(sizes)) > 1:
            raise PlanError(
                f"{named('gather', False)}: the ranks have {', '.join(map(str, sizes))} columns of {site}, and a Zarr "
                f"array is cut into equal ones only: capture it without {named('gather', False)}, or over a number of "
                "ranks that divides its width"
            )
    counts = {site: len(sizes) for site, sizes in split.items()}
    return {site: n for stage in all_gather_objects(pipeline_group(model), counts) for site, n in stage.items()}
