"""From the parts of a block to its sites: what each part is, where it is read, and why a site is not there.

A part for which attention is computed is ``attn_out``, or ``cross_attn_out`` if it is to an encoder's rows. Another
part that carries something from one position to another (a state space, a convolution, a recurrence, a Fourier
transform) is ``mixer_out``; one that does not is ``mlp_out``.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from residua.capture.blocks.block_parts import Addition, Part, Parts, activation_of, parts_of
from residua.capture.blocks.block_run import BlockRun
from residua.capture.blocks.experts import EXPERT_KINDS, Experts, Spot, experts_in
from residua.capture.blocks.latents import latent_in
from residua.capture.hooks.site import SiteInfo, Via
from residua.capture.sites.architectures import SIDE_BY_SIDE

PART_KINDS = ("attn_out", "cross_attn_out", "mixer_out", "resid_mid", "mlp_act", "mlp_out")
"""Kinds that are found by what adds up to a block's output."""

_WHAT = {
    "attn_out": "computes no attention",
    "cross_attn_out": "attends to no encoder's rows",
    "mixer_out": "has no sequence mixer but attention",
    "mlp_out": "has no MLP",
}


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """What one run shows of a block.

    Attributes:
        path: The block.
        row_shape: Shape of a row of the residual stream.
        dtype: Its data type.
        parts: The parts; None if none add up to what the block returns.
        activations: From the path of a part that may be an MLP to the module whose input are its hidden activations,
            and the shape and data type of these.
        experts: Its mixture of experts.
        latent: Where the latent of its keys and values is, or why there is none.
        cross: The module in it that attends to an encoder's rows; empty if there is none.
        stray_attention: Whether attention is computed in the block, and not in a module of any part.
    """

    path: str
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Parts | None
    activations: Mapping[str, tuple[str, tuple[int, ...], torch.dtype]]
    experts: Experts
    latent: Spot | str
    stray_attention: bool
    cross: str = ""

    @property
    def is_told_apart(self) -> bool:
        """Whether its parts are known to be attention and an MLP without a look at what they mix."""
        parts = [] if self.parts is None else self.parts.all
        return sum(part.attends for part in parts) == 1 and len(parts) <= 2


class PartFinder:
    """Finds the parts of each block; blocks of one class are expected to be alike, and looked at anew if not.

    Args:
        cross: From the path of a block to that of the module in it that attends to an encoder's rows.
    """

    def __init__(self, cross: Mapping[str, str]) -> None:
        self._cross = cross
        self._known: dict[type[nn.Module], Parts] = {}

    def __call__(self, run: BlockRun) -> BlockParts:
        """Find the parts of one block."""
        kind = type(run.module)
        parts = parts_of(run, self._known.get(kind))
        if parts is not None:
            self._known[kind] = parts
        additions = () if parts is None else parts.additions
        found = {part.path: activation_of(run, addition, part) for addition in additions for part in addition.parts}
        attends = [part for addition in additions for part in addition.parts if part.attends]
        return BlockParts(
            path=run.path,
            row_shape=tuple(run.entered.shape[2:]),
            dtype=run.entered.dtype,
            parts=parts,
            activations={part: (path, *run.shapes[path]) for part, path in found.items() if path is not None},
            experts=experts_in(run, additions),
            latent=latent_in(run),
            stray_attention=bool(run.attention) and not attends,
            cross=self._cross.get(run.path, "").removeprefix(f"{run.path}."),
        )


def sites_of(
    layer: int,
    block: BlockParts,
    mixing: Collection[str],
    failed: Collection[int],
    modules: Mapping[str, nn.Module],
) -> list[SiteInfo]:
    """Return the sites of the parts of one block, one of each of `PART_KINDS`.

    Args:
        layer: Number of the block.
        block: Its parts.
        mixing: Paths of the parts that carry something from one position to another.
        failed: Numbers of the additions whose sum does not follow other values.
        modules: The modules of the model.

    Returns:
        The sites; one that the block lacks has a ``problem``.
    """
    if block.parts is None:
        problem = f"no outputs of modules in {block.path} were found that add up to what it adds to its input"
        return [lacking(f"{kind}.{layer}", block.path, problem) for kind in PART_KINDS]
    if len(block.parts.additions) > 1 and not mixing and not any(part.attends for part in block.parts.all):
        added = ", ".join(_text(block, part) for part in block.parts.all)
        problem = f"{block.path} adds {added}, and which of these is its MLP is not known"
        return [lacking(f"{kind}.{layer}", block.path, problem) for kind in PART_KINDS]
    if block.stray_attention and len(block.parts.all) == 1 and _is_behind(block, block.parts.all[0], modules):
        added = _text(block, block.parts.all[0])
        problem = f"{block.path} adds {added} alone, which it makes of its attention and of all that follows on it"
        return [lacking(f"{kind}.{layer}", block.path, problem) for kind in PART_KINDS]
    by_kind: dict[str, list[tuple[Addition, Part]]] = {}
    for addition in block.parts.additions:
        for part in addition.parts:
            by_kind.setdefault(_kind_of(block, part, mixing, modules), []).append((addition, part))
    sites = [_part_site(layer, block, kind, by_kind) for kind in _WHAT]
    sites += [_middle(layer, block), _activations(layer, block, by_kind)]
    unproved = {
        kind for kind, ((addition, _), *_) in by_kind.items() if block.parts.additions.index(addition) in failed
    }
    unproved |= {"mlp_act"} if "mlp_out" in unproved else set()
    unproved |= {"resid_mid"} if failed else set()
    return [_unproved(info, block) if info.site.kind in unproved and not info.problem else info for info in sites]


