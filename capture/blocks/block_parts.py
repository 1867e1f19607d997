"""The parts of a block: which modules give what it adds to the residual stream, found by the values of one run.

A block takes a stream ``x`` and returns ``y``. In between it makes one to three additions: each adds one output of a
module in it, or two, times factors, to the stream. The sum is seen where

* a module takes it (a norm before the next addition: the stream is the sum itself), or
* a module takes it whose output is the stream from there on (a norm after the sum), or
* the block returns it.

Some blocks begin with a norm, whose output is the stream, or multiply the stream itself by a factor. Sums are compared
element by element, to the rounding of the model's own data type, and only where the part shows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from residua.capture.blocks.block_run import BlockRun, Event
from residua.capture.blocks.sums import factors_of, likely_sets, nearest

_SEARCHES = (
    # (summands of each addition, whether the stream may have a factor): what is common comes first
    ((1, 1), False),
    ((1, 1, 1), False),
    ((2, 1), False),
    ((1, 2), False),
    ((2,), False),
    ((1,), False),
    ((1, 1), True),
    ((1, 1, 1), True),
    ((1,), True),
)
_OF_A_DECODER = (1, 1, 1)  # attention to its own positions, attention to the source, MLP


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module whose output a block adds to the stream.

    Attributes:
        path: The module, relative to the block.
        time: When its output came.
        factor: What the block multiplies the output by before it adds it.
        flat: Whether the output has examples and positions as one axis.
        also: Other modules with the same output.
        attends: Whether attention is computed for it.
        calls: The modules that compute it.
    """

    path: str
    time: int
    factor: float
    flat: bool
    also: tuple[str, ...] = ()
    attends: bool = False
    calls: tuple[str, ...] = ()

    def holds(self, path: str) -> bool:
        """Return whether a module is this part, has the same output, or is in one that is or has."""
        return any(f"{path}.".startswith(f"{each}.") for each in (self.path, *self.also))


