"""One array of an archive, read lazily: shape and dtype at once, rows by slice, list or mask.

Values come in a type that numpy can compute in: numpy sums bfloat16 in bfloat16, and float16 in float16, which gives
wrong sums of some hundred values without a warning. Both are therefore read as float32, which is exact.
"""

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from residua.store.base.errors import TooLargeError
from residua.store.encoding.codecs import INT8, PRESETS
from residua.store.encoding.dtypes import BFLOAT16, storage_dtype, to_float32
from residua.store.encoding.spec import ArraySpec
from residua.store.read.rows_in_shards import Array, ArrayReader, Filled, Following, RowNumbers, in_steps, reader_of

if TYPE_CHECKING:
    import torch

_HALF = (BFLOAT16, "float16")

RowSelection: TypeAlias = int | np.integer[Any] | slice | Sequence[int] | Sequence[bool] | Array | EllipsisType


class ArchiveArray:
    """Rows of one array of an archive, (rows, *row shape).

    Indexing with a slice, an integer, a list of rows or a boolean mask reads only those rows and returns numpy;
    further indices apply to the result. In numpy, bfloat16 and float16 become float32, which is exact. For the values
    as they are stored, call `numpy` with ``dtype=array.stored_dtype``; for their bits, `bits`. `torch` returns tensors
    of the stored type, in which torch adds up in float32.

    Attributes:
        name: The site, or ``rows/token``.
        shape: (rows, *row shape).
        ndim: Number of axes, the rows included.
        dtype: Type of the values that numpy gets.
        stored_dtype: Type of the stored values; `ml_dtypes.bfloat16` for bfloat16.
        specs: The array on disk, or the codes and scales of the int8 preset.

    Args:
        name: Name for messages: a site, or ``rows/token``.
        specs: The array on disk, or the codes and scales of the int8 preset.
        dtype: Name of the data type of the stored values.
        n_rows: Rows of the array.
        require: Called with the requested rows; raises if some are not captured yet.
        reader: Returns the reader of an array whose files hold full rows.
    """

    def __init__(
        self,
        name: str,
        specs: Sequence[ArraySpec],
        *,
        dtype: str,
        n_rows: int,
        require: Callable[[range | RowNumbers], None],
        reader: Callable[[ArraySpec], ArrayReader],
    ) -> None:
        self.name = name
        self.shape = (n_rows, *specs[0].row_shape)
        self.ndim = len(self.shape)
        self.stored_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == BFLOAT16 else storage_dtype(dtype)
        self.dtype = np.dtype(np.float32) if dtype in _HALF else self.stored_dtype
        self.specs = tuple(specs)
        self._dtype_name = dtype
        self._require = require
        self._readers = [reader_of(spec, reader) for spec in specs]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{self.name} {self.shape} {self._dtype_name}>"

    def __getitem__(self, rows: RowSelection | tuple[Any, ...]) -> Array:
        """Return the selected rows as numpy; see the class."""
        if isinstance(rows, tuple):
            picked, rest = rows[0], rows[1:]
            inner: Any = rest if isinstance(picked, int | np.integer) else (slice(None), *rest)
            return cast("Array", self.numpy(picked)[inner])
        return self.numpy(rows)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """Return all rows, for numpy functions."""
        if copy is False:
            raise ValueError(f"{self.name} is on disk: numpy gets it as a copy only")
        return self.numpy(..., dtype=dtype)

    def numpy(self, rows: RowSelection = ..., *, dtype: npt.DTypeLike | None = None) -> Array:
        """Return the selected rows as a numpy array, of this array's `dtype` unless another is given.

        Raises:
            TypeError: `dtype` is an integer type, and the values are floats.
            IndexError: A row lies outside the array.
            NotCapturedError: A row belongs to a shard that is not committed yet.
            TooLargeError: The rows do not fit into memory.
            DamagedArchiveError: A file is missing or altered; the message names it.
        """
        if isinstance(rows, int | np.integer):
            return cast("Array", self.numpy([int(rows)], dtype=dtype)[0])
        wanted = self.dtype if dtype is None else np.dtype(dtype)
        if wanted.kind in "iub" and self.dtype.kind == "f":
            raise TypeError(
                f"{self.name} holds {self._dtype_name} values, which {wanted} would cut off: read floats and convert "
                "them as you need it, or call bits(rows) for the bits of the stored values"
            )
        try:
            return self._converted(self._read(rows), wanted)
        except MemoryError as error:
            raise TooLargeError(
                f"{self.name} has {len(self):,} rows of {self.specs[0].row_bytes:,} bytes, and there is too little "
                f"memory for the requested ones ({error}): read fewer at a time"
            ) from error

    def bits(self, rows: RowSelection = ...) -> Array:
        """Return the bits of the selected rows' stored values, as unsigned integers of their size."""
        stored = self.numpy(rows, dtype=self.stored_dtype)
        return np.ascontiguousarray(stored).view(f"<u{self.stored_dtype.itemsize}")

    def _converted(self, found: Array, wanted: np.dtype[Any]) -> Array:
        """Return values as a reader has them, bfloat16 as its bits, in the type `wanted`."""
        if self._dtype_name == BFLOAT16 and wanted == np.float32:
            return to_float32(found, BFLOAT16)
        return found.view(self.stored_dtype).astype(wanted, copy=False)

    def torch(self, rows: RowSelection = ..., *, dtype: "torch.dtype | str | None" = None) -> "torch.Tensor":
        """Return the selected rows as a torch tensor on the CPU, of the stored type or of `dtype` (or its name).

        Raises:
            ValueError: torch has no such dtype. Other errors are those of `numpy`.
        """
        import torch

        wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not isinstance(wanted, torch.dtype):
            raise ValueError(f"torch has no dtype {dtype!r}: give one such as float32 or bfloat16")
        tensor = as_tensor(self.numpy(rows, dtype=self.stored_dtype))
        return tensor if wanted is None else tensor.to(wanted)

    def fill(self, out: Array, pieces: Sequence[RowNumbers | range], following: Following | None = None) -> None:
        """Read pieces of rows, one after the other, into `out`: faster than piece by piece, above all at an address.

        Args:
            out: C-contiguous (rows of all pieces, *row shape) of the stored dtype.
            pieces: Numbers of rows that the array has.
            following: What will be read next, and is fetched meanwhile at an address.

        Raises:
            IndexError: The array has no such row.
            ValueError: `out` is not of that shape, dtype and layout.
            NotCapturedError: A row belongs to a shard that is not committed yet.
            DamagedArchiveError: A file is missing or altered; the message names it.
        """
        expected = (sum(map(len, pieces)), *self.shape[1:])
        if out.shape != expected or out.dtype != self.stored_dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"rows of {self.name} need a C-contiguous {self.stored_dtype} array {expected}, found {out.dtype} "
                f"{out.shape}"
            )
        for rows in filter(len, pieces):
            first, last = (rows[0], rows[-1]) if isinstance(rows, range) else (int(rows.min()), int(rows.max()))
            if first < 0 or last >= len(self):
                raise IndexError(f"{self.name} has {len(self):,} rows: there are no rows {first:,} to {last:,}")
            self._require(rows)
        if len(self._readers) == 1:
            self._readers[0].fill(out.view(self.specs[0].storage_dtype), pieces, following)
            return
        filled = [
            Filled(reader.fill, spec.row_shape, spec.storage_dtype)
            for spec, reader in zip(self.specs, self._readers, strict=True)
        ]
        for places, parts in in_steps(filled, pieces, following, self.specs[0]):
            out[places] = self._converted(self._merge([*parts]), self.stored_dtype)

    def _read(self, rows: RowSelection) -> Array:
        if isinstance(rows, EllipsisType):
            rows = slice(None)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                stop = max(start, stop)
                self._require(range(start, stop))
                return self._merge([reader.read(start, stop) for reader in self._readers])
            self._require(range(start, stop, step))
            rows = np.arange(start, stop, step)
        indices = self._indices(rows)
        self._require(indices)
        return self._merge([reader.take(indices) for reader in self._readers])

    def _indices(self, rows: object) -> npt.NDArray[np.int64]:
        indices = np.asarray(rows)
        if indices.dtype == bool:
            if indices.shape != (len(self),):
                raise IndexError(
                    f"the mask has shape {indices.shape}, but {self.name} has {len(self):,} rows: "
                    "give one entry for each row"
                )
            return np.flatnonzero(indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise IndexError(f"rows of {self.name}: give a slice, a list of integers or a mask, not {rows!r}")
        indices = indices.astype(np.int64)
        outside = (indices < -len(self)) | (indices >= len(self))
        if outside.any():
            raise IndexError(f"{self.name} has {len(self):,} rows: there is no row {int(indices[outside][0]):,}")
        return np.where(indices < 0, indices + len(self), indices)

    def _merge(self, stored: list[Array]) -> Array:
        if len(stored) == 1:
            return stored[0]
        return PRESETS[INT8].restore(stored, self._dtype_name)


def as_tensor(values: Array) -> "torch.Tensor":
    """Return a torch tensor on the memory of `values`; bfloat16 that is not contiguous is copied."""
    import torch

    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