def _unproved(info: SiteInfo, block: BlockParts) -> SiteInfo:
    return lacking(info.name, block.path, f"another value at {info.where} does not change the sums of {block.path}")


def expert_sites(layer: int, block: str, experts: Experts, *, decides: bool) -> list[SiteInfo]:
    """Return the sites of a block's mixture of experts, one of each of `EXPERT_KINDS`.

    Args:
        layer: Number of the block.
        block: Its path.
        experts: Its mixture of experts.
        decides: Whether other logits of its router lead to other experts.
    """
    problems = dict(experts.problems)
    if "router_logits" in experts.spots and not decides:
        path = f"{block}.{experts.spots['router_logits'].path}"
        problems["router_logits"] = f"other values of the linear map in {path} choose no other expert"
    return [
        lacking(f"{kind}.{layer}", block, problems[kind])
        if kind in problems
        else experts.spots[kind].site(f"{kind}.{layer}", block)
        for kind in EXPERT_KINDS
    ]


def latent_site(layer: int, block: str, latent: Spot | str) -> SiteInfo:
    """Return the site of the latent of a block's keys and values; it has a ``problem`` if there is none."""
    name = f"kv_latent.{layer}"
    return lacking(name, block, latent) if isinstance(latent, str) else latent.site(name, block)


def lacking(name: str, block: str, problem: str) -> SiteInfo:
    """Return a site that a block lacks, and the reason."""
    return SiteInfo(name=name, row_shape=None, dtype=None, module=block, via="output", per_token=False, problem=problem)


def _kind_of(block: BlockParts, part: Part, mixing: Collection[str], modules: Mapping[str, nn.Module]) -> str:
    if part.attends:
        return "cross_attn_out" if block.cross and block.cross in part.calls else "attn_out"
    if part.path not in mixing:
        return "mlp_out"
    return "attn_out" if block.stray_attention and _is_behind(block, part, modules) else "mixer_out"


def _is_behind(block: BlockParts, part: Part, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a part is a norm or a linear map: it does not mix positions by itself, but what it takes may."""
    return all(not any(modules[f"{block.path}.{path}"].children()) for path in (part.path, *part.also))


def _part_site(
    layer: int, block: BlockParts, kind: str, by_kind: Mapping[str, Sequence[tuple[Addition, Part]]]
) -> SiteInfo:
    name, found = f"{kind}.{layer}", by_kind.get(kind, ())
    if not found:
        added = (f"{other}.{layer} ({_text(block, part)})" for other, parts in by_kind.items() for _, part in parts)
        what = _WHAT[kind]
        if kind == "attn_out" and block.stray_attention:
            what = "adds no output of a module that computes attention"
        return lacking(name, block.path, f"{block.path} {what}; what it adds is {', '.join(added)}")
    same_addition = [part for addition, part in found if addition is found[0][0]]
    if len(same_addition) > 1:
        both = " and ".join(_text(block, part) for part in same_addition)
        return lacking(name, block.path, f"{block.path} adds {both}, and no module gives both together")
    part = same_addition[0]
    return _of_stream(block, name, part.path, "output", flat=part.flat, factor=part.factor)


def _text(block: BlockParts, part: Part) -> str:
    site = f"module:{block.path}.{part.path}@output"
    return site if part.factor == 1 else f"{part.factor:.5g} times {site}"


def _of_stream(block: BlockParts, name: str, path: str, via: Via, *, flat: bool, factor: float = 1.0) -> SiteInfo:
    return SiteInfo(
        name=name,
        row_shape=block.row_shape,
        dtype=str(block.dtype).removeprefix("torch."),
        module=f"{block.path}.{path}",
        via=via,
        flat=flat,
        factor=factor,
        n_met=1,
    )


def _middle(layer: int, block: BlockParts) -> SiteInfo:
    name = f"resid_mid.{layer}"
    additions = () if block.parts is None else block.parts.additions
    if len(additions) < 2:
        reason = SIDE_BY_SIDE if additions and len(additions[0].parts) > 1 else f"{block.path} has one part only"
        return lacking(name, block.path, reason)
    base = additions[1]
    return _of_stream(block, name, base.base, "stream" if base.is_taken else "output", flat=base.flat)


def _activations(layer: int, block: BlockParts, by_kind: Mapping[str, Sequence[tuple[Addition, Part]]]) -> SiteInfo:
    name, mlp = f"mlp_act.{layer}", by_kind.get("mlp_out", ())
    found = block.activations.get(mlp[0][1].path) if mlp else None
    if found is None:
        return lacking(
            name,
            block.path,
            f"no linear map in {block.path} gives mlp_out of all tokens (a mixture of experts has hidden activations "
            "only inside its experts, for the tokens that go there); use mlp_out, or routed_out and expert_index",
        )
    path, shape, dtype = found
    flat = len(shape) < 2 + len(block.row_shape)
    return SiteInfo(
        name=name,
        row_shape=shape[1 if flat else 2 :],
        dtype=str(dtype).removeprefix("torch."),
        module=f"{block.path}.{path}",
        via="input",
        flat=flat,
        n_met=1,
    )
