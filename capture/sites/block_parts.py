"""The parts of a block: which modules give what it adds to the residual stream, found by the values of one run.

A block takes a stream ``x`` and returns ``y``. Two outputs of modules in it, ``a`` and ``b``, are looked for, such that

* in turn: a module takes ``mid = x + a``, and ``y = mid + b`` (norms before the parts);
* after norms: a norm takes ``x + a`` and gives ``mid``, another takes ``mid + b`` and gives ``y``;
* side by side: ``y = x + a + b``;
* alone: ``y = x + a``.

Sums are compared element by element, to the rounding of the model's own data type, and only where the part shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from residua.capture.sites.block_run import BlockRun, Event

Order = Literal["in turn", "after norms", "side by side", "alone"]

_SHOWN = 0.05  # share of the elements in which a part has to be several times larger than rounding
_SMALLEST_FACTOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module whose output a block adds to the stream.

    Attributes:
        path: The module, relative to the block.
        time: When its output came.
        factor: What the block multiplies the output by before it adds it.
        flat: Whether the output has examples and positions as one axis.
        also: Other modules with the same output.
    """

    path: str
    time: int
    factor: float
    flat: bool
    also: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one block.

    Attributes:
        order: How they are added.
        first: The part that comes first.
        second: The other one, if there are two.
        middle: The module that takes the stream between them (in turn) or gives it (after norms).
        norms: After norms: the modules that take the two sums.
        activation: The module whose input is what the last linear map of `second` takes.
        attention: The attention among the two, by a call of transformers' interface or else by its name.
        mlp: The other, if it calls no attention.
    """

    order: Order
    first: Part
    second: Part | None = None
    middle: Event | None = None
    norms: tuple[str, str] | None = None
    activation: str | None = None
    attention: Part | None = None
    mlp: Part | None = None

    @property
    def paths(self) -> set[str]:
        """The modules that matter."""
        parts = [part for part in (self.first, self.second) if part is not None]
        others = [self.middle.path if self.middle else None, *(self.norms or ()), self.activation]
        return {path for path in (*(part.path for part in parts), *others) if path}


def parts_of(run: BlockRun, guess: Parts | None = None) -> Parts | None:
    """Find the parts of a block; `guess`, those of a similar block, is tried first. None if there are none."""
    if run.left is None:
        return None
    if guess is not None:
        few = replace(
            run,
            inputs=[event for event in run.inputs if event.path in guess.paths],
            outputs=[event for event in run.outputs if event.path in guess.paths],
        )
        found = _find(few, run.left)
        if found is not None and found.order == guess.order:
            return _described(run, found)
    found = _find(run, run.left)
    return None if found is None else _described(run, found)


def _find(run: BlockRun, left: Tensor) -> Parts | None:
    found = next(_two_in_a_row(run, left), None) or next(_side_by_side(run, left), None)
    if found is not None:
        return found
    for event in reversed(run.outputs):
        factor = factor_of(left, run.entered, event.values)
        if factor is not None:
            return Parts(order="alone", first=_part(event, factor))
    return None


def _two_in_a_row(run: BlockRun, left: Tensor) -> Iterator[Parts]:
    for taken in run.inputs:
        first, factor = _summand(run, taken.values, run.entered, before=taken.time)
        if first is None:
            continue
        one = _part(first, factor)
        second, factor = _summand(run, left, taken.values, after=taken.time)
        if second is not None:
            yield Parts(order="in turn", first=one, second=_part(second, factor), middle=taken)
        yield from _after_norms(run, left, taken, one)


def _after_norms(run: BlockRun, left: Tensor, taken: Event, one: Part) -> Iterator[Parts]:
    normed = next((e for e in run.outputs if e.path == taken.path and e.time > taken.time), None)
    if normed is None:
        return
    same = [event for event in run.outputs if event.time >= normed.time and torch.equal(event.values, normed.values)]
    for last in run.inputs:
        gives = (e for e in run.outputs if e.path == last.path and e.time > last.time)
        if last.time < normed.time or not any(torch.equal(event.values, left) for event in gives):
            continue
        second, factor = _summand(run, last.values, normed.values, after=normed.time, before=last.time)
        if second is not None:
            middle = max((e for e in same if e.time < second.time), key=lambda e: (e.path.count(".") == 0, e.time))
            yield Parts(
                order="after norms",
                first=one,
                second=_part(second, factor),
                middle=middle,
                norms=(taken.path, last.path),
            )


def _summand(
    run: BlockRun, total: Tensor, stream: Tensor, *, after: int = 0, before: int | None = None
) -> tuple[Event | None, float]:
    """Return the last output between two times that, times a factor, is ``total - stream``."""
    for event in reversed(run.outputs):
        if event.time > after and (before is None or event.time < before):
            factor = factor_of(total, stream, event.values)
            if factor is not None:
                return event, factor
    return None, 0.0


def _side_by_side(run: BlockRun, left: Tensor) -> Iterator[Parts]:
    for i, late in enumerate(reversed(run.outputs)):
        for early in list(reversed(run.outputs))[i + 1 :]:
            nested = f"{early.path}.".startswith(f"{late.path}.") or f"{late.path}.".startswith(f"{early.path}.")
            if nested or torch.equal(early.values, late.values):
                continue
            one, other = early.values, late.values
            if is_sum(left, run.entered, one, other) and _shows(run.entered, one) and _shows(run.entered, other):
                yield Parts(order="side by side", first=_part(early, 1.0), second=_part(late, 1.0))


def _part(event: Event, factor: float) -> Part:
    return Part(path=event.path, time=event.time, factor=factor, flat=event.flat)


def _with_equals(run: BlockRun, part: Part) -> Part:
    values = next(event.values for event in run.outputs if event.time == part.time)
    also = (event.path for event in run.outputs if event.time != part.time and torch.equal(event.values, values))
    return replace(part, also=tuple(also))


def _described(run: BlockRun, parts: Parts) -> Parts:
    """Say which part is attention, and find the activations."""
    first = _with_equals(run, parts.first)
    second = None if parts.second is None else _with_equals(run, parts.second)
    if parts.order in ("in turn", "after norms") and parts.middle is not None:
        between = parts.middle.time
        calls_first = [path for time, path in run.attention if time < between]
        calls_second = [path for time, path in run.attention if time > between]
    else:
        calls_first, calls_second = (
            [] if part is None else [path for _, path in run.attention if _is_in(path, part)]
            for part in (first, second)
        )
    attends_first = bool(calls_first) or (not run.attention and _is_named_attention(first))
    attends_second = bool(calls_second) or (not run.attention and second is not None and _is_named_attention(second))
    attention = mlp = None
    if attends_first != attends_second:
        attention = first if attends_first else second
        mlp = second if attends_first else first
    elif second is not None and not attends_first and parts.order != "side by side":
        mlp = second
    activation = None if mlp is None or parts.order == "alone" else _activation(run, parts, mlp)
    return replace(
        parts,
        first=first,
        second=second,
        attention=attention,
        mlp=mlp if second is not None else None,
        activation=activation,
    )


def _is_in(path: str, part: Part) -> bool:
    return any(f"{path}.".startswith(f"{each}.") for each in (part.path, *part.also))


def _is_named_attention(part: Part) -> bool:
    return any("att" in path.lower() for path in (part.path, *part.also))


def _activation(run: BlockRun, parts: Parts, mlp: Part) -> str | None:
    """Return the last linear map of the MLP, whose output is the part or becomes it in one more module."""
    values = next(event.values for event in run.outputs if event.time == mlp.time)
    begin = parts.middle.time if parts.middle is not None else 0
    linear = None
    for event in run.outputs:
        weight = getattr(run.module.get_submodule(event.path), "weight", None)
        if not begin < event.time <= mlp.time or not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        if torch.equal(event.values, values) or _becomes(run, event, values):
            linear = event.path
    return linear


def _becomes(run: BlockRun, event: Event, values: Tensor) -> bool:
    takers = {e.path for e in run.inputs if e.time > event.time and torch.equal(e.values, event.values)}
    return any(e.path in takers and e.time > event.time and torch.equal(e.values, values) for e in run.outputs)


def factor_of(total: Tensor, stream: Tensor, part: Tensor) -> float | None:
    """Return the factor c with ``total = stream + c * part``, to the rounding of the sum; None if there is none.

    Args:
        total: What a module takes or a block returns.
        stream: What is added to.
        part: What may be added.
    """
    added, unscaled = total.double() - stream.double(), part.double()
    square = float((unscaled * unscaled).sum())
    if square == 0 or not _shows(stream, added):
        return None
    factor = float((added * unscaled).sum()) / square
    for each in (1.0, factor):
        if abs(each) > _SMALLEST_FACTOR and is_sum(total, stream, each * unscaled):
            return each
    return None


def is_sum(total: Tensor, stream: Tensor, *parts: Tensor) -> bool:
    """Return whether ``total`` is the sum of the others, element by element, to the rounding of its data type."""
    summands = torch.stack([tensor.double() for tensor in (stream, *parts)])
    error = (total.double() - summands.sum(0)).abs()
    size = summands.abs().sum(0) + total.double().abs()
    return bool((error <= 2 * torch.finfo(total.dtype).eps * size).all())


def _shows(stream: Tensor, part: Tensor) -> bool:
    """Return whether a part is larger than rounding in enough elements, so that a wrong one would be noticed."""
    rounding = torch.finfo(stream.dtype).eps
    return float((part.float().abs() > 8 * rounding * stream.float().abs()).float().mean()) > _SHOWN
