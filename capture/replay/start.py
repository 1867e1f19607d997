"""Where a replay starts: which blocks it can skip, how it skips them, and why a batch has to run in full.

The residual stream between two blocks holds all that later blocks need of earlier ones. If rows go in there (at
``resid_pre``, ``resid_mid``, ``resid_post`` or ``final``) for every token, the blocks below are not needed. Rows at any
other site are only a part of what its block passes on, and the model runs in full.

A skipped block returns its input. It stays in the list of blocks, because models choose masks and caches by a block's
number; embeddings, rotary tables and masks are computed as always. In the architectures of the table only the residual
stream passes from block to block. Any other architecture has to prove it: the model runs on a few tokens with the
blocks and without them, and the logits have to be equal bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residua.capture.forward.inputs import forward_kwargs
from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.hooks.hooks import attached, values_of
from residua.capture.hooks.site import SiteInfo
from residua.capture.identity.few_tokens import logits_of
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.instance_attributes import instance_attribute
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.wrappers import core_of, evaluating
from residua.capture.sites.anatomy import Anatomy
from residua.capture.sites.frames import FRAMES, few_frames, takes_frames
from residua.capture.sites.pipeline_stages import target_of
from residua.capture.sites.stacks import stacks_of
from residua.store.base.errors import CaptureError, PlanError
from residua.store.format.site_names import LAYER_KINDS, Site, parse_site

_PROBE_SHAPE = (2, 7)  # examples, positions


@dataclass(frozen=True)
class StackStart:
    """Where stored rows go into the residual stream of one stack.

    Attributes:
        stack: Name of the stack; empty for a model of one.
        anatomy: Its blocks.
        block: The first block that has to run if every token has its row; 0 if all have to.
        site: The site below which nothing has to run; None if there is none.
    """

    stack: str
    anatomy: Anatomy
    block: int = 0
    site: Site | None = None

    def is_below(self, site: Site) -> bool:
        """Return whether a site lies below `site` in this stack."""
        if self.site is None:
            return False
        if site.kind == "module":
            return any(f"{site.module}.".startswith(f"{path}.") for path in self.anatomy.blocks[: self.block])
        if self.stack and site.stack != self.stack:
            return False
        n_blocks = len(self.anatomy.blocks)
        return _order(site, n_blocks) < _order(self.site, n_blocks)


@dataclass(frozen=True)
class Start:
    """Where stored rows go in.

    Attributes:
        sites: The sites that take them, in the model's order.
        stacks: Where that is in each stack of the model.
    """

    sites: tuple[str, ...]
    stacks: tuple[StackStart, ...]

    @property
    def n_blocks_below(self) -> int:
        """Number of blocks that need not run if every token has its row."""
        return sum(one.block for one in self.stacks)

    def above(self, name: str) -> Site | None:
        """Return the site with rows that go in above a site, so that nothing of it reaches the logits, if any."""
        if name in self.sites:
            return None
        site = parse_site(name)
        return next((one.site for one in self.stacks if one.is_below(site)), None)


def start_of(sites: Sequence[str], anatomies: Mapping[str, Anatomy]) -> Start:
    """Return where a replay starts whose stored rows go in at `sites`.

    Args:
        sites: The sites, in the model's order.
        anatomies: The blocks of each stack of the model.

    Raises:
        PlanError: Rows go in below a site of the residual stream of the same stack that takes rows too.
    """
    return Start(tuple(sites), tuple(_start_in(stack, sites, anatomy) for stack, anatomy in anatomies.items()))


def _start_in(stack: str, sites: Sequence[str], anatomy: Anatomy) -> StackStart:
    n_blocks = len(anatomy.blocks)
    own = [site for site in map(parse_site, sites) if not stack or site.stack == stack]
    streams = [site for site in own if _first_block(site, n_blocks) is not None]
    if not streams:
        return StackStart(stack, anatomy)
    top = max(streams, key=lambda site: _order(site, n_blocks))
    below = [site for site in own if site != top and _order(site, n_blocks) < _order(top, n_blocks)]
    if below:
        raise PlanError(f"rows put in at {top} replace all that follows from those at {below[0]}: name one of the two")
    return StackStart(stack, anatomy, _first_block(top, n_blocks) or 0, top)


def _first_block(site: Site, n_blocks: int) -> int | None:
    """Return the first block above a site of the residual stream; None for any other site."""
    if site.kind == "final":
        return n_blocks
    if site.kind == "resid_post":
        return (site.layer or 0) + 1
    return site.layer if site.kind in ("resid_pre", "resid_mid") else None


def _order(site: Site, n_blocks: int) -> tuple[int, int]:
    """Return the place of a site in the model; ``final`` comes directly after ``resid_post`` of the last block."""
    if site.layer is not None:
        return site.layer, LAYER_KINDS.index(site.kind)
    if site.kind == "embed":
        return -1, 0
    return (n_blocks - 1, len(LAYER_KINDS)) if site.kind == "final" else (n_blocks, 0)


@dataclass(frozen=True)
class Skip:
    """The blocks that a pass skips.

    Attributes:
        blocks: The blocks.
        as_tuples: Those of them that return tuples.
        problem: If rows go in and no block can be skipped, the reason, as a sentence; else empty.
    """

    blocks: tuple[nn.Module, ...]
    as_tuples: tuple[nn.Module, ...] = ()
    problem: str = ""


_skips_below: WeakKeyDictionary[nn.Module, dict[tuple[str, int], Skip]] = WeakKeyDictionary()
"""Results of `_probe`, by model, stack and first block."""


def skip_for(start: Start, batch: PlanBatch) -> Skip:
    """Return the blocks that a batch can skip.

    A model whose architecture is not in the table runs on a few tokens, once.
    """
    if start.sites and not any(one.site for one in start.stacks):
        sites = ", ".join(start.sites)
        return Skip((), problem=f"{sites} is only a part of what its block passes on, so the model ran in full")
    found = [_skip_in(one, batch.of_stack(one.stack)) for one in start.stacks if one.site is not None]
    return Skip(
        blocks=tuple(block for skip in found for block in skip.blocks),
        as_tuples=tuple(block for skip in found for block in skip.as_tuples),
        problem=" ".join(dict.fromkeys(skip.problem for skip in found if skip.problem)),
    )


def _skip_in(start: StackStart, batch: PlanBatch) -> Skip:
    """Return the blocks of one stack that can be skipped; `batch` has its positions."""
    problem = _why_in_full(start, batch)
    if problem or not start.block:
        return Skip((), problem=problem)
    return skip_below(start.anatomy, start.block, stack=start.stack)


def skip_below(anatomy: Anatomy, block: int, *, stack: str = "") -> Skip:
    """Return the blocks of a stack below `block` that can be skipped if every token has its row.

    A model whose architecture is not in the table runs on a few tokens, once.
    """
    model = anatomy.model
    here = target_of(model).modules
    skip = Skip(tuple(here[path] for path in anatomy.blocks[:block] if path in here))
    if anatomy.family is not None:
        return skip
    if stage_model_of(model) is not None:
        return _cannot_skip(anatomy, "the stages of a torch pipeline cannot be tried one by one")
    known = _skips_below.setdefault(model, {})
    case = (stack, block)
    if case not in known:
        known[case] = _probe(anatomy, skip)
    return known[case]


def _why_in_full(start: StackStart, batch: PlanBatch) -> str:
    """Return why a batch has to run in full although rows go in; empty if it may skip blocks."""
    anatomy = start.anatomy
    short = [example for example in batch.rows if len(example.positions) < len(example.input_ids)]
    if short:
        return (
            f"example {short[0].example} has {len(short[0].positions)} of {len(short[0].input_ids)} tokens in the "
            "archive: the model ran in full, and the stored rows replaced what it computed for them"
        )
    has_experts = any(path.endswith(".experts") for path in anatomy.modules)
    if start.block and has_experts and any(len(example.input_ids) < batch.n_positions for example in batch.rows):
        return (
            f"{type(anatomy.model).__name__} ran in full: its experts take padding along with tokens, which changes "
            "the last bits, and rows of padding are not stored. Examples of equal length need no padding."
        )
    return ""


def _cannot_skip(anatomy: Anatomy, reason: str) -> Skip:
    return Skip((), problem=f"{type(anatomy.model).__name__} cannot leave out its lower blocks: {reason}")


@contextmanager
def skipping(skip: Skip) -> Iterator[None]:
    """Skip blocks inside; afterwards every block has its own forward again, also one that was set by hand."""

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    with ExitStack() as stack:
        for block in skip.blocks:
            is_tuple = any(block is one for one in skip.as_tuples)
            forward = (lambda *args, **kwargs: (pass_on(*args, **kwargs),)) if is_tuple else pass_on
            stack.enter_context(instance_attribute(core_of(block), "forward", forward))
        yield


def _probe(anatomy: Anatomy, skip: Skip) -> Skip:
    """Run the model on a few tokens with the blocks and without them, and compare its output bit for bit."""
    returns_tuples: list[bool] = []
    path = anatomy.blocks[len(skip.blocks) - 1]
    handle = anatomy.modules[path].register_forward_hook(
        lambda _m, _a, out: returns_tuples.append(isinstance(out, tuple))
    )
    last = SiteInfo(name=f"resid_post.{len(skip.blocks) - 1}", row_shape=None, dtype=None, module=path, via="output")
    kept: list[Tensor] = []
    try:
        in_full = _probe_logits(anatomy, last, lambda value: kept.append(value.clone()))
    finally:
        handle.remove()
    found = Skip(skip.blocks, skip.blocks if returns_tuples[0] else ())
    try:
        with skipping(found):
            is_equal = torch.equal(in_full, _probe_logits(anatomy, last, lambda _: kept[0].clone()))
    except Exception as error:  # noqa: BLE001  # whatever a model raises without its lower blocks: it needs them
        return _cannot_skip(anatomy, f"it fails without them ({type(error).__name__}: {error})")
    if is_equal:
        return found
    return _cannot_skip(anatomy, "later blocks use more of them than the residual stream")


def _probe_logits(anatomy: Anatomy, site: SiteInfo, replace: Any) -> Tensor:
    ids = torch.arange(_PROBE_SHAPE[0] * _PROBE_SHAPE[1], device=input_device(anatomy.model)).view(_PROBE_SHAPE)
    kwargs = {**forward_kwargs(anatomy.model, ids, torch.ones_like(ids)), **_frames(anatomy.model, len(ids))}
    emit = values_of(lambda _info, value: replace(value))
    with attached(anatomy.modules, [site], emit), torch.no_grad(), evaluating(anatomy.model):
        logits = logits_of(anatomy.model(**kwargs))
    if logits is None:
        raise CaptureError(f"{type(anatomy.model).__name__} gives no logits and no hidden states")
    return logits


def _frames(model: PreTrainedModel, n_examples: int) -> dict[str, Tensor]:
    """Return what an encoder over audio needs for a few examples; nothing for any other model."""
    encoder = next((stack.module for stack in stacks_of(model) if takes_frames(stack.module)), None)
    return {} if encoder is None else {FRAMES: few_frames(encoder, n_examples)}
