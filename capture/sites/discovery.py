"""The sites of an architecture that is not in the table, found by looking at the model and proved by running it.

Each site is found for itself. It is available with its shape and where it is read, or its ``problem`` says why it is
not; blocks of one model may differ. What has to be proved:

* ``resid_pre`` and ``resid_post``: a block takes what the block before it returned;
* ``q``, ``k``, ``v``, ``z`` and ``pattern``: the block calls transformers' attention interface once, or computes
  attention once in its own code (see `residua.capture.sites.own_attention`);
* ``attn_out``, ``resid_mid``, ``mlp_out``: they add up to what the block returns, in an ordinary run and in one where
  each of them is replaced;
* ``mlp_act``: it is what the last linear map before ``mlp_out`` takes;
* every site holds one entry for each token.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from residua.capture.hooks.forward_call import probing
from residua.capture.hooks.hooks import attached, values_of
from residua.capture.hooks.own_attention import OwnAttention
from residua.capture.hooks.site import SiteInfo, Via
from residua.capture.runtime.wrappers import named_modules
from residua.capture.sites.anatomy import ATTENTION_KINDS, Anatomy, are_checkpointable
from residua.capture.sites.architectures import SIDE_BY_SIDE
from residua.capture.sites.block_parts import Part, Parts, is_sum, parts_of
from residua.capture.sites.block_run import BlockRun, BlockWatch
from residua.capture.sites.own_attention import find_own_attention
from residua.capture.sites.shape_probe import measure_sites, probes_of, run_probe, without_rows
from residua.store.base.errors import CaptureError
from residua.store.format.site_names import LAYER_KINDS

PART_KINDS = ("attn_out", "resid_mid", "mlp_act", "mlp_out")
"""Kinds that are found by what adds up to a block's output."""


@dataclass(frozen=True, kw_only=True)
class _BlockParts:
    """The parts of one block, and its sites.

    Attributes:
        parts: The parts; None if none add up to what the block returns.
        sites: From name to site, one of each of `PART_KINDS`; one that the block lacks has a ``problem``.
    """

    parts: Parts | None
    sites: dict[str, SiteInfo]


def discover(model: nn.Module, anatomy: Anatomy, kinds: Collection[str]) -> dict[str, SiteInfo]:
    """Find the sites of these kinds by running a model on a few tokens or images, two or three times.

    Args:
        model: The model, in its wrappers.
        anatomy: Its blocks, embedding and head.
        kinds: Kinds of sites to look for; the others are left out.

    Returns:
        From name to site, in the order in which the model computes them. One that the model lacks has a ``problem``.
    """
    wants_parts = any(kind in kinds for kind in PART_KINDS)
    watch = BlockWatch(anatomy.modules, anatomy.blocks, _PartFinder(anatomy.blocks) if wants_parts else None)
    streams = ("resid_pre", "resid_post", "final") if wants_parts else ()
    chosen = {name: info for name, info in _candidates(anatomy).items() if info.site.kind in (*kinds, *streams)}
    try:
        measured = measure_sites(model, chosen, watch)
        measured |= _of_own_attention(model, anatomy, measured)
        found = {name: _proved(anatomy, info, watch) for name, info in measured.items()}
        parts = _parts(model, anatomy, watch.found, found) if wants_parts else {}
    except CaptureError as error:
        found = {name: without_rows(info, str(error), n_met=0) for name, info in chosen.items()}
        parts = _no_parts(anatomy, str(error))
    return {name: info for name, info in _in_order(anatomy, found | parts).items() if info.site.kind in kinds}


