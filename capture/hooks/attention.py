"""Attention: queries, keys, values, head outputs and patterns, through transformers' attention interface.

Every attention module of transformers 5 asks ``AttentionInterface.get_interface`` for its attention function (sdpa,
eager, flash, ...), and passes it queries and keys after the rotary embedding. `intercepting` wraps the function that
the module gets. The implementation keeps its name, so everything that a model decides by that name stays the same
(masks above all, and GPT-2's choice of an upcast kernel), and the values are bitwise those of an ordinary run. For the
same reason nothing is added to transformers' registries of functions or masks.

Only eager attention computes patterns; `eager_attention` switches a model to it for a time.

Axes: `B` examples, `H` heads, `T` or `Q` query positions, `K` key positions, `D` width of a head.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from residua.capture.hooks.own_attention import OwnAttention, PassOn, watching
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.compat import attention_implementation, set_attention_implementation
from residua.capture.runtime.wrappers import core_of
from residua.store.base.errors import CaptureError

_LOG = logging.getLogger(__name__)

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionTap(Protocol):
    """A callback for the tensors of one attention module.

    Attributes:
        kinds: The kinds of tensors that it is called with: any of ``q``, ``k``, ``v``, ``z`` and ``pattern``.
        takes_pairs: Whether it takes ``v`` and ``z`` of two calls from the same queries and keys at once, side by side
            in the last axis: differential attention (https://arxiv.org/abs/2410.05258) has values of twice the width,
            and transformers computes each half by a call of its own.
    """

    kinds: frozenset[str]
    takes_pairs: bool = False

    def __call__(self, kind: str, tensor: Tensor) -> Tensor | None:
        """Take one tensor; return its replacement, or None to keep it.

        Args:
            kind: One of `kinds`.
            tensor: (batch, positions, heads, head width) for ``z``, (batch, heads, positions, ...) for other kinds.
        """

    def note_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Take the attention function's keyword arguments: scaling, softcap, sliding_window, and others."""
        del arguments  # few taps need them

    def end_call(self) -> None:
        """Forget what was seen: a forward call of the model ends."""
        del self  # few taps keep anything


_lock = threading.Lock()
_taps: dict[int, list[AttentionTap]] = {}  # by id of the attention module, which the model keeps alive
_original: list[Callable[..., AttentionFunction]] = []  # transformers' own method, while it is replaced


@contextmanager
def intercepting(
    taps: Mapping[nn.Module, AttentionTap], own: Mapping[nn.Module, OwnAttention] | None = None
) -> Iterator[None]:
    """Call ``taps[module]`` whenever one of these modules computes attention through the interface.

    Args:
        taps: The tap for each module. Modules that do not use the interface may be among them, and call no tap.
        own: Those among them that compute attention in their own code, and how. Their taps get no arguments.
    """
    if not taps:
        yield
        return
    with _lock:
        if not _taps:
            _original.append(AttentionInterface.get_interface)
            wrapped = _wrapped(AttentionInterface.get_interface)
            setattr(AttentionInterface, "get_interface", wrapped)  # noqa: B010 - mypy allows no other way
        for module, tap in taps.items():
            _taps.setdefault(id(module), []).append(tap)
    try:
        with watching(own or {}, _readers_of):
            yield
    finally:
        with _lock:
            for module, tap in taps.items():
                _open_pairs().pop(id(module), None)
                _taps[id(module)].remove(tap)
                if not _taps[id(module)]:
                    del _taps[id(module)]
            if not _taps:
                setattr(AttentionInterface, "get_interface", _original.pop())  # noqa: B010 - see above


def _readers_of(module: nn.Module) -> tuple[frozenset[str], PassOn]:
    """Return the kinds that the taps of a module read, and a function that calls them."""
    taps = tuple(_taps.get(id(module), ()))
    for tap in taps:
        tap.note_arguments({})

    def pass_on(kind: str, tensor: Tensor) -> Tensor:
        for tap in taps:
            tensor = _pass_heads(tap, kind, tensor)
        return tensor

    return frozenset(kind for tap in taps for kind in tap.kinds), pass_on


def move_taps_last(taps: Mapping[nn.Module, AttentionTap]) -> None:
    """Call these taps, which are attached, after all others of their modules."""
    with _lock:
        for module, tap in taps.items():
            attached = _taps[id(module)]
            if attached[-1] is not tap:
                attached.remove(tap)
                attached.append(tap)


def _wrapped(original: Callable[..., AttentionFunction]) -> Callable[..., AttentionFunction]:
    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> AttentionFunction:
        return partial(_attend, original(self, *args, **kwargs))

    return get_interface


def _attend(
    function: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute one module's attention with its own function, and call the taps."""
    taps = tuple(_taps.get(id(module), ()))
    pair = _Pair.of(module, query, key, value) if any(tap.takes_pairs for tap in taps) else None
    for tap in taps:
        tap.note_arguments(kwargs)
        query, key = (_pass_heads(tap, kind, tensor) for kind, tensor in (("q", query), ("k", key)))
        value = value if tap.takes_pairs else _pass_heads(tap, "v", value)

    def weigh(value: Tensor) -> tuple[Tensor, Tensor | None]:
        z_BTHD, pattern_BHQK = function(module, query, key, value, *args, **kwargs)
        for tap in taps:
            if "pattern" in tap.kinds:
                z_BTHD, pattern_BHQK = _pass_pattern(tap, z_BTHD, pattern_BHQK, value)
        return z_BTHD, pattern_BHQK

    if pair is not None:
        value = pair.pass_values(taps, value, weigh)
    z_BTHD, pattern_BHQK = weigh(value)
    for tap in taps:
        z_BTHD = z_BTHD if tap.takes_pairs else _pass_heads(tap, "z", z_BTHD)
    if pair is not None:
        z_BTHD = pair.pass_outputs(taps, z_BTHD)
    return z_BTHD, pattern_BHQK


@dataclass(eq=False)
class _Pair:
    """Two calls of one module from the same queries and keys, with other values in each.

    Attributes:
        query: What the first call took, as the model gave it.
        key: Likewise.
        first_value: Likewise; later what the taps made of it.
        first_z: The head outputs of the first call, which the model holds: they are changed in place when the second
            call has shown the other half. None before the first call has ended.
    """

    query: Tensor
    key: Tensor
    first_value: Tensor
    first_z: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> "_Pair":
        """Return the pair that this call ends, or one that it begins."""
        before = _open_pairs().pop(id(module), None)
        if before is not None and before.query is query and before.key is key and before.first_z is not None:
            return before
        pair = _open_pairs()[id(module)] = cls(query, key, value)
        return pair

    def pass_values(
        self, taps: Iterable[AttentionTap], value: Tensor, weigh: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    ) -> Tensor:
        """Call the taps with the values of both calls; return those of the second, and repeat the first if need be."""
        if self.first_z is None:
            return value
        both = torch.cat([self.first_value, value], -1)
        new, is_read = self._pass(taps, "v", both)
        if is_read and (new is not both or both.requires_grad):
            first, value = torch.split(new, [self.first_value.shape[-1], value.shape[-1]], -1)
            self.first_z.copy_(weigh(first)[0])
        return value

    def pass_outputs(self, taps: Iterable[AttentionTap], z_BTHD: Tensor) -> Tensor:
        """Keep the head outputs of the first call; call the taps with those of both, and return those of the second."""
        if self.first_z is None:
            self.first_z = z_BTHD.clone()  # a function may have saved its own result for the backward pass
            return self.first_z
        both = torch.cat([self.first_z, z_BTHD], -1)
        new, is_read = self._pass(taps, "z", both)
        if is_read and (new is not both or both.requires_grad):
            first, z_BTHD = torch.split(new, [self.first_z.shape[-1], z_BTHD.shape[-1]], -1)
            self.first_z.copy_(first)
        return z_BTHD

    @staticmethod
    def _pass(taps: Iterable[AttentionTap], kind: str, tensor: Tensor) -> tuple[Tensor, bool]:
        """Return what the taps make of a tensor, and whether any of them reads it."""
        is_read = False
        for tap in taps:
            if tap.takes_pairs and kind in tap.kinds:
                tensor, is_read = _pass_heads(tap, kind, tensor), True
        return tensor, is_read


_local = threading.local()


def _open_pairs() -> dict[int, _Pair]:
    """Return the pairs of this thread whose second call has not come, by id of the module."""
    pairs: dict[int, _Pair] = vars(_local).setdefault("pairs", {})
    return pairs


def _pass_heads(tap: AttentionTap, kind: str, tensor: Tensor) -> Tensor:
    if kind not in tap.kinds:
        return tensor
    new = tap(kind, tensor)
    return tensor if new is None else new


def _pass_pattern(
    tap: AttentionTap, z_BTHD: Tensor, pattern_BHQK: Tensor | None, value_BHKD: Tensor
) -> tuple[Tensor, Tensor | None]:
    if pattern_BHQK is None:
        raise CaptureError(
            "a pattern was asked for, and the attention implementation gave none; only 'eager' computes it: do not "
            "change the model's attention implementation while patterns are read"
        )
    new_BHQK = tap("pattern", pattern_BHQK)
    if new_BHQK is None:
        return z_BTHD, pattern_BHQK
    groups = new_BHQK.shape[1] // value_BHKD.shape[1]
    value_BHKD = value_BHKD.repeat_interleave(groups, dim=1) if groups > 1 else value_BHKD
    if not _is_product(z_BTHD.detach(), pattern_BHQK.detach(), value_BHKD.detach()):
        raise CaptureError(
            "a pattern was to be replaced, and this attention does more with it than to weight the values (a sink or a "
            "gate may scale the result), so what would follow from another pattern is not known: replace z instead"
        )
    return torch.matmul(new_BHQK, value_BHKD).transpose(1, 2).contiguous(), new_BHQK


def _is_product(z_BTHD: Tensor, pattern_BHQK: Tensor, value_BHKD: Tensor) -> bool:
    """Return whether the head outputs are the values weighted by the pattern, to rounding."""
    product_BHTD = torch.matmul(pattern_BHQK, value_BHKD)
    size = product_BHTD.abs().amax().clamp_min(torch.finfo(z_BTHD.dtype).tiny)
    slack = max(4 * torch.finfo(z_BTHD.dtype).eps, 1e-5) * size
    is_same = product_BHTD.transpose(1, 2).shape == z_BTHD.shape
    return is_same and bool(((product_BHTD.transpose(1, 2) - z_BTHD).abs() <= slack).all())


@contextmanager
def eager_where_needed(model: nn.Module, sites: Iterable[SiteInfo]) -> Iterator[None]:
    """Switch a model to eager attention if a pattern is among the sites; see `eager_attention`."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or not any(info.site.is_pattern for info in sites):
        yield
        return
    with eager_attention(core) as switched:
        if switched:
            _LOG.warning("patterns need eager attention: the model uses it while they are read")
        yield


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[bool]:
    """Switch a model to eager attention, the only implementation that computes patterns; restore it at the end.

    Args:
        model: Any transformers model; all of its sub-models (text and vision) are switched.

    Yields:
        Whether anything had to be switched.

    Raises:
        CaptureError: The model does not support eager attention.
    """
    before = [(config, attention_implementation(config)) for config in _configs(model)]
    if all(name == "eager" for _, name in before):
        yield False
        return
    try:
        _switch_to_eager(model)
        _LOG.info("%s was switched to eager attention, which alone computes patterns", type(model).__name__)
        yield True
    finally:
        for config, name in before:  # the model's own config is first: setting it also sets its sub-configs
            set_attention_implementation(config, name)


def _switch_to_eager(model: PreTrainedModel) -> None:
    try:
        model.set_attn_implementation("eager")
    except ValueError as error:
        raise CaptureError(
            f"patterns need eager attention, and {type(model).__name__} cannot be switched to it: {error} "
            "Capture q and k instead; the pattern can be computed from them."
        ) from error
    for config in _configs(model):  # Falcon reads the name in its own code, and transformers does not switch it
        if attention_implementation(config) != "eager":
            set_attention_implementation(config, "eager")


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return every config that names an attention implementation, outer ones first."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while pending:
        config = pending.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            inner = (getattr(config, name, None) for name in config.sub_configs)
            pending.extend(each for each in inner if each is not None)
    return list(found.values())
