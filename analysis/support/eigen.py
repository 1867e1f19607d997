"""Eigenvectors of symmetric matrices, by LAPACK's `syevr`, while other threads run.

scipy's `eigh` makes the same call and keeps the interpreter's lock, for minutes where the model is wide. A Dask worker
then sends no heartbeat, and after five minutes (``worker-ttl``) its scheduler takes it for dead and gives its job to
the next one, which dies of it, too. A call through `ctypes` lets the lock go.

`syevr` takes no second matrix to work in, as the divide-and-conquer of numpy and torch does.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, cython_lapack  # pyright: ignore[reportAttributeAccessIssue]  # compiled

Array = npt.NDArray[np.floating]


def eigenvectors_(matrix: Array) -> tuple[Array, Array]:
    """Return the eigenvalues of a symmetric matrix, ascending, and its eigenvectors, whose signs are arbitrary.

    Args:
        matrix: (n, n), float32 or float64, C-contiguous; one of its triangles is read, and all of it is overwritten.

    Returns:
        The values, (n,), and the vectors, (n, n), one a column, both in the matrix's dtype.

    Raises:
        LinAlgError: LAPACK found none.
    """
    if matrix.dtype not in (np.float32, np.float64) or not matrix.flags.c_contiguous:
        raise TypeError(f"a contiguous matrix of float32 or float64 is needed, not {matrix.dtype}")
    n, dtype = len(matrix), matrix.dtype
    values, vectors = np.empty(n, dtype), np.empty((n, n), dtype, order="F")
    support, n_found, info = np.empty(2 * max(1, n), np.intc), ctypes.c_int(), ctypes.c_int()
    size, real = ctypes.c_int(n), ctypes.c_float if dtype == np.float32 else ctypes.c_double
    unused, zero = ctypes.c_int(1), real(0)
    work, whole_work = np.empty(1, dtype), np.empty(1, np.intc)
    for is_query in (True, False):
        n_work, n_whole = (ctypes.c_int(-1 if is_query else len(one)) for one in (work, whole_work))
        _syevr(dtype.name)(
            *(b"V", b"A", b"L", ctypes.byref(size), matrix.ctypes.data, ctypes.byref(size)),
            *(ctypes.byref(one) for one in (zero, zero, unused, unused, zero, n_found)),
            *(values.ctypes.data, vectors.ctypes.data, ctypes.byref(size), support.ctypes.data),
            *(work.ctypes.data, ctypes.byref(n_work), whole_work.ctypes.data, ctypes.byref(n_whole)),
            ctypes.byref(info),
        )
        if info.value:
            raise LinAlgError(f"LAPACK's syevr ended with {info.value} for a matrix of {n:,} rows")
        if is_query:
            work, whole_work = np.empty(max(1, int(work[0])), dtype), np.empty(max(1, int(whole_work[0])), np.intc)
    return values, vectors


@cache
def _syevr(dtype: str) -> Any:
    """Return the function of LAPACK that scipy has, which is called without the interpreter's lock."""
    capsule = cython_lapack.__pyx_capi__["ssyevr" if dtype == "float32" else "dsyevr"]
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    text, numbers = [ctypes.c_char_p] * 3, [ctypes.c_void_p] * 18
    return ctypes.CFUNCTYPE(None, *text, *numbers)(pointer(capsule, name(capsule)))
