"""Queries, keys, values, heads and patterns, through transformers' attention interface.

Every attention module of transformers 5 asks ``AttentionInterface.get_interface`` for the function that does
its attention (sdpa, eager, flash, ...) and hands it post-rotary queries and keys. While `intercepting` is
active we stand between: the function that the model gets is its own, wrapped. The implementation keeps its
name, so everything that a model decides by that name stays as it was - masks above all, and GPT-2's choice of
an upcast kernel - and the values are those of a run without us, bit for bit. For the same reason nothing is
added to the registries of functions or masks: there is nothing to restore in them.

Axes: `B` examples, `H` heads, `T` or `Q` query positions, `K` key positions, `D` width of a head.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from residua.capture.runtime.compat import attention_implementation, set_attention_implementation
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import CaptureError

_LOG = logging.getLogger(__name__)

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionTap(Protocol):
    """What is called with each tensor of one attention module.

    ``parts`` names those that are wanted; ``part`` is one of ``q``, ``k``, ``v``, ``z``, ``pattern``. The
    tensor is as the model has it: (batch, positions, heads, head width) for ``z``, heads in front of positions
    for the others. What comes back replaces it unless it is None.
    """

    parts: frozenset[str]

    def __call__(self, part: str, tensor: Tensor) -> Tensor | None:
        """Take one tensor, and give one back to replace it."""

    def told(self, arguments: Mapping[str, Any]) -> None:
        """Take the keywords that the attention function is called with: scaling, softcap, sliding_window, ..."""
        del arguments  # few taps care


_lock = threading.Lock()
_taps: dict[int, list[AttentionTap]] = {}  # by id of the attention module, which the model keeps alive
_original: list[Callable[..., AttentionFunction]] = []  # what we stand in front of, while we do so


@contextmanager
def intercepting(taps: Mapping[nn.Module, AttentionTap]) -> Iterator[None]:
    """Call ``taps[module]`` whenever one of these modules does attention through the interface.

    Args:
        taps: What to call for each attention module; any module may be a key, those that never do attention
            through the interface are never called.
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
        yield
    finally:
        with _lock:
            for module, tap in taps.items():
                _taps[id(module)].remove(tap)
                if not _taps[id(module)]:
                    del _taps[id(module)]
            if not _taps:
                setattr(AttentionInterface, "get_interface", _original.pop())  # noqa: B010 - see above


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
    """Do one module's attention with its own function, past the taps."""
    taps = tuple(_taps.get(id(module), ()))
    for tap in taps:
        tap.told(kwargs)
        query, key, value = (
            _pass_heads(tap, part, tensor) for part, tensor in (("q", query), ("k", key), ("v", value))
        )
    z_BTHD, pattern_BHQK = function(module, query, key, value, *args, **kwargs)
    for tap in taps:
        if "pattern" in tap.parts:
            z_BTHD, pattern_BHQK = _pass_pattern(tap, z_BTHD, pattern_BHQK, value)
        if "z" in tap.parts and (new_BTHD := tap("z", z_BTHD)) is not None:
            z_BTHD = new_BTHD
    return z_BTHD, pattern_BHQK


def _pass_heads(tap: AttentionTap, part: str, tensor_BHTD: Tensor) -> Tensor:
    if part not in tap.parts:
        return tensor_BHTD
    new_BHTD = tap(part, tensor_BHTD)
    return tensor_BHTD if new_BHTD is None else new_BHTD


def _pass_pattern(
    tap: AttentionTap, z_BTHD: Tensor, pattern_BHQK: Tensor | None, value_BHKD: Tensor
) -> tuple[Tensor, Tensor | None]:
    if pattern_BHQK is None:
        raise CaptureError(
            "A pattern was asked for and the attention implementation gave none; only 'eager' computes it. "
            "Leave the implementation alone while patterns are read."
        )
    new_BHQK = tap("pattern", pattern_BHQK)
    if new_BHQK is None:
        return z_BTHD, pattern_BHQK
    groups = new_BHQK.shape[1] // value_BHKD.shape[1]
    value_BHKD = value_BHKD.repeat_interleave(groups, dim=1) if groups > 1 else value_BHKD
    return torch.matmul(new_BHQK, value_BHKD).transpose(1, 2).contiguous(), new_BHQK


@contextmanager
def eager_where_needed(model: nn.Module, sites: Iterable[SiteInfo]) -> Iterator[bool]:
    """Let a model use eager attention if a pattern is among the sites; see `eager_attention`."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or all(info.site.kind != "pattern" for info in sites):
        yield False
        return
    with eager_attention(core) as switched:
        if switched:
            _LOG.warning("patterns need eager attention: the model uses it while they are read")
        yield switched


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[bool]:
    """Let the whole model use eager attention, the only implementation that computes patterns.

    Args:
        model: Any transformers model; models of several parts (text and vision) are switched as a whole.

    Yields:
        Whether anything had to be switched. Leaving puts every part back to what it had.

    Raises:
        CaptureError: The model does not let itself be switched.
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
        for config, name in before:  # the model's own comes first: setting it would set its parts too
            set_attention_implementation(config, name)


def _switch_to_eager(model: PreTrainedModel) -> None:
    try:
        model.set_attn_implementation("eager")
    except ValueError as error:
        raise CaptureError(
            f"Patterns need eager attention, and {type(model).__name__} cannot be switched to it: {error} "
            "Capture q and k instead; the pattern follows from them."
        ) from error


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config that names an attention implementation, outer ones first."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while pending:
        config = pending.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in config.sub_configs)
            pending.extend(part for part in parts if part is not None)
    return list(found.values())