def _of_own_attention(model: nn.Module, anatomy: Anatomy, measured: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    """Return the attention sites of the blocks that call no interface, measured where their own code computes them."""
    unmet = {name: info for name, info in measured.items() if info.via == "attention" and info.n_met == 0}
    blocks = {info.module: anatomy.modules[info.module] for info in unmet.values()}
    if not blocks:
        return {}
    probe = probes_of(model)[1]
    found = find_own_attention(anatomy.model, blocks, probe, partial(run_probe, model, probe))
    sites = {
        name: _in_own_code(info, found.get(info.module, f"{info.module} did not run")) for name, info in unmet.items()
    }
    own = {name: info for name, info in sites.items() if not info.problem}
    return sites | (measure_sites(model, own) if own else {})


def _in_own_code(info: SiteInfo, own: OwnAttention | str) -> SiteInfo:
    if isinstance(own, str):
        return without_rows(info, f"Site {info.name!r} was not met: {own}", n_met=0)
    if own.values is not None and own.scores is None and info.site.kind in ("q", "k"):
        return without_rows(info, f"the scores of {own.module} are no single product of queries and keys", n_met=0)
    if own.values is None and info.site.kind == "pattern":
        return without_rows(
            info,
            f"{own.module} computes its attention by one fused call, which gives no pattern; "
            "load the model with attn_implementation='eager'",
            n_met=0,
        )
    return replace(info, own=own, problem="", n_met=None)


def _candidates(anatomy: Anatomy) -> dict[str, SiteInfo]:
    """Return the sites that every language model may have, not yet measured."""
    model, path = anatomy.model, anatomy.path(_embedding(anatomy))
    sites = [] if path is None else [_site("embed", path)]
    for layer, block in enumerate(anatomy.blocks):
        sites += [_site(f"resid_pre.{layer}", block, "input"), _site(f"resid_post.{layer}", block)]
        sites += [_site(f"{kind}.{layer}", block, "attention") for kind in ATTENTION_KINDS]
    sites.append(_site("final", anatomy.blocks[-1]))
    if model.get_output_embeddings() is not None:  # type: ignore[no-untyped-call]  # transformers has no annotations here
        sites.append(_site("logits", "", "logits"))
    return {info.name: info for info in sites}


def _embedding(anatomy: Anatomy) -> nn.Module | None:
    try:
        return anatomy.model.get_input_embeddings()
    except NotImplementedError:  # transformers' way to say that it does not know
        return None


def _site(name: str, module: str, via: Via = "output") -> SiteInfo:
    return SiteInfo(name=name, row_shape=None, dtype=None, module=module, via=via)


def _proved(anatomy: Anatomy, info: SiteInfo, watch: BlockWatch[_BlockParts]) -> SiteInfo:
    """Return a measured site, with a problem if it does not hold the tokens of a residual stream as it should."""
    if info.problem:
        return info
    if not info.per_token:
        return without_rows(info, f"{info.where} does not hold one entry for each token", n_met=info.n_met)
    kind, last = info.site.kind, len(anatomy.blocks) - 1
    if kind not in ("resid_pre", "resid_post", "final"):
        return info
    layer = last if info.site.layer is None else info.site.layer
    if last == 0:
        problem = "" if are_checkpointable([anatomy.modules[anatomy.blocks[0]]]) else "it is not known to be a block"
    else:
        upper = layer if kind == "resid_pre" else layer + 1
        problem = _broken(anatomy, min(max(upper, 1), last), watch.follows)
    return without_rows(info, problem, n_met=info.n_met) if problem else info


def _broken(anatomy: Anatomy, upper: int, follows: Mapping[str, bool | None]) -> str:
    """Return what speaks against a residual stream between a block and the one below it; empty if nothing does."""
    block, below = anatomy.blocks[upper], anatomy.blocks[upper - 1]
    if follows.get(block):
        return ""
    if block in follows and follows[block] is None:
        return f"whether {block} takes what {below} returns is seen by the values of a run, and there are none here"
    return f"{block} does not take what {below} returns, so these are not known to be blocks of one residual stream"


def _parts(
    model: nn.Module, anatomy: Anatomy, seen: Mapping[str, _BlockParts], found: Mapping[str, SiteInfo]
) -> dict[str, SiteInfo]:
    """Return the sites of the parts of all blocks."""
    is_empty = any(parameter.is_meta for parameter in anatomy.model.parameters()) and not seen
    why = "it is found by the values of a run, and this model has none" if is_empty else ""
    parts = _no_parts(anatomy, why or "no residual stream is known to pass through its block")
    proved = {
        layer: seen[path]
        for layer, path in enumerate(anatomy.blocks)
        if path in seen and not (found[f"resid_pre.{layer}"].problem or found[f"resid_post.{layer}"].problem)
    }
    for block in proved.values():
        parts |= block.sites
    return parts | _unproved(model, anatomy.blocks, proved) if proved else parts


def _no_parts(anatomy: Anatomy, problem: str) -> dict[str, SiteInfo]:
    return {
        f"{kind}.{layer}": _lacking(f"{kind}.{layer}", block, problem)
        for layer, block in enumerate(anatomy.blocks)
        for kind in PART_KINDS
    }


def _in_order(anatomy: Anatomy, sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    of_blocks = [f"{kind}.{layer}" for layer in range(len(anatomy.blocks)) for kind in LAYER_KINDS]
    return {name: sites[name] for name in ("embed", *of_blocks, "final", "logits") if name in sites}


class _PartFinder:
    """Makes sites of the run of each block; blocks of one class are expected to be alike, and looked at anew if not.

    Args:
        blocks: Paths of the blocks in order.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        self._layers = {path: layer for layer, path in enumerate(blocks)}
        self._known: dict[type[nn.Module], Parts] = {}

    def __call__(self, run: BlockRun) -> _BlockParts:
        """Find the parts of one block."""
        kind = type(run.module)
        parts = parts_of(run, self._known.get(kind))
        if parts is not None:
            self._known[kind] = parts
        layer = self._layers[run.path]
        return _BlockParts(
            parts=parts, sites={f"{kind}.{layer}": _part_site(run, kind, layer, parts) for kind in PART_KINDS}
        )


def _lacking(name: str, block: str, problem: str) -> SiteInfo:
    """Return a site that a block lacks, and the reason."""
    return SiteInfo(name=name, row_shape=None, dtype=None, module=block, via="output", per_token=False, problem=problem)


def _part_site(run: BlockRun, kind: str, layer: int, parts: Parts | None) -> SiteInfo:
    name = f"{kind}.{layer}"
    if parts is None:
        return _lacking(
            name, run.path, f"no outputs of modules in {run.path} were found that add up to what it adds to its input"
        )
    if kind == "resid_mid":
        return _middle(run, name, parts)
    if kind == "mlp_act":
        return _activations(run, name, parts)
    part = parts.attention if kind == "attn_out" else parts.mlp
    if part is None:
        first = f"module:{run.path}.{parts.first.path}@output"
        what = "computes no attention" if kind == "attn_out" else "has one part only, or its MLP is not told apart"
        return _lacking(name, run.path, f"{run.path} {what}; what it adds first is {first}")
    if part.factor != 1:
        return _lacking(
            name,
            run.path,
            f"{run.path} adds {part.factor:.5g} times what {part.path} gives; use module:{run.path}.{part.path}@output "
            "and multiply",
        )
    return _of_stream(run, name, part.path, "output", flat=part.flat)


def _of_stream(run: BlockRun, name: str, path: str, via: Via, *, flat: bool) -> SiteInfo:
    return SiteInfo(
        name=name,
        row_shape=tuple(run.entered.shape[2:]),
        dtype=str(run.entered.dtype).removeprefix("torch."),
        module=f"{run.path}.{path}",
        via=via,
        flat=flat,
        n_met=1,
    )


def _middle(run: BlockRun, name: str, parts: Parts) -> SiteInfo:
    if parts.middle is None:
        reason = SIDE_BY_SIDE if parts.order == "side by side" else f"{run.path} has one part only"
        return _lacking(name, run.path, reason)
    via: Via = "stream" if parts.order == "in turn" else "output"
    return _of_stream(run, name, parts.middle.path, via, flat=parts.middle.flat)


def _activations(run: BlockRun, name: str, parts: Parts) -> SiteInfo:
    if parts.activation is None:
        return _lacking(
            name,
            run.path,
            f"no linear map in {run.path} gives mlp_out of all tokens (a mixture of experts has hidden activations "
            "only inside its experts); use mlp_out, or module: sites of the experts",
        )
    shape, dtype = run.shapes[parts.activation]
    flat = len(shape) < run.entered.ndim
    return SiteInfo(
        name=name,
        row_shape=shape[1 if flat else 2 :],
        dtype=str(dtype).removeprefix("torch."),
        module=f"{run.path}.{parts.activation}",
        via="input",
        flat=flat,
        n_met=1,
    )


def _unproved(model: nn.Module, blocks: Sequence[str], found: Mapping[int, _BlockParts]) -> dict[str, SiteInfo]:
    """Run the model with another value at each part of the blocks, and return the sites for which sums do not follow.

    Args:
        model: The model.
        blocks: Paths of its blocks.
        found: The parts of each block.

    Returns:
        From name to site, each with a ``problem``.

    Raises:
        CaptureError: The model does not run.
    """
    given: dict[str, Tensor] = {}
    put: dict[str, Tensor] = {}

    def exchange(info: SiteInfo, tensor: Tensor) -> Tensor | None:
        given[info.name] = put[info.name] = tensor.clone()
        if info.site.kind not in PART_KINDS:
            return None
        put[info.name] = tensor + _disturbance(tensor)
        return put[info.name]

    trials = {layer: _Trial(blocks[layer], layer, block.parts) for layer, block in found.items() if block.parts}
    sites = [info for trial in trials.values() for info in trial.sites]
    with probing(), attached(named_modules(model), sites, values_of(exchange)):
        run_probe(model, probes_of(model)[0])
    lost: dict[str, SiteInfo] = {}
    for layer, trial in trials.items():
        for kind in trial.failed(given, put):
            name = f"{kind}.{layer}"
            reason = f"another value at {found[layer].sites[name].where} does not change the sums of {blocks[layer]}"
            lost[name] = _lacking(name, blocks[layer], reason)
    return lost


def _disturbance(tensor: Tensor) -> Tensor:
    """Return numbers as large as the tensor's, which differ from place to place; no random numbers are used up."""
    steps = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    return ((steps % 7 - 3) * (tensor.float().std() / 2)).to(tensor.dtype)


class _Trial:
    """The places of one block whose values have to add up."""

    def __init__(self, block: str, layer: int, parts: Parts) -> None:
        self._parts = parts
        self._at = {"x": f"module:{block}@input", "y": f"module:{block}@output", "first": f"attn_out.{layer}"}
        self.sites = [_place(self._at["x"], block, "input"), _of_part(self._at["first"], block, parts.first)]
        if parts.second is not None:
            self._at["second"] = f"mlp_out.{layer}"
            self.sites.append(_of_part(self._at["second"], block, parts.second))
        if parts.norms is not None:
            for key, path in zip(("sum 1", "sum 2"), parts.norms, strict=True):
                self._at[key] = f"module:{block}.{path}@input"
                self.sites.append(_place(self._at[key], f"{block}.{path}", "input"))
        if parts.middle is not None:
            self._at["middle"] = f"resid_mid.{layer}"
            via: Via = "stream" if parts.order == "in turn" else "output"
            self.sites.append(_place(self._at["middle"], f"{block}.{parts.middle.path}", via))
        self.sites.append(_place(self._at["y"], block, "output"))

    def failed(self, given: Mapping[str, Tensor], put: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the kinds of sites for which the sums do not follow what was put in."""
        if not all(name in given for name in self._at.values()):
            return PART_KINDS
        parts, at = self._parts, self._at
        x, y = given[at["x"]], given[at["y"]]
        first = _scaled(put[at["first"]], parts.first, x)
        second = None if parts.second is None else _scaled(put[at["second"]], parts.second, x)
        if second is None:
            return () if is_sum(y, x, first) else PART_KINDS
        if parts.middle is None:
            return () if is_sum(y, x, first, second) else PART_KINDS
        middle, after = given[at["middle"]].view_as(x), put[at["middle"]].view_as(x)
        if parts.norms is not None:
            is_first = is_sum(given[at["sum 1"]].view_as(x), x, first)
            is_second = is_sum(given[at["sum 2"]].view_as(x), after, second)
        else:
            is_first, is_second = is_sum(middle, x, first), is_sum(y, after, second)
        if is_first and is_second:
            return ()
        one, other = ("attn_out",), ("mlp_out", "mlp_act")
        if parts.attention is parts.second:
            one, other = other, one  # type: ignore[assignment]  # tuples of different lengths
        return ("resid_mid", *(() if is_first else one), *(() if is_second else other))


def _scaled(tensor: Tensor, part: Part, like: Tensor) -> Tensor:
    return part.factor * tensor.double().view_as(like)


def _of_part(name: str, block: str, part: Part) -> SiteInfo:
    return _place(name, f"{block}.{part.path}", "output")


def _place(name: str, module: str, via: Via) -> SiteInfo:
    return SiteInfo(name=name, row_shape=None, dtype=None, module=module, via=via)
