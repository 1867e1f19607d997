"""Data types of stored arrays: names as in Zarr v3, numpy types as in memory.

Importing this module registers `bfloat16` in zarr-python: versions before 3.4 collect the `zarr.data_type` entry points
of other packages but never load them, so an archive could not be opened otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
from zarr.dtype import Float16, data_type_registry

from residua.store.base.errors import PlanError

BFLOAT16 = "bfloat16"
_NUMPY_TYPE = np.dtype(ml_dtypes.bfloat16)
_BITS = np.dtype("<u2")
_NOT_FINITE = {0x7FC0: "NaN", 0x7F80: "Infinity", 0xFF80: "-Infinity"}


@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):
    """The registered Zarr v3 extension type `bfloat16` for zarr-python, which has none.

    Values are numbers, of numpy type `ml_dtypes.bfloat16`: reading gives values, and writing converts values, as for
    every other float type. zarr-python 3.4 loads it by itself where Residua is installed (`zarr.data_type` in
    `pyproject.toml`); earlier versions know it once Residua has opened an archive. Specification: zarr-extensions,
    ``data-types/bfloat16``.
    """

    dtype_cls: ClassVar[type[np.dtype[Any]]] = type(_NUMPY_TYPE)  # type: ignore[assignment]  # the base has float16's
    _zarr_v3_name: ClassVar[str] = BFLOAT16
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()  # type: ignore[assignment]  # Zarr v2 has no such type

    def to_native_dtype(self) -> Any:
        """Return the numpy type of values in memory."""
        return _NUMPY_TYPE

    def _check_scalar(self, data: object) -> bool:  # type: ignore[override]  # the base narrows the type
        return isinstance(data, int | float | np.floating | np.integer | ml_dtypes.bfloat16)

    def _cast_scalar_unchecked(self, data: Any) -> Any:
        return _NUMPY_TYPE.type(data)

    def from_json_scalar(self, data: object, *, zarr_format: int) -> Any:  # noqa: ARG002  # zarr's signature
        """Return a fill value: a number, ``NaN``, ``Infinity``, ``-Infinity``, or the bits as ``0x`` and four digits.

        Raises:
            TypeError: `data` is none of these.
        """
        if isinstance(data, str):
            bits = next((bits for bits, text in _NOT_FINITE.items() if text == data), None)
            if bits is None and data.startswith("0x"):
                bits = int(data, 16)
            if bits is not None:
                return np.array(bits, _BITS).view(_NUMPY_TYPE)[()]
        elif isinstance(data, int | float) and not isinstance(data, bool):
            return _NUMPY_TYPE.type(data)
        raise TypeError(f"{data!r} is not a bfloat16 fill value: give a number, 'NaN', 'Infinity' or '0x...'")

    def to_json_scalar(
        self,
        data: object,
        *,
        zarr_format: int,  # noqa: ARG002  # zarr's signature
    ) -> float | str:
        """Return a fill value as the specification formats it."""
        value = np.array(self.cast_scalar(data), _NUMPY_TYPE)
        bits = int(value.view(_BITS))
        if bits in _NOT_FINITE:
            return _NOT_FINITE[bits]
        return f"0x{bits:04x}" if np.isnan(value) else float(value)


STORAGE_DTYPES: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {
        BFLOAT16: _BITS,
        "float16": np.dtype("<f2"),
        "float32": np.dtype("<f4"),
        "float64": np.dtype("<f8"),
        "int8": np.dtype("i1"),
        "uint8": np.dtype("u1"),
        "int32": np.dtype("<i4"),
        "int64": np.dtype("<i8"),
    }
)

_WIDER = {BFLOAT16: ("float32", "float64"), "float16": ("float32", "float64"), "float32": ("float64",)}

data_type_registry.register(BFLOAT16, BFloat16)


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


def holds(stored: str, computed: str) -> bool:
    """Return whether every value of data type `computed` is one of data type `stored`."""
    return stored == computed or stored in _WIDER.get(computed, ())


def to_float32(values: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.float32]:
    """Return `values` of data type `name` as float32; exact for bfloat16, float16 and float32.

    Args:
        values: Any shape; bfloat16 as its bits in uint16 or as `ml_dtypes.bfloat16`.
        name: Data type name, one of `STORAGE_DTYPES`.
    """
    dtype = storage_dtype(name)
    if name != BFLOAT16:
        return values.astype(np.float32, copy=False)
    if values.dtype == ml_dtypes.bfloat16:
        values = values.view(dtype)
    wide: npt.NDArray[np.uint32] = values.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)
