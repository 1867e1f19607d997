"""The arithmetic of lossy codecs, which measure their error, and the count of NaN and infinite values.

BitRound keeps some of the 23 mantissa bits of a float32 (Klöwer et al. 2021, doi:10.1038/s43588-021-00156-2), rounding
to nearest, ties to even. NaN and infinities keep all their bits.

int8 in blocks of 32 divides each run of 32 values along the last axis by its own scale, the largest magnitude over 127
(block-wise absmax quantisation: Dettmers et al. 2022, arXiv:2110.02861), so that a channel a hundred times larger than
the rest spoils only its neighbours. NaN and infinities have no such code: their block gets a scale of NaN and reads
back as NaN, so that it cannot be mistaken for numbers.

NaN and infinite values are counted for the price of two maxima. A float whose exponent bits are all ones is NaN or
infinite. Read as signed integers, the positive ones are the largest values; read as unsigned integers, the negative
ones are. Two maxima over the bits, which numpy computes at memory speed and without a temporary, show whether there are
any; only then are they counted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from residua.store.encoding.dtypes import storage_dtype, to_float32

BLOCK = 32
_LARGEST = 127
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
_COUNTED = 1 << 17  # values that `count_nonfinite` handles at a time
_SLICE = 1 << 18  # values handled at a time, so that temporaries stay small and in the cache

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]


class Transformed(NamedTuple):
    """The stored arrays of a site, and the sums behind its relative error, over finite values; None if lossless."""

    arrays: Sequence[Array]
    squares: float | None = None
    error_squares: float | None = None


def bitround(values: Floats, kept_bits: int) -> Floats:
    """Return `values` with `kept_bits` of the 23 mantissa bits kept, rounded to nearest, ties to even.

    A value that rounds past the largest float32 becomes infinite, as in any float arithmetic.
    """
    dropped = np.uint32(23 - kept_bits)
    bits = np.ascontiguousarray(values).view(np.uint32)
    last = (bits >> dropped) & np.uint32(1)
    with np.errstate(over="ignore"):
        rounded = bits + (last + np.uint32((1 << (int(dropped) - 1)) - 1))
    rounded &= np.uint32((0xFFFFFFFF << int(dropped)) & 0xFFFFFFFF)
    not_finite = (bits & np.uint32(_EXPONENT["float32"])) == np.uint32(_EXPONENT["float32"])
    np.copyto(rounded, bits, where=not_finite)
    return rounded.view(np.float32)


def bitround_errors(values: Array, kept_bits: int) -> Transformed:
    """Return float32 `values` of any shape rounded to `kept_bits` mantissa bits, with their error.

    Raises:
        ValueError: The values are not float32.
    """
    if values.dtype != np.float32:
        raise ValueError(f"only float32 can be rounded to {kept_bits} mantissa bits, found {values.dtype}")
    flat = values.reshape(-1).view(np.float32)
    rounded = np.empty_like(flat)
    squares = error_squares = 0.0
    for start in range(0, flat.size, _SLICE):
        piece = slice(start, start + _SLICE)
        rounded[piece] = bitround(flat[piece], kept_bits)
        squares, error_squares = _add_errors(flat[piece], rounded[piece], squares, error_squares)
    return Transformed([rounded.reshape(values.shape)], squares, error_squares)


def quantise_int8(values: Array, dtype: str) -> Transformed:
    """Return codes and scales of `values`, with their error.

    Args:
        values: (rows, ..., width) in storage dtype.
        dtype: Data type name of the values: ``bfloat16``, ``float16`` or ``float32``.

    Returns:
        int8 codes (rows, ..., width) and float32 scales (rows, ..., ceil(width / 32)); the last block of a row may be
        short. Blocks with NaN or an infinity have a scale of NaN and codes of zero.
    """
    *outer, width = values.shape
    flat = values.reshape(-1, width)
    codes = np.empty((len(flat), width), np.int8)
    scales = np.empty((len(flat), -(-width // BLOCK)), np.float32)
    squares = error_squares = 0.0
    step = max(1, _SLICE // max(1, width))
    for start in range(0, len(flat), step):
        piece = slice(start, start + step)
        wide = to_float32(flat[piece], dtype)
        codes[piece], scales[piece] = _quantise(wide)
        squares, error_squares = _add_errors(wide, _dequantise(codes[piece], scales[piece]), squares, error_squares)
    arrays = [codes.reshape(values.shape), scales.reshape(*outer, scales.shape[-1])]
    return Transformed(arrays, squares, error_squares)


def dequantise_int8(codes: Array, scales: Array, dtype: str) -> npt.NDArray[Any]:
    """Return the values of `codes` and `scales`, in the storage dtype of `dtype`; NaN where the scale is NaN.

    Raises:
        ValueError: The shapes do not belong together.
    """
    *outer, width = codes.shape
    expected = (*outer, -(-width // BLOCK))
    if scales.shape != expected:
        raise ValueError(f"codes {codes.shape} need scales {expected}, found {scales.shape}")
    values = np.empty(codes.shape, storage_dtype(dtype))
    flat_codes, flat_values = codes.reshape(-1, width), values.reshape(-1, width)
    flat_scales = scales.reshape(len(flat_codes), scales.shape[-1]).view(np.float32)
    step = max(1, _SLICE // max(1, width))
    for start in range(0, len(flat_codes), step):
        piece = slice(start, start + step)
        wide = _dequantise(flat_codes[piece].view(np.int8), flat_scales[piece])
        flat_values[piece] = _from_float32(wide, dtype)
    return values


def count_in_lost_blocks(codes: Array, scales: Array) -> int:
    """Return the number of values in blocks with a scale of NaN."""
    *_, width = codes.shape
    of_blocks = np.isnan(scales.reshape(-1, scales.shape[-1]).view(np.float32)).sum(axis=0)
    return int(of_blocks @ np.minimum(BLOCK, width - BLOCK * np.arange(len(of_blocks))))


def _quantise(values: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Quantise (rows, width); the last block is padded with zeros, which change no largest magnitude."""
    n_rows, width = values.shape
    n_blocks = -(-width // BLOCK)
    padded = np.zeros((n_rows, n_blocks * BLOCK), np.float32)
    padded[:, :width] = values
    blocks = padded.reshape(n_rows, n_blocks, BLOCK)
    scales = np.abs(blocks).max(axis=-1) / np.float32(_LARGEST)
    finite = np.isfinite(scales)
    scales[~finite] = np.nan
    with np.errstate(over="ignore"):
        too_large = np.isinf(scales * np.float32(_LARGEST))
    scales[too_large] = np.nextafter(scales[too_large], np.float32(0))
    # Divide by the scale: the reciprocal of a tiny scale is infinite.
    divisors = np.where(finite & (scales > 0), scales, np.float32(np.inf))[..., None]
    with np.errstate(invalid="ignore", over="ignore"):
        codes = np.clip(np.rint(blocks / divisors), -_LARGEST, _LARGEST)
    codes[~finite] = 0
    return codes.reshape(n_rows, -1)[:, :width].astype(np.int8), scales


def _dequantise(codes: npt.NDArray[np.int8], scales: Floats) -> Floats:
    width = codes.shape[-1]
    wide = np.repeat(scales, BLOCK, axis=-1)[..., :width]
    with np.errstate(invalid="ignore", over="ignore"):
        wide *= codes
    return wide


def _from_float32(values: Floats, dtype: str) -> Array:
    if dtype == "bfloat16":
        return values.astype(ml_dtypes.bfloat16).view("<u2")
    with np.errstate(over="ignore"):
        return values.astype(storage_dtype(dtype))


def _add_errors(before: Floats, after: Floats, squares: float, error_squares: float) -> tuple[float, float]:
    """Add the sums over the values that are finite before and after, in float64."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = after.astype(np.float64) - before
    wide = before.astype(np.float64)
    finite = np.isfinite(error)
    if not finite.all():
        error, wide = error[finite], wide[finite]
    return squares + float(np.vdot(wide, wide)), error_squares + float(np.vdot(error, error))


def count_nonfinite(rows: npt.NDArray[np.generic], dtype: str) -> int:
    """Return the number of NaN and infinite values in `rows`; 0 for integer dtypes.

    Args:
        rows: C-contiguous values in storage dtype (bfloat16 as its bits in uint16).
        dtype: Data type name, for example ``bfloat16``.
    """
    exponent = _EXPONENT.get(dtype)
    if exponent is None:
        return 0
    bits = rows.reshape(-1).view(f"<u{rows.dtype.itemsize}")
    return sum(_count(bits[i : i + _COUNTED], exponent) for i in range(0, bits.size, _COUNTED))


def _count(bits: npt.NDArray[np.unsignedinteger], exponent: int) -> int:
    sign = 1 << (8 * bits.itemsize - 1)
    if bits.view(f"<i{bits.itemsize}").max() < exponent and bits.max() < (sign | exponent):
        return 0
    return int(np.count_nonzero((bits & exponent) == exponent))
