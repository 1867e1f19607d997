"""The forward calls of a model that are running, and the parts of them that gradient checkpointing runs again.

What a callback did at a site in the forward call is noted, in the order of the sites. When a part runs again in the
backward pass, each site gets its note back: the same replacement, counted once, with the same random numbers.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

from residua.capture.hooks.attention import AttentionTap, move_taps_last
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.compat import in_backward, without_dispatch_modes
from residua.capture.runtime.wrappers import core_of, evaluating, uncompiled_loop
from residua.store.base.errors import CaptureError

_REMEDY = "call backward() inside the context, or switch gradient checkpointing off"


@dataclass(kw_only=True)
class Note:
    """What happened at a site in the forward call, in a part that may run again.

    Attributes:
        name: The site.
        is_replaced: Whether a callback replaced its tensor.
        replacement: A copy of the replacement, if it is to be used again as it is.
        of_callback: Whatever else the callback wants to know.
    """

    name: str
    is_replaced: bool = False
    replacement: Tensor | None = None
    of_callback: Any = None
    _random_states: tuple[Any, Any] | None = None

    def once(self, tensor: Tensor, run: Callable[[], Tensor | None]) -> Tensor | None:
        """Run a callback's function in the forward call, and note what `again` needs.

        Neither checkpointing nor a policy of it sees what the function computes, since it does not run again.
        """
        before = _random_state(tensor)
        with without_dispatch_modes(), saved_tensors_hooks(_itself, _itself):
            new = run()
        after = _random_state(tensor)
        if not _is_same(before, after):
            self._random_states = before, after
        self.is_replaced = new is not None
        self.replacement = None if new is None else new.detach().clone()  # the model may change it in place
        return new

    def again(self, tensor: Tensor) -> Tensor | None:
        """Return what `once` returned, and draw as many random numbers."""
        if self._random_states is not None and _is_same(_random_state(tensor), self._random_states[0]):
            cpu, (devices, states) = self._random_states[1]
            torch.set_rng_state(cpu)
            set_device_states(devices, states, device_type=tensor.device.type)
        return None if self.replacement is None else self.replacement.clone()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _random_state(tensor: Tensor) -> tuple[Tensor, tuple[list[int], list[Tensor]]]:
    return torch.get_rng_state(), get_device_states(tensor)


def _is_same(first: Any, second: Any) -> bool:
    (cpu, (_, states)), (other_cpu, (_, other_states)) = first, second
    pairs = zip([cpu, *states], [other_cpu, *other_states], strict=False)
    return all(torch.equal(state, other) for state, other in pairs)


@dataclass(frozen=True, kw_only=True)
class SiteTensor:
    """The tensor of one site during one forward call.

    Attributes:
        info: The site.
        tensor: The model's own tensor, with the axes that the model gives it, in autograd's graph.
        batch_shape: (batch, positions) of the call; None if the model takes no token ids.
        heads_first: Whether the tensor is (batch, heads, positions, ...).
        note: What happened here in the forward call; None in a part that never runs again.
        is_again: Whether this is such a run, in the backward pass.
    """

    info: SiteInfo
    tensor: Tensor
    batch_shape: tuple[int, int] | None
    heads_first: bool = False
    note: Note | None = None
    is_again: bool = False

    def to_site(self, tensor: Tensor, *, is_gradient: bool = False) -> Tensor:
        """Return the site's value, or its gradient, as (batch, positions, ...), from the model's tensor."""
        tensor = self._scaled(tensor, is_gradient)
        if self.heads_first:
            return tensor.transpose(1, 2)
        if self.info.streams:
            return tensor.movedim(0, 2)
        if self.info.flat and self.batch_shape is not None and len(tensor) == prod(self.batch_shape):  # else of patches
            return tensor.reshape(*self.batch_shape, *tensor.shape[1:])
        return tensor

    def to_model(self, new: Tensor, old: Tensor, *, is_gradient: bool = False) -> Tensor:
        """Undo `to_site`: return what replaces the model's tensor.

        Args:
            new: The site's new value, or its new gradient.
            old: The model's own tensor; where the new value equals the old one, the result does too, bit for bit.
            is_gradient: Whether both are gradients.
        """
        if self.heads_first:
            new = new.transpose(1, 2)
        else:
            new = new.movedim(2, 0) if self.info.streams else new.reshape(old.shape)
        if self.info.factor == 1:
            return new
        factor = 1 / self.info.factor if is_gradient else self.info.factor
        shown = self._scaled(old, is_gradient)
        # both sides give autograd the same gradient: an adapter that begins with zeros learns too
        return torch.where(new == shown, old + (new - shown) / factor, new / factor)

    def _scaled(self, tensor: Tensor, is_gradient: bool) -> Tensor:
        if self.info.factor == 1:
            return tensor
        return tensor / self.info.factor if is_gradient else tensor * self.info.factor

    def without_values(self) -> "SiteTensor":
        """Return the same with a meta tensor of the same shape, which keeps no memory and no graph alive."""
        return replace(self, tensor=torch.empty(self.tensor.shape, device="meta"), note=None)

    def once(self, run: Callable[[], Tensor | None]) -> Tensor | None:
        """Run a callback's function; in a part that runs again, return what it returned in the forward call."""
        if self.note is None:
            return run()
        return self.note.again(self.tensor) if self.is_again else self.note.once(self.tensor, run)


