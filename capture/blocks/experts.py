"""Mixtures of experts: where a block chooses experts for each token, and what these and the shared ones give.

The experts are one module in transformers, which takes the tokens, which experts each of them goes to, and the weights
of these; it gives the weighted sum. The router's logits are the result of the last linear map before it that has an
entry for each expert; that they decide is proved later, by other
values there. Where no module takes the choice (Llama 4 runs every expert on all tokens, JetMoE sorts the tokens by
expert), it is the one choice of the largest results of a linear map in an MLP that holds experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from residua.capture.blocks.block_parts import Addition, Part
from residua.capture.blocks.block_run import BlockRun, Event, ExpertsCall, TorchCall
from residua.capture.blocks.sums import factors_of, is_sum, nearest, shows
from residua.capture.hooks.site import SiteInfo, Via

EXPERT_KINDS = ("router_logits", "expert_index", "expert_weight", "routed_out", "shared_out")
"""Kinds of sites that a block with a mixture of experts has."""


_TOKENS_AS_ONE_AXIS = 2  # axes of such a tensor: tokens, and the row


@dataclass(frozen=True, kw_only=True)
class Spot:
    """Where one of these sites is read; see `SiteInfo`.

    Attributes:
        path: The module, relative to the block.
        via: How it is read there.
        index: Which item of its input, or which linear map in it.
        shape: Shape of its tensor, with one axis or two before the row.
        dtype: Its data type.
        factor: What the tensor is multiplied by.
    """

    path: str
    via: Via
    index: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    factor: float = 1.0

    def site(self, name: str, block: str) -> SiteInfo:
        """Return what is read here in a block as a site of this name."""
        return SiteInfo(
            name=name,
            row_shape=self.shape[-1:],
            dtype=str(self.dtype).removeprefix("torch."),
            module=f"{block}.{self.path}".rstrip("."),
            via=self.via,
            index=self.index,
            flat=len(self.shape) == _TOKENS_AS_ONE_AXIS,
            factor=self.factor,
            n_met=1,
        )


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts of one block.

    Attributes:
        spots: From the kind of a site to where it is read.
        problems: From each other kind to why it is not there.
    """

    spots: Mapping[str, Spot]
    problems: Mapping[str, str]


def experts_in(run: BlockRun, additions: Sequence[Addition]) -> Experts:
    """Find the mixture of experts of a block.

    Args:
        run: A run of the block.
        additions: What the block adds to the residual stream.
    """
    if not run.experts and (choice := _choice(run, additions)) is not None:
        return _of_choice(run, *choice)
    if len(run.experts) != 1:
        what = f"runs {len(run.experts)} modules of" if run.experts else "has no module of"
        reason = f"{run.path} {what} experts that take the chosen experts of each token and their weights"
        return Experts(spots={}, problems=dict.fromkeys(EXPERT_KINDS, reason))
    call = run.experts[0]
    spots = {
        kind: Spot(path=call.path, via="input", index=place, shape=tuple(tensor.shape), dtype=tensor.dtype)
        for kind, place, tensor in (
            ("expert_index", call.index_place, call.index),
            ("expert_weight", call.weight_place, call.weight),
        )
    }
    problems: dict[str, str] = {}
    n_experts = _number_of_experts(run.module.get_submodule(call.path))
    logits = [
        each for each in run.calls["linear"] if each.time < call.time and _may_be_logits(each.values, call, n_experts)
    ]
    if logits:
        last = logits[-1]
        shape, dtype = tuple(last.values.shape), last.values.dtype
        spots["router_logits"] = Spot(path=last.path, via="linear", index=last.number, shape=shape, dtype=dtype)
    else:
        problems["router_logits"] = f"no linear map in {run.path} gives an entry for each expert"
    return _with_outputs(run, call.path, additions, Experts(spots=spots, problems=problems))


def _may_be_logits(values: Tensor, call: ExpertsCall, n_experts: int | None) -> bool:
    width = values.shape[-1]
    is_wide_enough = width == n_experts if n_experts else width > int(call.index.max())
    return is_wide_enough and values.numel() // width == call.index.numel() // call.index.shape[-1]


