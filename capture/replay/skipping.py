"""Leaving out the blocks below a layer: each hands on what it gets, and the rest of the model runs as ever.

The list of blocks stays whole, since models pick masks and caches by a block's number; embeddings, rotary tables and
masks are computed as always. In the architectures of the table nothing but the residual stream passes from block to
block; of any other this is proved by running the model on a few tokens with and without.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from residua.capture.forward.inputs import forward_kwargs
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.pipeline_schedule import staged_of
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import Anatomy
from residua.capture.sites.hooks import attached, values_of
from residua.capture.sites.pipeline_stages import target_of
from residua.capture.sites.shape_probe import evaluating
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import CaptureError

_PROBE = (2, 7)  # examples, positions


@dataclass(frozen=True)
class Skip:
    """What leaving blocks out takes.

    Attributes:
        blocks: The blocks that are left out.
        as_tuples: Whether blocks of this model give tuples.
        problem: Why the model cannot do without them; empty where it can.
    """

    blocks: tuple[nn.Module, ...]
    as_tuples: bool = False
    problem: str = ""


_proved: WeakKeyDictionary[nn.Module, dict[int, Skip]] = WeakKeyDictionary()


def skip_below(anatomy: Anatomy, start: int) -> Skip:
    """Find out whether the blocks below `start` can be left out of a model, and how.

    Args:
        anatomy: The model. One of an architecture that is not in the table is run on a few tokens, once.
        start: Number of the first block that has to run; the number of blocks, if none has to.
    """
    here = target_of(anatomy.model).parts
    blocks = tuple(here[path] for path in anatomy.blocks[:start] if path in here)
    if anatomy.family is not None or not start:
        return Skip(blocks)
    if staged_of(anatomy.model) is not None:
        return Skip((), problem="stages of a torch pipeline cannot be tried by themselves")
    known = _proved.setdefault(anatomy.model, {})
    if start not in known:
        known[start] = _probed(anatomy, Skip(blocks))
    return known[start]


@contextmanager
def skipping(skip: Skip) -> Iterator[None]:
    """Leave blocks out inside; afterwards every block has the forward that it had, by whoever it was set."""

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if skip.as_tuples else hidden

    with ExitStack() as stack:
        for block in skip.blocks:
            stack.callback(_restore, core_of(block), vars(core_of(block)).get("forward"))
            vars(core_of(block))["forward"] = hand_on
        yield


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del vars(block)["forward"]
    else:
        vars(block)["forward"] = forward


def _probed(anatomy: Anatomy, skip: Skip) -> Skip:
    """Run with and without the blocks on a few tokens; the logits have to be equal bit for bit."""
    tuples: list[bool] = []
    path = anatomy.blocks[len(skip.blocks) - 1]
    handle = anatomy.parts[path].register_forward_hook(lambda _m, _a, out: tuples.append(isinstance(out, tuple)))
    last = SiteInfo(name=f"resid_post.{len(skip.blocks) - 1}", row_shape=None, dtype=None, module=path, via="output")
    kept: list[Tensor] = []
    try:
        whole = _run(anatomy, last, lambda value: kept.append(value.clone()))
    finally:
        handle.remove()
    found = Skip(skip.blocks, tuples[0])
    try:
        with skipping(found):
            short = _run(anatomy, last, lambda _: kept[0].clone())
        same = torch.equal(whole, short)
    except Exception as error:  # noqa: BLE001  # whatever the model raises without its first blocks: it needs them
        return Skip((), problem=f"it fails without them ({type(error).__name__}: {error})")
    return found if same else Skip((), problem="later blocks use more of them than the residual stream")


def _run(anatomy: Anatomy, site: SiteInfo, replace: Any) -> Tensor:
    ids = torch.arange(_PROBE[0] * _PROBE[1], device=input_device(anatomy.model)).view(_PROBE)
    kwargs = forward_kwargs(anatomy.model, ids, torch.ones_like(ids))
    emit = values_of(lambda _info, value: replace(value))
    with attached(anatomy.parts, [site], emit), torch.no_grad(), evaluating(anatomy.model):
        logits: Tensor | None = getattr(anatomy.model(**kwargs), "logits", None)
    if logits is None:
        raise CaptureError(f"{type(anatomy.model).__name__} gives no logits")
    return logits
