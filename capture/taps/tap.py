"""Read and change what a model computes at chosen sites: forward and backward, full tensors, any layout.

Replay, patching and generation are built on `tap`. It differs from `reading`, on which recording is built, in three
ways: its function gets a copy, it sees gradients too, and it works through wrappers and across the processes that
share one model.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from residua.capture.hooks.attention import eager_where_needed
from residua.capture.hooks.forward_call import ForwardCall, Note, SiteTensor
from residua.capture.hooks.hooks import attached
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.module_io import checked_replacement
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.capture.runtime.wrappers import uncompiled_loop
from residua.capture.sites.pipeline_stages import Microbatch, microbatches_of, target_of
from residua.capture.sites.reference_model import may_be_distributed, unsharded_sites
from residua.capture.taps.full_tensor import FullTensors, run_locally
from residua.capture.taps.pipeline_gradients import carrying_gradients
from residua.capture.taps.reading import TapFunction, and_more
from residua.store.base.errors import CaptureError, PlanError, few


class TapGroup:
    """A switch that several taps can share; ``enabled`` may be set at any time between forward calls.

    On a model that several processes share, every process has to set it in the same way.

    Example:
        >>> ablations = TapGroup()
        >>> with ablations.off():
        ...     ablations.enabled
        False
    """

    def __init__(self) -> None:
        self.enabled = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch the group's taps off inside; afterwards the switch is as it was before."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


@dataclass
class _Due:
    """What a tap notes at a site of a part that runs again.

    Attributes:
        microbatch: Number of the microbatch under way.
        waits: Whether the tensor will be in autograd's graph only when the part runs again.
    """

    microbatch: int | None
    waits: bool = False


class Tap:
    """The sites of a tap, how often each fired, and the switch.

    Attributes:
        sites: From name to what is known of each site.
        group: The switch that this tap shares with the others of its group.
        n_fired: From name to how often the function was due: once a forward call for most sites.
    """

    def __init__(
        self,
        sites: Mapping[str, SiteInfo],
        function: TapFunction,
        *,
        backward: bool,
        differentiable: bool,
        group: TapGroup,
        run_on: Callable[..., Tensor | None],
        microbatch: Microbatch,
    ) -> None:
        self.sites = dict(sites)
        self.group = group
        self.n_fired: Counter[str] = Counter()
        self._function = function
        self._backward = backward
        self._differentiable = differentiable
        self._run_on = run_on
        self._microbatch = microbatch
        self._handles: list[RemovableHandle] = []
        self._n_met: Counter[str] = Counter()
        self._awaited: set[str] = set()

    def __repr__(self) -> str:
        return f"<Tap of {few(list(self.sites))}{'' if self.enabled else ', switched off'}>"

    @property
    def enabled(self) -> bool:
        """Whether the group of this tap is switched on."""
        return self.group.enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self.group.enabled = on

    @property
    def microbatch(self) -> int | None:
        """Number of the microbatch under way, in a stage of torch's pipelines; None elsewhere."""
        return self._microbatch.index

    def _on_site(self, found: SiteTensor) -> Tensor | None:
        if found.is_again and found.note is not None:
            return self._on_site_again(found, found.note)
        if not self._microbatch.is_real:
            return None
        name = found.info.name
        self._n_met[name] += 1
        if not self.enabled:
            return None
        if found.note is not None:
            found.note.of_callback = _Due(self._microbatch.index)
        if self._backward:
            self._await_gradient(found)
            return None
        self.n_fired[name] += 1
        if not self._differentiable:
            return found.once(partial(self._apply, found, found.tensor))
        new = self._apply(found, found.tensor)
        if found.note is not None:
            found.note.is_replaced = new is not None
        return new

    def _on_site_again(self, found: SiteTensor, note: Note) -> Tensor | None:
        """Do in a part that runs again what was done in the forward call; nothing of it counts."""
        if not self._backward and not self._differentiable:
            return note.again(found.tensor)
        due = note.of_callback
        if not isinstance(due, _Due):
            return None
        if self._backward:
            if due.waits and found.tensor.requires_grad:
                self._listen(found, due.microbatch)
            return None
        with self._microbatch.running(due.microbatch):
            return self._apply(found, found.tensor)

    def _await_gradient(self, found: SiteTensor) -> None:
        name = found.info.name
        due = None if found.note is None else found.note.of_callback
        if not found.tensor.requires_grad and (not isinstance(due, _Due) or torch.is_grad_enabled()):
            raise CaptureError(
                f"Site {name!r}{on_rank()} has no gradient: nothing before it requires one, or the "
                "model was called without gradients. Call it with gradients enabled, and let the parameters or the "
                "embeddings before the site require them."
            )
        if not self.n_fired[name]:
            self._awaited.add(name)
        if found.tensor.requires_grad:
            self._listen(found, self._microbatch.index)
        elif isinstance(due, _Due):
            due.waits = True  # reentrant checkpointing makes the graph when the part runs again

    def _listen(self, found: SiteTensor, microbatch: int | None) -> None:
        # A closure over the tensor itself would keep it alive for ever, through its own hook.
        self._handles = [handle for handle in self._handles if handle.hooks_dict_ref() is not None]
        hook = partial(self._on_gradient, found.without_values(), microbatch)
        self._handles.append(found.tensor.register_hook(hook))  # type: ignore[no-untyped-call]  # torch has no types here

    def _on_gradient(self, site_tensor: SiteTensor, microbatch: int | None, gradient: Tensor) -> Tensor | None:
        self._awaited.discard(site_tensor.info.name)
        with self._microbatch.running(microbatch):
            if not self.enabled:
                return None
            self.n_fired[site_tensor.info.name] += 1
            return self._apply(site_tensor, gradient)

    def _apply(self, site_tensor: SiteTensor, tensor: Tensor) -> Tensor | None:
        old = tensor if self._differentiable else tensor.detach()
        shown = site_tensor.to_site(old, is_gradient=self._backward)
        new = self._run_on(site_tensor, shown, partial(self._run, site_tensor.info.name), is_gradient=self._backward)
        return None if new is None else site_tensor.to_model(new, old, is_gradient=self._backward)

    def _run(self, name: str, tensor: Tensor) -> Tensor | None:
        new = self._function(name, tensor)
        if new is None:
            return None
        if not self._differentiable and isinstance(new, Tensor) and new.requires_grad:
            raise CaptureError(
                f"Site {name!r}{on_rank()}: the replacement requires gradients, which would be lost here. Pass "
                "differentiable=True to let them flow, or detach the replacement."
            )
        return checked_replacement(tensor, new, name)

    def _release(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _check(self, call: ForwardCall) -> None:
        """Raise unless every site was met, and had its gradient where one was due."""
        if call.n_calls == 0 and self.enabled and self.sites:
            raise CaptureError(
                f"Site {next(iter(self.sites))!r} was tapped{on_rank()}, and the model was never called inside the "
                "context. Call the very model that is tapped; if torch.compile returned another one, tap that."
            )
        unmet = [info for name, info in self.sites.items() if call.n_calls and not self._n_met[name]]
        if unmet:
            raise CaptureError(
                f"Site {unmet[0].name!r}{on_rank()} ({unmet[0].where}) was never met while the model ran. Name a "
                "module that the model calls (a call of its forward does not count); if torch.compile returned another "
                f"model, tap that.{and_more(unmet)}"
            )
        waiting = [info for name, info in self.sites.items() if name in self._awaited]
        if waiting:
            raise CaptureError(
                f"Site {waiting[0].name!r}{on_rank()} ({waiting[0].where}) never had a gradient. Call backward() "
                f"inside the context, on a loss that depends on the site.{and_more(waiting)}"
            )


@contextmanager
def tap(
    model: nn.Module | PipelineStage,
    sites: str | Iterable[str] | Mapping[str, SiteInfo],
    function: TapFunction,
    *,
    backward: bool = False,
    gather: bool = True,
    differentiable: bool = False,
    group: TapGroup | None = None,
    tensor_parallel: ProcessGroup | DeviceMesh | None = None,
) -> Iterator[Tap]:
    """Give ``function`` the full tensor of each site while the model runs; take back a replacement.

    The tensor has shape ``(batch, positions, *row)`` as in `reading`, the model's dtype and its device. It is a copy:
    keep it or change it, the model does not notice. What the function returns replaces the site's value; None leaves
    it. The function may call the model itself: this tap is switched off meanwhile. (Over several processes it may do so
    only where it runs on all of them.) Compiled models, and compiled functions that call one, run uncompiled inside.

    If several processes share the model, all of them have to use the same tap. The function runs once per model
    replica, on the first rank of its tensor-parallel group, and its result reaches every rank. Data-parallel replicas
    are independent, each with its own batch. A site of another pipeline stage fires in that stage only.

    With gradient checkpointing (torch's, and all that calls it) a part of the model runs again in the backward pass.
    There each site gets the same replacement again, and nothing is counted twice. A function with differentiable=True
    runs again, and has to compute the same: draw random numbers from torch's own generator. Call ``backward()`` inside
    the context. Checkpointing of other libraries is refused where it would lose a replacement.

    Leaving the context, also by an exception, restores the model: hooks, weights, outputs and attention.

    Args:
        model: Any torch module, wrapped (DDP, FSDP, compile, Accelerate) or not, or a stage of torch's pipelines.
            Sites have the names of the unwrapped model.
        sites: Names or patterns of sites, for example ``resid_post.3`` or ``mlp_out.*``; or the result of
            `unsharded_sites`, so that many taps on one model need only one look-up.
        function: Called as ``function(name, tensor)``. To keep all tensors, pass a dictionary's ``__setitem__``.
        backward: Give the gradient of the loss with respect to the site's value instead of the value, when
            ``backward()`` reaches it inside the context. It is the full gradient, including what flows around the
            module that holds the site. A replacement flows on in its place.
        gather: Give the full tensor. Otherwise the function runs on every rank, on what that rank has of the tensor,
            without communication.
        differentiable: Give the tensor as a part of autograd's graph, so that gradients flow through the function and
            into the parameters that it uses, for example those of a trainable module. The function then runs on every
            rank, and has to do the same on each. Otherwise no gradient flows through a replacement to earlier layers.
        group: A switch that several taps share; by default the tap has its own.
        tensor_parallel: The ranks over which the model's activations are split, or their mesh, where the model does
            not show it.

    Yields:
        The tap: its sites, how often they fired, and its switch ``enabled``.

    Raises:
        UnknownSiteError: The model has no such site.
        PlanError: Options contradict each other.
        CaptureError: A site never fired; or, during the run, a replacement does not fit, a site has no gradient, or
            its layout over the ranks cannot be proved. The message names site, rank and reason.

    Example:
        >>> model, kept = nn.Sequential(nn.Linear(2, 3)), {}
        >>> with tap(model, "module:0", kept.__setitem__):
        ...     _ = model(torch.ones(4, 2))
        >>> kept["module:0@output"].shape
        torch.Size([4, 3])
    """
    if backward and differentiable:
        raise PlanError("tap got backward=True and differentiable=True, and gives no gradients of gradients: pass one")
    target = target_of(model)
    if not isinstance(sites, Mapping):
        sites = unsharded_sites(target.core, [sites] if isinstance(sites, str) else list(sites))
    infos = target.here(sites)
    _refuse_top_logits(infos)
    with ExitStack() as stack:
        made = Tap(
            infos,
            function,
            backward=backward,
            differentiable=differentiable,
            group=TapGroup() if group is None else group,
            run_on=_full_tensors(target.core, differentiable, tensor_parallel).run if gather else run_locally,
            microbatch=stack.enter_context(microbatches_of(model)),
        )
        stack.callback(made._release)
        stack.enter_context(uncompiled_loop())
        stack.enter_context(eager_where_needed(target.core, infos.values()))
        if backward or differentiable:
            stack.enter_context(carrying_gradients(target.core))
        call = stack.enter_context(attached(target.modules, infos.values(), made._on_site))
        yield made
    made._check(call)


def _full_tensors(core: nn.Module, differentiable: bool, given: ProcessGroup | DeviceMesh | None) -> FullTensors:
    return FullTensors(
        tensor_parallel_group(core, given),
        everywhere=differentiable,
        checks_shapes=isinstance(core, PreTrainedModel) and may_be_distributed(core),
        stages=pipeline_group(core),
    )


def _refuse_top_logits(sites: Mapping[str, SiteInfo]) -> None:
    for name, info in sites.items():
        if info.site.top is not None:
            raise PlanError(f"{name!r} is a search among the logits and not a tensor of the model; tap 'logits'")