def is_of_experts(module: nn.Module) -> bool:
    """Return whether a module itself holds stacks of matrices, one for each expert."""
    return not isinstance(module, _CONVOLUTIONS) and any(
        parameter.ndim > _OF_A_MATRIX and parameter.shape[0] > 1 for parameter in module.parameters(recurse=False)
    )


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OF_A_MATRIX = 2  # axes


def _number_of_experts(module: nn.Module) -> int | None:
    """Return the first axis of the experts' weights; None if they are in no stacks."""
    stacks = [parameter for parameter in module.parameters() if parameter.ndim > _OF_A_MATRIX]
    return int(stacks[0].shape[0]) if stacks else None


def _choice(run: BlockRun, additions: Sequence[Addition]) -> tuple[Part, TorchCall, TorchCall] | None:
    """Return the MLP that chooses experts by itself, the linear map of its router and the choice; None if none does."""
    found = []
    for call in run.calls["choice"]:
        parts = (
            part for addition in additions for part in addition.parts if not part.attends and part.holds(call.path)
        )
        part = next(parts, None)
        if part is None or call.taken.ndim != _TOKENS_AS_ONE_AXIS or call.values.numel() == call.taken.numel():
            continue
        stacks = [m for m in run.module.get_submodule(part.path).modules() if is_of_experts(m)]
        logits = (each for each in run.calls["linear"] if each.time < call.time)
        same = [each for each in logits if _is_same(each.values, call.taken)]
        if same and any(_number_of_experts(module) == call.taken.shape[-1] for module in stacks):
            found.append((part, same[-1], call))
    return found[0] if len(found) == 1 else None


def _is_same(values: Tensor, other: Tensor) -> bool:
    return values.shape == other.shape and torch.equal(values.to(other.dtype), other)


def _of_choice(run: BlockRun, part: Part, logits: TorchCall, choice: TorchCall) -> Experts:
    """Return the mixture of experts of an MLP that chooses them by itself."""
    spots = {"router_logits": _result(logits, "linear"), "expert_index": _result(choice, "choice")}
    problems = {}
    largest = choice.taken.gather(-1, choice.values)
    weights = [each for each in run.calls["softmax"] if each.time > choice.time and _is_same(largest, each.taken)]
    if weights:
        spots["expert_weight"] = _result(weights[0], "softmax")
    else:
        problems["expert_weight"] = (
            f"{run.path} makes no tensor with a weight for each chosen expert; the weights follow from router_logits "
            "and expert_index (in Llama 4 they are the sigmoid of the chosen logits)"
        )
    total = next(event for event in run.outputs if event.time == part.time)
    inside = [event for event in run.outputs if event.path.startswith(f"{part.path}.") and event.time < total.time]
    problems["routed_out"] = f"no sum over experts in {run.path} adds up to {part.path}"
    problems["shared_out"] = f"no shared expert is found beside the routed ones of {run.path}"
    for call in reversed([each for each in run.calls["sum"] if part.holds(each.path) and each.time < total.time]):
        routed = call.values.reshape(total.values.shape)
        shared = (event for event in reversed(inside) if is_sum(total.values, routed, event.values))
        beside = next((event for event in shared if shows(routed, event.values)), None)
        if beside is None and not _differs_by_bias(total.values, routed):
            continue
        spots["routed_out"] = replace(_result(call, "sum"), factor=part.factor)
        if beside is not None:
            spots["shared_out"] = _output(beside, part.factor)
        break
    return Experts(spots=spots, problems={kind: why for kind, why in problems.items() if kind not in spots})


def _result(call: TorchCall, via: Via) -> Spot:
    shape, dtype = tuple(call.values.shape), call.values.dtype
    return Spot(path=call.path, via=via, index=call.number, shape=shape, dtype=dtype)


def _differs_by_bias(total: Tensor, routed: Tensor) -> bool:
    """Return whether a tensor is another one and the same vector for all tokens, to rounding."""
    rest = total.double() - routed.double()
    slack = 8 * torch.finfo(total.dtype).eps * total.abs().amax()
    return bool(routed.abs().amax() > 0) and bool(((rest - rest[:1, :1]).abs() <= slack).all())