@dataclass
class _Running:
    """What runs in one thread.

    Attributes:
        shapes: The batch shapes of the model's calls, the innermost call last.
        notes: The notes of the parts that run for the first time, outer parts first.
        noted: The notes of a part that runs again.
    """

    shapes: list[tuple[int, int] | None] = field(default_factory=list)
    notes: list[list[Note]] = field(default_factory=list)
    noted: Iterator[Note] | None = None


_probes = threading.local()


@contextmanager
def probing() -> Iterator[None]:
    """Let the model run on tokens that are not the user's: sites that were attached before do not see them."""
    before = is_probing()
    _probes.active = True
    try:
        yield
    finally:
        _probes.active = before


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Let a model run on inputs that are not the user's: in evaluation mode, uncompiled and without gradients."""
    with probing(), evaluating(core_of(model)), uncompiled_loop(), torch.no_grad():
        yield


def run_on_few(model: nn.Module, arguments: Mapping[str, object], what: str) -> Tensor | None:
    """Run a model in a trial, to measure its sites.

    Args:
        model: The model.
        arguments: Those of its forward.
        what: What they are, for the message.

    Returns:
        Its logits or last hidden state; None if it gives neither.

    Raises:
        CaptureError: The model raised something.
    """
    with trial(model):
        try:
            output = model(**arguments)
        except Exception as error:  # the boundary to the user's model, which may raise anything
            raise CaptureError(
                f"{type(core_of(model)).__name__} was run on {what} to measure its sites, and raised "
                f"{type(error).__name__}: {error}"
            ) from error
    found = getattr(output, "logits", getattr(output, "last_hidden_state", None))
    return found if isinstance(found, Tensor) else None


def is_probing() -> bool:
    """Return whether this thread runs a model on tokens that are not the user's."""
    return bool(getattr(_probes, "active", False))


