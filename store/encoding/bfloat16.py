"""The registered Zarr v3 extension type `bfloat16` for zarr-python, surfaced as its bits in uint16.

zarr-python 3.1 has no bfloat16. Arrays of this type look like uint16 to it, and to the zarrs pipeline, so
that any bit pattern goes through unchanged; `ml_dtypes` or torch view the bits for free. The fill value is
written as the float that it stands for, as the extension asks (zarr-extensions, `data-types/bfloat16`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.dtype import DataTypeValidationError, UInt16, data_type_registry

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


def register() -> None:
    """Make `bfloat16` known to zarr-python; calling it again changes nothing."""
    data_type_registry.register(NAME, BFloat16)
