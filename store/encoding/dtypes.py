"""Data types of stored arrays: names as in Zarr v3, numpy types as they lie in memory.

Importing this module makes zarr-python know `bfloat16`: version 3.1.6 collects the `zarr.data_type` entry
points of other packages but never loads them, so an archive could not be opened otherwise.
"""

from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np
import numpy.typing as npt

from residua.store.base.errors import PlanError
from residua.store.encoding import bfloat16

STORAGE_DTYPES: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {
        "bfloat16": np.dtype("<u2"),
        "float16": np.dtype("<f2"),
        "float32": np.dtype("<f4"),
        "float64": np.dtype("<f8"),
        "int8": np.dtype("i1"),
        "uint8": np.dtype("u1"),
        "int32": np.dtype("<i4"),
        "int64": np.dtype("<i8"),
    }
)

bfloat16.register()


def storage_dtype(name: str) -> np.dtype[np.generic]:
    """Return the numpy type that holds one element of data type `name`; for bfloat16, its bits in uint16.

    Raises:
        PlanError: (a ValueError) `name` is not a data type that an archive may have.
    """
    try:
        return STORAGE_DTYPES[name]
    except KeyError:
        known = ", ".join(STORAGE_DTYPES)
        raise PlanError(f"data type {name!r} cannot be stored; choose one of {known}") from None


def to_float32(values: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.float32]:
    """Return `values` of data type `name` as float32; exact for bfloat16, float16 and float32.

    Args:
        values: Any shape; bfloat16 as its bits in uint16 or as `ml_dtypes.bfloat16`.
        name: Data type name, one of `STORAGE_DTYPES`.
    """
    dtype = storage_dtype(name)
    if name != bfloat16.NAME:
        return values.astype(np.float32, copy=False)
    if values.dtype == ml_dtypes.bfloat16:
        values = values.view(dtype)
    wide: npt.NDArray[np.uint32] = values.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)
