"""Sums of tensors: is one tensor the sum of others, each times a factor, to the rounding of its data type?"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

_SHOWN = 0.05  # share of the elements in which a part has to be several times larger than rounding
_SMALLEST_FACTOR = 1e-4


def factors_of(total: Tensor, stream: Tensor, parts: Sequence[Tensor], *, scaled: bool) -> tuple[float, ...] | None:
    """Return the factors of a sum, that of the stream first; None if there are none.

    Args:
        total: What a module takes or a block returns.
        stream: What is added to.
        parts: What may be added.
        scaled: Whether the stream may have a factor other than 1.
    """
    ones = (1.0,) * (1 + len(parts))
    if _is_shown_sum(total, stream, parts, ones):
        return ones
    known, free = ((), (stream, *parts)) if scaled else ((stream,), parts)
    target = total.double() - sum((tensor.double() for tensor in known), torch.zeros((), dtype=torch.float64))
    basis = torch.stack([tensor.double().flatten() for tensor in free])
    gram = basis @ basis.T
    if float(torch.linalg.cond(gram)) > 1 / torch.finfo(total.dtype).eps:  # some of them are multiples of others
        return None
    found = torch.linalg.solve(gram, basis @ target.flatten()).tolist()
    factors = tuple(found) if scaled else (1.0, *found)
    return factors if _is_shown_sum(total, stream, parts, factors) else None


def _is_shown_sum(total: Tensor, stream: Tensor, parts: Sequence[Tensor], factors: Sequence[float]) -> bool:
    if min(map(abs, factors)) < _SMALLEST_FACTOR:
        return False
    terms = [factor * tensor.double() for factor, tensor in zip(factors, (stream, *parts), strict=True)]
    return is_sum(total, *terms) and all(shows(stream, term) for term in terms[1:])


def is_sum(total: Tensor, *terms: Tensor) -> bool:
    """Return whether ``total`` is the sum of the others, element by element, to the rounding of its data type."""
    summands = torch.stack([tensor.double() for tensor in terms])
    error = (total.double() - summands.sum(0)).abs()
    size = summands.abs().sum(0) + total.double().abs()
    return bool((error <= 2 * torch.finfo(total.dtype).eps * size).all())


def shows(stream: Tensor, part: Tensor) -> bool:
    """Return whether a part is larger than rounding in enough elements, so that a wrong one would be noticed."""
    rounding = torch.finfo(stream.dtype).eps
    return float((part.float().abs() > 8 * rounding * stream.float().abs()).float().mean()) > _SHOWN


def likely_sets(total: Tensor, stream: Tensor, parts: Sequence[Tensor], size: int) -> Iterator[tuple[int, ...]]:
    """Yield sets of `size` parts, by number, whose span holds ``total - stream``; sets of later parts come first.

    It is a quick test by scalar products: `factors_of` decides.
    """
    if len(parts) < size:
        return
    target = (total.double() - stream.double()).flatten()
    basis = torch.stack([part.double().flatten() for part in parts])
    gram, products, square = basis @ basis.T, basis @ target, target @ target
    rounding = torch.finfo(total.dtype).eps
    slack = 64 * rounding**2 * (total.double().square().sum() + stream.double().square().sum()) + 1e-10 * square
    rest = _rest_of_pair if size == 2 else _rest_of_one
    for numbers in reversed(list(combinations(range(len(parts)), size))):
        if float(rest(gram, products, square, *numbers)) <= float(slack):
            yield numbers


def _rest_of_one(gram: Tensor, products: Tensor, square: Tensor, i: int) -> Tensor:
    return square - products[i] ** 2 / gram[i, i].clamp_min(1e-300)


def _rest_of_pair(gram: Tensor, products: Tensor, square: Tensor, i: int, j: int) -> Tensor:
    determinant = (gram[i, i] * gram[j, j] - gram[i, j] ** 2).clamp_min(1e-300)
    inner = gram[j, j] * products[i] ** 2 - 2 * gram[i, j] * products[i] * products[j] + gram[i, i] * products[j] ** 2
    return square - inner / determinant


def nearest(values: Iterator[float], factor: float, dtype: torch.dtype, agrees: Callable[[float], bool]) -> float:
    """Return the number that a model multiplies by, of which a factor is a measurement.

    Args:
        values: Numbers that the model has.
        factor: The measured factor.
        dtype: The data type in which the model computes.
        agrees: Whether a number gives the model's own sum.

    Returns:
        One of the values, or the factor with fewer digits, or the factor as it is.
    """
    if factor == 1:
        return factor
    rounded = (float(f"{factor:.{digits}g}") for digits in (2, 3, 4, 5, 6))
    slack = 4 * torch.finfo(dtype).eps * abs(factor)
    close = [value for value in (*values, *rounded) if abs(value - factor) <= slack]
    return next((value for value in close if agrees(value)), factor)