class ForwardCall:
    """The forward calls of the model that are running, in each thread.

    A callback may call the model itself, and several threads may share a model: calls are kept in a stack per thread.

    Attributes:
        n_calls: Number of forward calls that have begun, without those that run again.
        is_attached: Whether the hooks are in place.
        handles: The hooks that read the sites and the one that ends a call, in order, without those that have to
            come first.
        attention_taps: The taps of attention, by module.
    """

    def __init__(self) -> None:
        self.n_calls = 0
        self.is_attached = True
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.attention_taps: Mapping[nn.Module, AttentionTap] = {}
        self._replaced: set[str] = set()
        self._local = threading.local()
        self._is_of_probe = is_probing()

    @property
    def _running(self) -> _Running:
        running: _Running = vars(self._local).setdefault("running", _Running())
        return running

    def is_running(self, info: SiteInfo) -> bool:
        """Return whether a forward call of the model is running in this thread, or a part of one again.

        Raises:
            CaptureError: The site was replaced, and something runs its part again that is no checkpointing of torch.
        """
        if self._running.shapes:
            return self._is_of_probe == is_probing()
        if info.name in self._replaced and torch.is_grad_enabled() and in_backward():
            raise CaptureError(
                f"Site {info.name!r} was replaced, and the backward pass computes it again with another "
                "checkpointing than torch's, which cannot be followed: use torch.utils.checkpoint or transformers' "
                "gradient_checkpointing_enable(), or switch it off"
            )
        return False

    def call(
        self, on_tensor: Callable[[SiteTensor], Tensor | None], info: SiteInfo, tensor: Tensor, *, heads_first: bool
    ) -> Tensor | None:
        """Call a callback with the tensor of a site; its own calls of the model do not belong to the running part."""
        running = self._running
        is_again = running.noted is not None
        found = SiteTensor(
            info=info,
            tensor=tensor,
            batch_shape=running.shapes[-1],
            heads_first=heads_first,
            note=self._note(info),
            is_again=is_again,
        )
        notes, noted = running.notes, running.noted
        running.notes, running.noted = [], None
        try:
            new = on_tensor(found)
        finally:
            running.notes, running.noted = notes, noted
        if new is not None:
            self._replaced.add(info.name)
        return new

    def _note(self, info: SiteInfo) -> Note | None:
        """Return the note of the site that is met now: the one from the forward call, or a new one."""
        running = self._running
        if running.noted is None:
            note = Note(name=info.name) if running.notes else None
        else:
            note = next(running.noted, None)
            if note is None or note.name != info.name:
                raise CaptureError(
                    f"Site {info.name!r} is computed again in the backward pass, in another order than in the forward "
                    "call: switch gradient checkpointing off"
                )
        for notes in running.notes if note is not None else ():
            notes.append(note)  # type: ignore[arg-type]  # it is none of these where there are no notes
        return note

    def move_last(self) -> None:
        """Let these hooks run after all others of their modules, also after those that were registered later."""
        for handle in self.handles:
            move_last(handle)
        move_taps_last(self.attention_taps)

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a forward call begins; a forward pre-hook."""
        running = self._running
        self.n_calls += running.noted is None and self._is_of_probe == is_probing()
        candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), next(iter(args), None))
        shape = next((tokens.shape for tokens in candidates if isinstance(tokens, Tensor)), ())
        running.shapes.append((shape[0], shape[1]) if len(shape) >= 2 else None)

    def leave(self, _module: nn.Module, _args: object, _output: object) -> None:
        """Note that a forward call ends, normally or by an exception; a forward hook."""
        del self._running.shapes[-1:]  # the list is empty if another pre-hook failed before `enter`
        if not self._running.shapes:
            for tap in {id(each): each for each in self.attention_taps.values()}.values():
                tap.end_call()

    def begin_part(self) -> "_Part":
        """Return a part of the running call that gradient checkpointing may run again."""
        return _Part(self, self._running.shapes[-1:])

    @contextmanager
    def noting(self, notes: list[Note]) -> Iterator[None]:
        """Add the notes of the sites that are met inside to `notes`."""
        running = self._running
        running.notes = [*running.notes, notes]
        try:
            yield
        finally:
            running.notes = [each for each in running.notes if each is not notes]

    @contextmanager
    def repeating(self, shapes: list[tuple[int, int] | None], notes: list[Note]) -> Iterator[None]:
        """Give the sites that are met inside the notes of the forward call."""
        before = self._running
        vars(self._local)["running"] = _Running(shapes=list(shapes), noted=iter(notes))
        try:
            yield
        finally:
            vars(self._local)["running"] = before


def move_last(handle: torch.utils.hooks.RemovableHandle) -> None:
    """Let a hook run after all others of its module, also after those that were registered later."""
    hooks = handle.hooks_dict_ref()
    if hooks is not None and handle.id in hooks:
        hooks[handle.id] = hooks.pop(handle.id)


class _Part:
    """A part of a forward call that may run again; it lives as long as the graph that needs it.

    Args:
        call: The calls of the model.
        shapes: The batch shape of the call; empty if the part holds the call.
    """

    def __init__(self, call: ForwardCall, shapes: list[tuple[int, int] | None]) -> None:
        self._call = call
        self._shapes = shapes
        self._notes: list[Note] = []

    @contextmanager
    def first(self) -> Iterator[None]:
        """Take notes."""
        with self._call.noting(self._notes):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Give the notes back.

        Raises:
            CaptureError: The hooks are gone, and sites were replaced.
        """
        replaced = next((note.name for note in self._notes if note.is_replaced), None)
        if replaced is not None and not self._call.is_attached:
            raise CaptureError(
                f"Site {replaced!r} was replaced in the forward call, and gradient checkpointing computes it again in "
                f"the backward pass, after the end of the context: {_REMEDY}"
            )
        with self._call.repeating(self._shapes, self._notes):
            yield
