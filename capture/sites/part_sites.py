"""``attn_out``, ``resid_mid``, ``mlp_act`` and ``mlp_out`` of a block that is not in the table, and the proof of them.

`PartFinder` makes sites of the parts that one run shows. `unproved` runs the model once more with another value at each
of them: the sums have to follow, in every block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from residua.capture.runtime.wrappers import named_modules
from residua.capture.sites.architectures import SIDE_BY_SIDE
from residua.capture.sites.block_parts import Part, Parts, is_sum, parts_of
from residua.capture.sites.block_run import BlockRun
from residua.capture.sites.hooks import attached, probing, values_of
from residua.capture.sites.shape_probe import PROBES, run_on_tokens
from residua.capture.sites.site import SiteInfo, Via

PART_KINDS = ("attn_out", "resid_mid", "mlp_act", "mlp_out")
"""Kinds that are found by what adds up to a block's output."""


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """The parts of one block, and its sites.

    Attributes:
        parts: The parts; None if none add up to what the block returns.
        sites: From name to site, one of each of `PART_KINDS`; one that the block lacks has a ``problem``.
    """

    parts: Parts | None
    sites: dict[str, SiteInfo]


class PartFinder:
    """Makes sites of the run of each block; blocks of one class are expected to be alike, and looked at anew if not.

    Args:
        blocks: Paths of the blocks in order.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        self._layers = {path: layer for layer, path in enumerate(blocks)}
        self._known: dict[type[nn.Module], Parts] = {}

    def __call__(self, run: BlockRun) -> BlockParts:
        """Find the parts of one block."""
        kind = type(run.module)
        parts = parts_of(run, self._known.get(kind))
        if parts is not None:
            self._known[kind] = parts
        layer = self._layers[run.path]
        return BlockParts(parts=parts, sites={f"{kind}.{layer}": _site(run, kind, layer, parts) for kind in PART_KINDS})


def lacking(name: str, block: str, problem: str) -> SiteInfo:
    """Return a site that a block lacks, and the reason."""
    return SiteInfo(name=name, row_shape=None, dtype=None, module=block, via="output", per_token=False, problem=problem)


def _site(run: BlockRun, kind: str, layer: int, parts: Parts | None) -> SiteInfo:
    name = f"{kind}.{layer}"
    if parts is None:
        return lacking(
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
        return lacking(name, run.path, f"{run.path} {what}; what it adds first is {first}")
    if part.factor != 1:
        return lacking(
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
        return lacking(name, run.path, reason)
    via: Via = "stream" if parts.order == "in turn" else "output"
    return _of_stream(run, name, parts.middle.path, via, flat=parts.middle.flat)


def _activations(run: BlockRun, name: str, parts: Parts) -> SiteInfo:
    if parts.activation is None:
        return lacking(
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


def unproved(model: nn.Module, blocks: Sequence[str], found: Mapping[int, BlockParts]) -> dict[str, SiteInfo]:
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
        run_on_tokens(model, PROBES[0])
    lost: dict[str, SiteInfo] = {}
    for layer, trial in trials.items():
        for kind in trial.failed(given, put):
            name = f"{kind}.{layer}"
            reason = f"another value at {found[layer].sites[name].where} does not change the sums of {blocks[layer]}"
            lost[name] = lacking(name, blocks[layer], reason)
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
