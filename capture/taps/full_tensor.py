"""From what this process has of a site to the full tensor, and back, for every layout.

`FullTensors.run` and `run_locally` have one signature; a tap calls one or the other.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from residua.capture.hooks.forward_call import SiteTensor
from residua.capture.layout.gather import run_everywhere, run_once
from residua.capture.layout.layouts import Layout, ProvedLayouts, full_shape, mesh_of, refuse_shard

Function = Callable[[Tensor], Tensor | None]


class FullTensors:
    """Runs functions on full tensors of one model replica.

    Args:
        group: The ranks that share the replica's activations; None where this process has full ones.
        everywhere: Run functions on every rank, with gradients; otherwise once, on the owner.
        checks_shapes: Compare a tensor without a group with its shape in the unsharded model.
        stages: The ranks of a pipeline that sends its logits to every stage; None for any other model.
    """

    def __init__(
        self, group: ProcessGroup | None, *, everywhere: bool, checks_shapes: bool, stages: ProcessGroup | None
    ) -> None:
        self._over_group = [] if group is None else [(group, ProvedLayouts())]
        self._over_stages = [] if stages is None else [(stages, ProvedLayouts())]
        self._everywhere = everywhere
        self._checks_shapes = checks_shapes

    def run(self, site_tensor: SiteTensor, local: Tensor, function: Function, *, is_gradient: bool) -> Tensor | None:
        """Run a function on a site's full tensor or gradient.

        Args:
            site_tensor: The tensor, as the model has it.
            local: What this process has of it, with the axes that are promised for sites.
            function: Given a tensor of its own.
            is_gradient: Whether it is the gradient; its layout is proved by itself.

        Returns:
            What replaces `local`, or None.

        Raises:
            CaptureError: The layout cannot be proved.
        """
        if isinstance(local, DTensor):
            return self._run_dtensor(site_tensor, local, function)
        full = full_shape(site_tensor.info, site_tensor.batch_shape, tuple(local.shape))
        # Every stage has the logits: first the stages agree on who has them, then the ranks of that stage.
        over = [*(self._over_stages if site_tensor.info.via == "logits" else []), *self._over_group]
        if not over:
            if self._checks_shapes:
                refuse_shard(
                    site_tensor.info.name, local, full, remedy=" Or pass gather=False to get what each rank has."
                )
            return function(local.clone())

        def run(tensor: Tensor, over: Sequence[tuple[ProcessGroup, ProvedLayouts]]) -> Tensor | None:
            (group, layouts), *rest = over
            name, shape = site_tensor.info.name, site_tensor.batch_shape
            layout = layouts.of(name, tensor, full, group, batch_shape=shape, is_gradient=is_gradient)
            inner = partial(run, over=rest) if rest else function
            if self._everywhere:
                return run_everywhere(tensor.clone(), layout, group, inner)
            return run_once(tensor, layout, group, inner, name)

        return run(local, over)

    def _run_dtensor(self, site_tensor: SiteTensor, tensor: DTensor, function: Function) -> Tensor | None:
        """Follow the placements that the tensor itself carries. Partial sums are reduced."""
        mesh = mesh_of(site_tensor.info.name, tensor)
        full = tensor.full_tensor()
        if self._everywhere:
            new = function(full.clone())
        else:
            new = run_once(full, Layout(), mesh.get_group(), function, site_tensor.info.name)
        if new is None:
            return None
        return DTensor.from_local(new, mesh, [Replicate()], run_check=False).redistribute(placements=tensor.placements)


def run_locally(_site_tensor: SiteTensor, local: Tensor, function: Function, *, is_gradient: bool) -> Tensor | None:
    """Run a function on what this process has of a site's tensor or gradient, without communication."""
    del is_gradient
    if not isinstance(local, DTensor):
        return function(local.clone())
    new = function(local.to_local().clone())
    if new is None:
        return None
    return DTensor.from_local(
        new, local.device_mesh, local.placements, run_check=False, shape=local.shape, stride=local.stride()
    )