@dataclass(frozen=True, kw_only=True)
class Addition:
    """A sum in a block.

    Attributes:
        base: The module that takes the stream before the sum (``is_taken``) or gives it; empty for the block itself.
        is_taken: Whether the base is what a module takes.
        base_factor: What the stream is multiplied by.
        parts: What is added.
        total: The module that takes the sum; empty for what the block returns.
        begin: When the stream before the sum was there.
        flat: Whether the base has examples and positions as one axis.
    """

    base: str
    is_taken: bool
    parts: tuple[Part, ...]
    total: str
    begin: int
    base_factor: float = 1.0
    flat: bool = False


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one block, by the additions that they are in."""

    additions: tuple[Addition, ...]

    @property
    def all(self) -> tuple[Part, ...]:
        """The parts of all additions."""
        return tuple(part for addition in self.additions for part in addition.parts)

    @property
    def paths(self) -> set[str]:
        """The modules that matter."""
        places = {path for addition in self.additions for path in (addition.base, addition.total)}
        return {path for path in places | {part.path for part in self.all} if path}

    @property
    def shape(self) -> tuple[tuple[int, bool], ...]:
        """How many parts each addition has, and whether a norm comes before it."""
        return tuple((len(addition.parts), addition.is_taken) for addition in self.additions)


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
        if found is not None and found.shape == guess.shape:
            return _described(run, found)
    found = _find(run, run.left)
    return None if found is None else _described(run, found)


@dataclass(frozen=True)
class _Stream:
    """The residual stream at a time in a block; see `Addition`."""

    values: Tensor
    time: int
    path: str
    is_taken: bool
    flat: bool = False


def _find(run: BlockRun, left: Tensor) -> Parts | None:
    # a decoder's MLP, which takes the stream and returns it, looks like a norm after the sum of two attentions
    of_three = sorted(_SEARCHES, key=lambda search: search[0] != _OF_A_DECODER)
    for counts, scaled in of_three if len(run.attention) > 1 else _SEARCHES:
        for begin in _beginnings(run):
            additions = next(_chains(run, left, begin, counts, scaled), None)
            if additions is not None:
                return Parts(additions=additions)
    return None


def _beginnings(run: BlockRun) -> Iterator[_Stream]:
    """Yield what the stream may be at the beginning: what the block takes, or what a norm makes of it."""
    yield _Stream(run.entered, 0, "", is_taken=True)
    for taken in run.inputs:
        if torch.equal(taken.values, run.entered):
            yield from _given(run, taken, before=None)


def _given(run: BlockRun, taken: Event, before: int | None) -> Iterator[_Stream]:
    """Yield the stream that a module gives, at the outermost module with the same output that is not the block."""
    normed = next((event for event in run.outputs if event.path == taken.path and event.time > taken.time), None)
    if normed is None or (before is not None and normed.time > before):
        return
    same = [event for event in run.outputs if event.time >= normed.time and torch.equal(event.values, normed.values)]
    last = max(same, key=lambda event: (event.path.count(".") == 0, event.time))
    for event in dict.fromkeys((last.time, normed.time)):
        found = next(each for each in same if each.time == event)
        yield _Stream(found.values, found.time, found.path, is_taken=False, flat=found.flat)


def _chains(
    run: BlockRun, left: Tensor, stream: _Stream, counts: Sequence[int], scaled: bool
) -> Iterator[tuple[Addition, ...]]:
    """Yield the additions from a stream to what the block returns, with so many parts in each."""
    if len(counts) == 1:
        yield from ((addition,) for addition in _last_additions(run, left, stream, counts[0], scaled))
        return
    for taken in run.inputs:
        if taken.time <= stream.time or torch.equal(taken.values, stream.values):
            continue
        for addition in _additions(run, stream, taken.values, taken.path, counts[0], scaled, before=taken.time):
            after = [_Stream(taken.values, taken.time, taken.path, is_taken=True, flat=taken.flat)]
            for following in (*after, *_given(run, taken, None)):
                for rest in _chains(run, left, following, counts[1:], scaled):
                    yield (addition, *rest)


def _last_additions(run: BlockRun, left: Tensor, stream: _Stream, count: int, scaled: bool) -> Iterator[Addition]:
    yield from _additions(run, stream, left, "", count, scaled, before=None)
    for taken in run.inputs:
        gives = (event for event in run.outputs if event.path == taken.path and event.time > taken.time)
        if taken.time > stream.time and any(torch.equal(event.values, left) for event in gives):
            yield from _additions(run, stream, taken.values, taken.path, count, scaled, before=taken.time)


def _additions(
    run: BlockRun, stream: _Stream, total: Tensor, path: str, count: int, scaled: bool, *, before: int | None
) -> Iterator[Addition]:
    """Yield the additions that make `total` of a stream, with the latest outputs first."""
    events = [e for e in run.outputs if e.time > stream.time and (before is None or e.time < before)]
    events = [event for event in events if not torch.equal(event.values, total)]
    if scaled:
        sets: Iterator[tuple[int, ...]] = ((number,) for number in reversed(range(len(events))))
    else:
        sets = likely_sets(total, stream.values, [event.values for event in events], count)
    for numbers in sets:
        chosen = [events[number] for number in numbers]
        if any(_is_within(a.path, b.path) for a in chosen for b in chosen if a is not b):
            continue
        factors = factors_of(total, stream.values, [event.values for event in chosen], scaled=scaled)
        if factors is None:
            continue
        exact = _exact(run, factors, total, [stream.values, *(event.values for event in chosen)])
        parts = (
            Part(path=event.path, time=event.time, factor=factor, flat=event.flat)
            for event, factor in zip(chosen, exact[1:], strict=True)
        )
        yield Addition(
            base=stream.path,
            is_taken=stream.is_taken,
            base_factor=exact[0],
            parts=tuple(parts),
            total=path,
            begin=stream.time,
            flat=stream.flat,
        )


def _is_within(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _exact(run: BlockRun, factors: Sequence[float], total: Tensor, terms: Sequence[Tensor]) -> tuple[float, ...]:
    """Return the factors as the block has them, in an attribute or a buffer of one number, where it has them."""
    found = list(factors)
    for number, factor in enumerate(factors):

        def agrees(value: float, number: int = number) -> bool:
            scales = [*found[:number], value, *found[number + 1 :]]
            summed = [tensor * scale for tensor, scale in zip(terms, scales, strict=True)]
            return len(terms) > _PAIR or torch.equal(summed[0] + summed[1], total)

        found[number] = nearest(_numbers_in(run), factor, total.dtype, agrees)
    return tuple(found)


_PAIR = 2  # the order in which more terms are added is not known, and so neither are their last bits


def _numbers_in(run: BlockRun) -> Iterator[float]:
    for module in run.module.modules():
        yield from (float(value) for value in vars(module).values() if type(value) in (int, float))
        buffers = module.buffers(recurse=False)
        yield from (float(buffer) for buffer in buffers if buffer.numel() == 1 and buffer.is_floating_point())


def _described(run: BlockRun, parts: Parts) -> Parts:
    """Say for which parts attention is computed."""
    additions = list(parts.additions)
    for number, addition in enumerate(additions):
        end = additions[number + 1].begin if number + 1 < len(additions) else None
        calls = [path for time, path in run.attention if time > addition.begin and (end is None or time < end)]
        described = [_with_equals(run, part) for part in addition.parts]
        is_alone = len(described) == 1 and len(additions) > 1
        own = ([call for call in calls if is_alone or part.holds(call)] for part in described)
        marked = (replace(p, attends=bool(of), calls=tuple(of)) for p, of in zip(described, own, strict=True))
        additions[number] = replace(addition, parts=tuple(marked))
    return replace(parts, additions=tuple(additions))


def _with_equals(run: BlockRun, part: Part) -> Part:
    values = next(event.values for event in run.outputs if event.time == part.time)
    also = (event.path for event in run.outputs if event.time != part.time and torch.equal(event.values, values))
    return replace(part, also=tuple(also))


def activation_of(run: BlockRun, addition: Addition, mlp: Part) -> str | None:
    """Return the last linear map of an MLP, whose output is the part or becomes it in one more module."""
    values = next(event.values for event in run.outputs if event.time == mlp.time)
    linear = None
    for event in run.outputs:
        weight = getattr(run.module.get_submodule(event.path), "weight", None)
        if not addition.begin < event.time <= mlp.time or not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        if torch.equal(event.values, values) or _becomes(run, event, values):
            linear = event.path
    return linear


def _becomes(run: BlockRun, event: Event, values: Tensor) -> bool:
    takers = {e.path for e in run.inputs if e.time > event.time and torch.equal(e.values, event.values)}
    return any(e.path in takers and e.time > event.time and torch.equal(e.values, values) for e in run.outputs)
