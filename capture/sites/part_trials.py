"""Runs that show what the parts of blocks do: whether sums follow other values, and which parts mix positions.

Each run is over a few tokens or images; all blocks are tried in the same run.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from residua.capture.blocks.block_parts import Addition, Part, Parts
from residua.capture.blocks.experts import Experts
from residua.capture.blocks.sums import is_sum
from residua.capture.hooks.forward_call import probing
from residua.capture.hooks.hooks import attached, values_of
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.wrappers import named_modules
from residua.capture.sites.shape_probe import probes_of, run_probe

_NOISE = 4  # a value that follows from another one differs by more than so many units in the last place


def additions_that_fail(model: nn.Module, blocks: Mapping[str, Parts]) -> dict[str, tuple[int, ...]]:
    """Run a model with another value at each part and each stream between additions; see which sums do not follow.

    Args:
        model: The model.
        blocks: From the path of a block to its parts.

    Returns:
        From the path of a block to the numbers of its additions whose sum is another one.

    Raises:
        CaptureError: The model does not run.
    """
    given: dict[str, Tensor] = {}
    put: dict[str, Tensor] = {}
    places = {path: _Places(path, parts) for path, parts in blocks.items()}
    changed = {info.name for each in places.values() for info in (*each.parts, *each.bases[1:])}

    def exchange(info: SiteInfo, tensor: Tensor) -> Tensor | None:
        given[info.name] = put[info.name] = tensor.clone()
        if info.name not in changed:
            return None
        put[info.name] = tensor + _disturbance(tensor)
        return put[info.name].clone()  # the model may change it in place

    _run(model, _sites_of(places), exchange)
    return {
        path: tuple(
            number
            for number, addition in enumerate(blocks[path].additions)
            if not _follows(addition, each.names_of(number), given, put)
        )
        for path, each in places.items()
    }


def parts_that_mix(model: nn.Module, blocks: Mapping[str, Parts]) -> dict[str, frozenset[str]]:
    """Find the parts that carry something from one position to another, as a sequence mixer does and an MLP does not.

    The model runs twice. In the second run each addition takes the same stream as in the first, except at the first
    position; a part that is another one at the last position mixes.

    Args:
        model: The model.
        blocks: From the path of a block to its parts.

    Returns:
        From the path of a block to the paths of the parts that mix.

    Raises:
        CaptureError: The model does not run.
    """
    if not blocks:
        return {}
    shape = probes_of(model)[0]
    places = {path: _Places(path, parts) for path, parts in blocks.items()}
    bases = {info.name for each in places.values() for info in each.bases}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}

    def keep(info: SiteInfo, tensor: Tensor) -> None:
        first[info.name] = tensor.clone()

    def disturb(info: SiteInfo, tensor: Tensor) -> Tensor | None:
        if info.name not in bases or info.name not in first:
            second[info.name] = tensor.clone()
            return None
        new = first[info.name].clone()
        by_position = new.view(*shape, -1)  # whether the two axes are one or not
        by_position[:, 0] += _NOISE * _disturbance(by_position[:, 0])
        return new

    _run(model, _sites_of(places), keep)
    _run(model, _sites_of(places), disturb)
    return {path: frozenset(each.mixing(first, second, shape)) for path, each in places.items()}


def routers_that_decide(model: nn.Module, blocks: Mapping[str, Experts]) -> set[str]:
    """Run a model twice, the second time with other logits of its routers; return the blocks that then choose others.

    Args:
        model: The model.
        blocks: From the path of a block to its mixture of experts.

    Raises:
        CaptureError: The model does not run.
    """
    both = {path: experts for path, experts in blocks.items() if "router_logits" in experts.spots}
    if not both:
        return set()
    sites = [
        experts.spots[kind].site(f"{kind}.{number}", path)
        for number, (path, experts) in enumerate(both.items())
        for kind in ("router_logits", "expert_index")
    ]
    plain: dict[str, Tensor] = {}
    changed: dict[str, Tensor] = {}

    def keep(info: SiteInfo, tensor: Tensor) -> None:
        plain[info.name] = tensor.clone()

    def reverse(info: SiteInfo, tensor: Tensor) -> Tensor | None:
        if info.name.startswith("router_logits"):
            return -plain[info.name]
        changed[info.name] = tensor.clone()
        return None

    _run(model, sites, keep)
    _run(model, sites, reverse)
    names = {f"expert_index.{number}": path for number, path in enumerate(both)}
    return {path for name, path in names.items() if name in changed and not torch.equal(plain[name], changed[name])}


def _run(model: nn.Module, sites: Iterable[SiteInfo], emit: Callable[[SiteInfo, Tensor], Tensor | None]) -> None:
    with probing(), attached(named_modules(model), sites, values_of(emit)):
        run_probe(model, probes_of(model)[0])


def _sites_of(places: Mapping[str, "_Places"]) -> Iterable[SiteInfo]:
    return {info.name: info for each in places.values() for info in each.all}.values()


def _disturbance(tensor: Tensor) -> Tensor:
    """Return numbers as large as the tensor's, which differ from place to place; no random numbers are used up."""
    steps = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    return ((steps % 7 - 3) * (tensor.float().std() / 2)).to(tensor.dtype)


