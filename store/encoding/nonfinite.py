"""Counting NaN and infinite values at the price of two maxima, so that every capture can afford it.

A float whose exponent bits are all ones is NaN or infinite. Read as a signed integer, the positive ones are the
largest values there are; read as unsigned, the negative ones are. So two maxima over the bits, which numpy runs at
memory speed and without a temporary, say whether there is any; only then are they counted.
"""

import numpy as np
import numpy.typing as npt

_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
_BLOCK = 1 << 17


def count_nonfinite(rows: npt.NDArray[np.generic], dtype: str) -> int:
    """Return how many values of `rows` are NaN or infinite; 0 for integer dtypes.

    Args:
        rows: C-contiguous values in storage dtype (bfloat16 as its bits in uint16).
        dtype: Data type name, for example ``bfloat16``.
    """
    exponent = _EXPONENT.get(dtype)
    if exponent is None:
        return 0
    bits = rows.reshape(-1).view(f"<u{rows.dtype.itemsize}")
    return sum(_count(bits[i : i + _BLOCK], exponent) for i in range(0, bits.size, _BLOCK))


def _count(bits: npt.NDArray[np.unsignedinteger], exponent: int) -> int:
    sign = 1 << (8 * bits.itemsize - 1)
    if bits.view(f"<i{bits.itemsize}").max() < exponent and bits.max() < (sign | exponent):
        return 0
    return int(np.count_nonzero((bits & exponent) == exponent))
