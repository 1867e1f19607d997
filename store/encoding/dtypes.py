"""Data types of stored arrays: names as in Zarr v3, numpy types as they lie in memory.

Importing this module makes zarr-python know `bfloat16`: version 3.1.6 collects the `zarr.data_type` entry
points of other packages but never loads them, so an archive could not be opened otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt
from zarr.dtype import DataTypeValidationError, UInt16, data_type_registry

from residua.store.base.errors import PlanError

NAME = "bfloat16"
_BIT_STRING = "0x"
_CANONICAL = {"NaN": 0x7FC0, "Infinity": 0x7F80, "-Infinity": 0xFF80}


def _value_to_json(bits: int) -> float | str:
    for text, canonical in _CANONICAL.items():
        if bits == canonical:
            return text
    value = float(np.array(bits, np.uint16).view(ml_dtypes.bfloat16))
    return f"{_BIT_STRING}{bits:04x}" if math.isnan(value) else value


def _bits_from_json(value: object) -> int:
    if isinstance(value, str) and value in _CANONICAL:
        return _CANONICAL[value]
    if isinstance(value, str) and value.startswith(_BIT_STRING):
        return int(value, 16)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(np.float32(value).astype(ml_dtypes.bfloat16).view(np.uint16))
    raise TypeError(f"{value!r} is not a bfloat16 fill value: expected a number, 'NaN', 'Infinity' or '0x…'")


@dataclass(frozen=True, kw_only=True)
class BFloat16(UInt16):
    """Zarr data type `bfloat16`; its native type is the little-endian uint16 that holds the bits."""

    _zarr_v3_name: ClassVar[str] = NAME  # type: ignore[assignment]  # the base fixes it to its own literal

    @classmethod
    def from_native_dtype(cls, dtype: object) -> Self:
        """Refuse every numpy type: uint16 stays `uint16` unless `bfloat16` is asked for by name."""
        raise DataTypeValidationError(f"{dtype} is not {NAME}: name the Zarr data type {NAME!r} instead")

    @classmethod
    def _from_json_v2(cls, data: object) -> Self:
        raise DataTypeValidationError(f"{data} is not {NAME}: Zarr v2 has no such type")

    def from_json_scalar(self, data: object, *, zarr_format: int) -> np.uint16:  # noqa: ARG002  # zarr's signature
        """Return the bits of a fill value."""
        return np.uint16(_bits_from_json(data))

    def to_json_scalar(  # type: ignore[override]  # the base promises an int
        self,
        data: object,
        *,
        zarr_format: int,  # noqa: ARG002  # zarr's signature
    ) -> float | str:
        """Return a fill value, given by its bits, as the float that they stand for."""
        return _value_to_json(int(self.cast_scalar(data)))


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

data_type_registry.register(NAME, BFloat16)


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
    if name != NAME:
        return values.astype(np.float32, copy=False)
    if values.dtype == ml_dtypes.bfloat16:
        values = values.view(dtype)
    wide: npt.NDArray[np.uint32] = values.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)
