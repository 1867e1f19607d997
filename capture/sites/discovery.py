"""The sites of an architecture that is not in the table, found by looking at the model and proved by running it.

Each site is found for itself. It is available with its shape and where it is read, or its ``problem`` says why it is
not; blocks of one model may differ. What has to be proved:

* ``resid_pre`` and ``resid_post``: a block takes what the block before it returned;
* ``q``, ``k``, ``v``, ``z`` and ``pattern``: the block calls transformers' attention interface once, or computes
  attention once in its own code (see `residua.capture.blocks.own_attention`);
* ``attn_out``, ``mixer_out``, ``resid_mid``, ``mlp_out``: they add up to what the block returns, in an ordinary run and
  in one where each of them is replaced; a mixer carries something from one position to another, an MLP does not;
* ``mlp_act``: it is what the last linear map before ``mlp_out`` takes;
* every site holds one entry for each token.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from torch import nn

from residua.capture.blocks.block_run import BlockWatch
from residua.capture.blocks.experts import EXPERT_KINDS
from residua.capture.blocks.head_outputs import HeadOutputsWatch
from residua.capture.blocks.own_attention import find_own_attention
from residua.capture.hooks.own_attention import OwnAttention
from residua.capture.hooks.site import SiteInfo, Via
from residua.capture.sites.anatomy import ATTENTION_KINDS, Anatomy, are_checkpointable
from residua.capture.sites.part_sites import (
    PART_KINDS,
    BlockParts,
    PartFinder,
    expert_sites,
    lacking,
    latent_site,
    sites_of,
)
from residua.capture.sites.part_trials import additions_that_fail, parts_that_mix, routers_that_decide
from residua.capture.sites.shape_probe import measure_sites, probes_of, run_probe, without_rows
from residua.store.base.errors import CaptureError
from residua.store.format.site_names import CROSS_KINDS, LAYER_KINDS

_OF_RUNS = (*PART_KINDS, *EXPERT_KINDS, "kv_latent")
"""Kinds that are found by what one run of each block shows."""

_UNSEEN = "does not run, or the model calls its forward directly, where nothing reads it"


def discover(model: nn.Module, anatomy: Anatomy, kinds: Collection[str]) -> dict[str, SiteInfo]:
    """Find the sites of these kinds by running a model on a few tokens or images, two or three times.

    Args:
        model: The model, in its wrappers.
        anatomy: Its blocks, embedding and head.
        kinds: Kinds of sites to look for; the others are left out.

    Returns:
        From name to site, in the order in which the model computes them. One that the model lacks has a ``problem``.
    """
    kinds = [kind for kind in kinds if kind not in CROSS_KINDS or (kind == "cross_attn_out" and anatomy.cross)]
    cross = dict(zip(anatomy.blocks, anatomy.cross, strict=False))
    wants_parts = any(kind in kinds for kind in _OF_RUNS)
    watch = BlockWatch(anatomy.modules, anatomy.blocks, PartFinder(cross) if wants_parts else None)
    streams = ("resid_pre", "resid_post", "final") if wants_parts else ()
    chosen = {name: info for name, info in _candidates(anatomy).items() if info.site.kind in (*kinds, *streams)}
    try:
        blocks = [info.module for info in chosen.values() if info.site.kind == "z"]
        heads = HeadOutputsWatch(anatomy.modules, blocks)
        measured = measure_sites(model, chosen, _together(watch, heads))
        measured = {
            name: replace(info, note=_OF_A_PAIR if info.is_pair else heads.note(info.module))
            if info.site.kind == "z"
            else info
            for name, info in measured.items()
        }
        measured |= _of_own_attention(model, anatomy, measured)
        found = {name: _proved(anatomy, info, watch) for name, info in measured.items()}
        parts = _parts(model, anatomy, watch.found, found) if wants_parts else {}
    except CaptureError as error:
        found = {name: without_rows(info, str(error), n_met=0) for name, info in chosen.items()}
        parts = _no_parts(anatomy, str(error))
    return {name: info for name, info in _in_order(anatomy, found | parts).items() if info.site.kind in kinds}


_OF_A_PAIR = (
    "z is what each softmax gives, before the model subtracts the head outputs of the second half of the heads, times "
    "its lambda, from those of the first and normalises the difference; what its output projection takes is its "
    "module: site, @input"
)


@contextmanager
def _together(*contexts: AbstractContextManager[object]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield


def _of_own_attention(model: nn.Module, anatomy: Anatomy, measured: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    """Return the attention sites of the blocks that call no interface, measured where their own code computes them."""
    unmet = {name: info for name, info in measured.items() if info.via == "attention" and info.n_met == 0}
    blocks = {info.module: anatomy.modules[info.module] for info in unmet.values()}
    if not blocks:
        return {}
    probe = probes_of(model)[1]
    found = find_own_attention(anatomy.model, blocks, probe, partial(run_probe, model, probe))
    sites = {
        name: _in_own_code(info, found.get(info.module, f"{info.module} {_UNSEEN}")) for name, info in unmet.items()
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
        attention = anatomy.attention[layer] if anatomy.attention else block
        sites += [_site(f"{kind}.{layer}", attention, "attention") for kind in ATTENTION_KINDS]
    sites += [_site("final", block) for block in anatomy.blocks[-1:]]
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


def _proved(anatomy: Anatomy, info: SiteInfo, watch: BlockWatch[BlockParts]) -> SiteInfo:
    """Return a measured site, with a problem if it does not hold the tokens of a residual stream as it should."""
    if info.problem:
        return info
    if not info.per_token:
        return without_rows(info, f"{info.where} does not hold one entry for each token", n_met=info.n_met)
    kind, last = info.site.kind, len(anatomy.blocks) - 1
    if kind not in ("resid_pre", "resid_post", "final"):
        return info
    if kind == "final" and info.streams:
        problem = f"the streams of the last block become one after it; use resid_post.{last}, which holds them all"
        return without_rows(info, problem, n_met=info.n_met)
    layer = last if info.site.layer is None else info.site.layer
    if last == 0:
        problem = "" if are_checkpointable([anatomy.modules[anatomy.blocks[0]]]) else "it is not known to be a block"
    else:
        upper = layer if kind == "resid_pre" else layer + 1
        problem = _broken(anatomy, min(max(upper, 1), last), watch.follows)
    return without_rows(info, problem, n_met=info.n_met) if problem else info


def _broken(anatomy: Anatomy, upper: int, follows: Mapping[str, bool | None]) -> str:
    """Return what speaks against a residual stream between a block and the one below it; empty if nothing does.

    A block that does not run on tokens alone, such as one that attends to an image, is passed by.
    """
    ran = [number for number in range(upper, len(anatomy.blocks)) if anatomy.blocks[number] in follows]
    upper = next(iter(ran), upper)
    block, below = anatomy.blocks[upper], anatomy.blocks[upper - 1]
    if follows.get(block):
        return ""
    if block in follows and follows[block] is None:
        return f"whether {block} takes what {below} returns is seen by the values of a run, and there are none here"
    return f"{block} does not take what {below} returns, so these are not known to be blocks of one residual stream"


def _parts(
    model: nn.Module, anatomy: Anatomy, seen: Mapping[str, BlockParts], found: Mapping[str, SiteInfo]
) -> dict[str, SiteInfo]:
    """Return the sites of the parts of all blocks."""
    is_empty = any(parameter.is_meta for parameter in anatomy.model.parameters()) and not seen
    why = "it is found by the values of a run, and this model has none" if is_empty else ""
    sites = _no_parts(anatomy, why or "no residual stream is known to pass through its block")
    streams = {
        path: layer
        for layer, path in enumerate(anatomy.blocks)
        if path in seen and not (found[f"resid_pre.{layer}"].problem or found[f"resid_post.{layer}"].problem)
    }
    blocks = {path: seen[path].parts for path in streams}
    proved = {path: parts for path, parts in blocks.items() if parts is not None}
    failed = additions_that_fail(model, proved) if proved else {}
    mixing = parts_that_mix(model, {path: proved[path] for path in proved if not seen[path].is_told_apart})
    decide = routers_that_decide(model, {path: seen[path].experts for path in seen})
    for layer, path in enumerate(anatomy.blocks):
        made = [] if path not in seen else expert_sites(layer, path, seen[path].experts, decides=path in decide)
        made += [latent_site(layer, path, seen[path].latent)] if path in seen else []
        if path in streams:
            made += sites_of(layer, seen[path], mixing.get(path, ()), failed.get(path, ()), anatomy.modules)
        sites |= {info.name: info for info in made}
    return sites


def _no_parts(anatomy: Anatomy, problem: str) -> dict[str, SiteInfo]:
    return {
        f"{kind}.{layer}": lacking(f"{kind}.{layer}", block, problem)
        for layer, block in enumerate(anatomy.blocks)
        for kind in _OF_RUNS
    }


def _in_order(anatomy: Anatomy, sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    of_blocks = [f"{kind}.{layer}" for layer in range(len(anatomy.blocks)) for kind in LAYER_KINDS]
    return {name: sites[name] for name in ("embed", *of_blocks, "final", "logits") if name in sites}
