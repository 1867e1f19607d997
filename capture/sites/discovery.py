"""The sites of an architecture that is not in the table, found by looking at the model and proved by running it.

Each site is found for itself. It is available with its shape and where it is read, or its ``problem`` says why it is
not; blocks of one model may differ. What has to be proved:

* ``resid_pre`` and ``resid_post``: a block takes what the block before it returned;
* ``q``, ``k``, ``v``, ``z`` and ``pattern``: the block calls transformers' attention interface once;
* ``attn_out``, ``resid_mid``, ``mlp_out``: they add up to what the block returns, in an ordinary run and in one where
  each of them is replaced (see `residua.capture.sites.part_sites`);
* ``mlp_act``: it is what the last linear map before ``mlp_out`` takes;
* every site holds one entry for each token.
"""

from collections.abc import Collection, Mapping

from torch import nn

from residua.capture.sites.anatomy import ATTENTION_KINDS, Anatomy, are_checkpointable
from residua.capture.sites.block_run import BlockWatch
from residua.capture.sites.part_sites import PART_KINDS, BlockParts, PartFinder, lacking, unproved
from residua.capture.sites.shape_probe import measure_sites, without_rows
from residua.capture.sites.site import SiteInfo, Via
from residua.store.base.errors import CaptureError
from residua.store.format.site_names import LAYER_KINDS


def discover(model: nn.Module, anatomy: Anatomy, kinds: Collection[str]) -> dict[str, SiteInfo]:
    """Find the sites of these kinds by running a model on a few tokens, two or three times.

    Args:
        model: The model, in its wrappers.
        anatomy: Its blocks, embedding and head.
        kinds: Kinds of sites to look for; the others are left out.

    Returns:
        From name to site, in the order in which the model computes them. One that the model lacks has a ``problem``.
    """
    wants_parts = any(kind in kinds for kind in PART_KINDS)
    watch = BlockWatch(anatomy.modules, anatomy.blocks, PartFinder(anatomy.blocks) if wants_parts else None)
    streams = ("resid_pre", "resid_post", "final") if wants_parts else ()
    chosen = {name: info for name, info in _candidates(anatomy).items() if info.site.kind in (*kinds, *streams)}
    try:
        measured = measure_sites(model, chosen, watch)
        found = {name: _proved(anatomy, info, watch) for name, info in measured.items()}
        parts = _parts(model, anatomy, watch.found, found) if wants_parts else {}
    except CaptureError as error:
        found = {name: without_rows(info, str(error), n_met=0) for name, info in chosen.items()}
        parts = _no_parts(anatomy, str(error))
    return {name: info for name, info in _in_order(anatomy, found | parts).items() if info.site.kind in kinds}


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


def _proved(anatomy: Anatomy, info: SiteInfo, watch: BlockWatch[BlockParts]) -> SiteInfo:
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
    model: nn.Module, anatomy: Anatomy, seen: Mapping[str, BlockParts], found: Mapping[str, SiteInfo]
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
    return parts | unproved(model, anatomy.blocks, proved)


def _no_parts(anatomy: Anatomy, problem: str) -> dict[str, SiteInfo]:
    return {
        f"{kind}.{layer}": lacking(f"{kind}.{layer}", block, problem)
        for layer, block in enumerate(anatomy.blocks)
        for kind in PART_KINDS
    }


def _in_order(anatomy: Anatomy, sites: Mapping[str, SiteInfo]) -> dict[str, SiteInfo]:
    of_blocks = [f"{kind}.{layer}" for layer in range(len(anatomy.blocks)) for kind in LAYER_KINDS]
    return {name: sites[name] for name in ("embed", *of_blocks, "final", "logits") if name in sites}