class _Places:
    """The places of one block at which its sums are read.

    Args:
        block: Path of the block.
        parts: Its parts.
    """

    def __init__(self, block: str, parts: Parts) -> None:
        self._block = block
        self._additions = parts.additions
        self.bases = [self._base(number, addition) for number, addition in enumerate(parts.additions)]
        self.parts = [self._part(part) for part in parts.all]
        self._totals = [self._total(addition) for addition in parts.additions]

    @property
    def all(self) -> list[SiteInfo]:
        """All places, those that are written before those that are read at the same module."""
        return [*self.parts, *self._totals, *self.bases]

    def names_of(self, number: int) -> tuple[str, tuple[str, ...], str]:
        """Return the names of an addition's base, parts and total."""
        parts = tuple(self._part(part).name for part in self._additions[number].parts)
        return self.bases[number].name, parts, self._totals[number].name

    def mixing(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
        """Return the paths of the parts that differ at the last position of two runs of (examples, positions)."""
        found = []
        for addition in self._additions:
            for part in addition.parts:
                name = self._part(part).name
                if name not in first or name not in second:
                    continue
                before, after = (run[name].view(*shape, -1)[:, -1] for run in (first, second))
                slack = _NOISE * torch.finfo(before.dtype).eps * before.abs().amax()
                if bool(((after - before).abs() > slack).any()):
                    found.append(part.path)
        return found

    def _base(self, number: int, addition: Addition) -> SiteInfo:
        if not addition.base:
            return _place(self._block, "input")
        path = f"{self._block}.{addition.base}"
        if not addition.is_taken:
            return _place(path, "output")
        return _place(path, "stream") if number else _place(path, "input")

    def _part(self, part: Part) -> SiteInfo:
        return _place(f"{self._block}.{part.path}", "output")

    def _total(self, addition: Addition) -> SiteInfo:
        return _place(f"{self._block}.{addition.total}", "input") if addition.total else _place(self._block, "output")


def _place(module: str, via: str) -> SiteInfo:
    name = f"module:{module}@{'output' if via == 'output' else 'input'}"
    return SiteInfo(name=name, row_shape=None, dtype=None, module=module, via=via)  # type: ignore[arg-type]  # a Via


def _follows(
    addition: Addition, names: tuple[str, tuple[str, ...], str], given: Mapping[str, Tensor], put: Mapping[str, Tensor]
) -> bool:
    base, parts, total = names
    if not all(name in put for name in (base, *parts, total)):
        return False
    like = put[base]
    terms = [addition.base_factor * like.double()]
    terms += [part.factor * put[name].double().view_as(like) for part, name in zip(addition.parts, parts, strict=True)]
    return is_sum(given[total].view_as(like), *terms)
