"""NaN and infinite values are counted exactly as numpy's isfinite counts them, in every floating-point type."""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from residua.store.encoding.dtypes import STORAGE_DTYPES, storage_dtype
from residua.store.encoding.nonfinite import _BLOCK, count_nonfinite

FLOATS: dict[str, npt.DTypeLike] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6)


def expected(bits: npt.NDArray[np.generic], dtype: str) -> int:
    return int((~np.isfinite(bits.view(FLOATS[dtype]))).sum())


@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
def test_any_bits(dtype: str, data: st.DataObject) -> None:
    storage = storage_dtype(dtype)
    bits = data.draw(hnp.arrays(f"<u{storage.itemsize}", SHAPES))
    assert count_nonfinite(bits.view(storage), dtype) == expected(bits, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_edges_of_the_number_line(dtype: str) -> None:
    kind = np.dtype(FLOATS[dtype])
    info = ml_dtypes.finfo(kind)  # type: ignore[no-untyped-call]  # theirs has no annotations
    finite = np.array([0.0, -0.0, info.max, info.min, info.smallest_subnormal, -info.smallest_subnormal, 1.0], kind)
    special = np.array([np.inf, -np.inf, np.nan, -np.nan], kind)
    storage = storage_dtype(dtype)
    assert count_nonfinite(finite.view(storage), dtype) == 0
    assert count_nonfinite(special.view(storage), dtype) == 4
    for value in special:
        one = np.append(finite, np.array([value], kind))
        assert count_nonfinite(one.view(storage), dtype) == 1, f"{value} among finite values"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("at", [0, _BLOCK - 1, _BLOCK, 2 * _BLOCK + 4])
def test_none_is_missed_at_the_seams_of_blocks(dtype: str, at: int) -> None:
    values = np.zeros(2 * _BLOCK + 5, FLOATS[dtype])
    values[at] = -np.inf
    assert count_nonfinite(values.view(storage_dtype(dtype)), dtype) == 1


@pytest.mark.parametrize("dtype", sorted(STORAGE_DTYPES.keys() - FLOATS.keys()))
def test_integers_are_finite(dtype: str) -> None:
    assert count_nonfinite(np.full(9, -1).astype(storage_dtype(dtype)), dtype) == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_rows_hold_none(dtype: str) -> None:
    assert count_nonfinite(np.zeros((0, 4), storage_dtype(dtype)), dtype) == 0
