"""From what this process has of a site to the whole tensor, and back: one way in for every layout."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from residua.capture.layout.gather import run_everywhere, run_once
from residua.capture.layout.layouts import Layout, ProvedLayouts, Shape, full_shape
from residua.capture.runtime.collectives import on_rank
from residua.capture.sites.hooks import Met
from residua.store.base.errors import CaptureError

Function = Callable[[Tensor], Tensor | None]


class FullTensors:
    """Runs functions on whole tensors of one model replica.

    Args:
        group: The ranks that share the replica's activations; None where this process has whole ones.
        everywhere: Whether functions run on every rank, with gradients, or once, on the owner.
        checks_shapes: Whether a tensor without a group is compared with the shape in the unsharded model.
        stages: The ranks of a pipeline that hands its logits to every stage; None where none does.
    """

    def __init__(
        self, group: ProcessGroup | None, *, everywhere: bool, checks_shapes: bool, stages: ProcessGroup | None
    ) -> None:
        self._over_group = [] if group is None else [(group, ProvedLayouts())]
        self._over_stages = [] if stages is None else [(stages, ProvedLayouts())]
        self._everywhere = everywhere
        self._checks_shapes = checks_shapes

    def run(self, met: Met, local: Tensor, function: Function, *, is_gradient: bool) -> Tensor | None:
        """Run a function on the whole of a site's tensor or gradient.

        Args:
            met: Where it was met.
            local: What this process has of it, laid out as sites are promised.
            function: Given a tensor of its own.
            is_gradient: Whether it is the gradient; its layout is proved by itself.

        Returns:
            What replaces `local`, or None.

        Raises:
            CaptureError: The layout cannot be proved.
        """
        if isinstance(local, DTensor):
            return self._run_dtensor(met, local, function)
        whole = full_shape(met.info, met.batch_shape, tuple(local.shape))
        # Every stage has the logits: first the stages agree on who has them, then the ranks of that stage.
        over = [*(self._over_stages if met.info.via == "logits" else []), *self._over_group]
        if not over:
            self._refuse_parts(met.info.name, local, whole)
            return function(local.clone())

        def run(tensor: Tensor, over: Sequence[tuple[ProcessGroup, ProvedLayouts]]) -> Tensor | None:
            (group, layouts), *rest = over
            layout = layouts.of(met.info.name, tensor, whole, group, is_gradient=is_gradient)
            inner = partial(run, over=rest) if rest else function
            if self._everywhere:
                return run_everywhere(tensor.clone(), layout, group, inner)
            return run_once(tensor, layout, group, inner, met.info.name)

        return run(local, over)

    def _run_dtensor(self, met: Met, tensor: DTensor, function: Function) -> Tensor | None:
        """Follow the placements that the tensor itself carries; sums that are not yet added up are."""
        mesh = tensor.device_mesh
        if mesh.ndim != 1:
            raise CaptureError(
                f"Site {met.info.name!r}{on_rank()} is a DTensor over a mesh of {mesh.ndim} dimensions; only "
                "one can be gathered. Pass gather=False to get what each rank has."
            )
        whole = tensor.full_tensor()
        if self._everywhere:
            new = function(whole.clone())
        else:
            new = run_once(whole, Layout(), mesh.get_group(), function, met.info.name)
        if new is None:
            return None
        return DTensor.from_local(new, mesh, [Replicate()], run_check=False).redistribute(placements=tensor.placements)

    def _refuse_parts(self, name: str, local: Tensor, whole: Shape | None) -> None:
        if self._checks_shapes and whole is not None and local.shape[2:] != torch.Size(whole[2:]):
            raise CaptureError(
                f"Site {name!r}{on_rank()} has shape {list(local.shape)}, and the whole tensor would be {list(whole)}: "
                "the model is split over ranks that are not known here. Say with tensor_parallel= which they are, or "
                "pass gather=False to get what each rank has."
            )


class LocalTensors:
    """Runs functions on what each process has by itself, without communication."""

    def run(self, _met: Met, local: Tensor, function: Function, *, is_gradient: bool) -> Tensor | None:
        """Run a function on this process's part of a site's tensor or gradient; see `FullTensors.run`."""
        del is_gradient
        if not isinstance(local, DTensor):
            return function(local.clone())
        new = function(local.to_local().clone())
        if new is None:
            return None
        return DTensor.from_local(
            new, local.device_mesh, local.placements, run_check=False, shape=local.shape, stride=local.stride()
        )