def _with_outputs(run: BlockRun, path: str, additions: Sequence[Addition], experts: Experts) -> Experts:
    """Add what the experts give: the routed ones, and the shared one if there is one."""
    routed = next((event for event in run.outputs if event.path == path), None)
    places = ((addition, part) for addition in additions for part in addition.parts if part.holds(path))
    addition, whole = next(places, (None, None))
    if routed is None or addition is None or whole is None:
        reason = f"what the experts of {run.path} give does not add up to what it adds; use module:{run.path}.{path}"
        problems = dict.fromkeys(("routed_out", "shared_out"), reason)
        return replace(experts, problems={**experts.problems, **problems})
    total = next(event for event in run.outputs if event.time == whole.time)
    shared, factors = _shared_in(run, routed, total)
    spots, problems = {}, {}
    if factors:
        spots["routed_out"] = _output(routed, factors[0] * whole.factor)
    else:
        problems["routed_out"] = f"what the experts of {run.path} give does not add up to {whole.path}"
    beside = [part for part in addition.parts if part is not whole and not part.attends]
    if beside:
        event = next(event for event in run.outputs if event.time == beside[0].time)
        spots["shared_out"] = _output(event, beside[0].factor)
    elif shared is not None and len(factors) > 1:
        spots["shared_out"] = _output(shared, factors[1] * whole.factor)
    elif (product := _gated(run, routed, total)) is not None:
        spots["shared_out"] = replace(product, factor=whole.factor)
    else:
        problems["shared_out"] = _why_not_shared(run, shared)
    return Experts(spots={**experts.spots, **spots}, problems={**experts.problems, **problems})


def _why_not_shared(run: BlockRun, shared: Event | None) -> str:
    if shared is None:
        return f"no shared expert is found beside the routed ones of {run.path}"
    return (
        f"{run.path} multiplies what {shared.path} gives by another number for each token; "
        f"use module:{run.path}.{shared.path}@output, or mlp_out - routed_out for the product"
    )


def _output(event: Event, factor: float) -> Spot:
    values = event.values
    shape = (values.shape[0] * values.shape[1], *values.shape[2:]) if event.flat else tuple(values.shape)
    return Spot(path=event.path, via="output", index=None, shape=shape, dtype=values.dtype, factor=factor)


def _gated(run: BlockRun, routed: Event, total: Event) -> Spot | None:
    """Return the product of a gate and a shared expert that, with the routed ones, makes the total."""
    for call in reversed(run.calls["product"]):
        values = call.values.reshape(total.values.shape)
        if call.time < total.time and is_sum(total.values, routed.values, values) and shows(routed.values, values):
            shape, dtype = tuple(call.values.shape), call.values.dtype
            return Spot(path=call.path, via="product", index=call.number, shape=shape, dtype=dtype)
    return None


def _shared_in(run: BlockRun, routed: Event, total: Event) -> tuple[Event | None, tuple[float, ...]]:
    """Return the shared expert if there is one, and the factors of the routed ones and of it.

    A shared expert with another factor for each token has none of its own; there are none at all if nothing adds up.
    """
    if torch.equal(total.values, routed.values):
        return None, (1.0,)
    events = [event for event in run.outputs if event.path != routed.path and event.time < total.time]
    events = [event for event in events if event.path.startswith(f"{total.path}.") and event.time != routed.time]
    for event in reversed(events):
        factors = factors_of(total.values, routed.values, [event.values], scaled=True)
        if factors is not None:
            dtype = total.values.dtype
            return event, tuple(nearest(iter((1.0,)), factor, dtype, lambda _: True) for factor in factors)
    rest = total.values.double() - routed.values.double()
    for event in reversed(events):
        if _is_multiple(rest, event.values.double(), torch.finfo(total.values.dtype).eps):
            return event, (1.0,)
    return None, ()


def _is_multiple(tensor: Tensor, other: Tensor, rounding: float) -> bool:
    """Return whether each row is a multiple of the same row of another tensor, to rounding."""
    scale = (tensor * other).sum(-1, keepdim=True) / (other * other).sum(-1, keepdim=True).clamp_min(1e-300)
    error = (tensor - scale * other).abs().amax()
    return bool(error <= 64 * rounding * tensor.abs().amax()) and bool(other.abs().amax() > 0)
