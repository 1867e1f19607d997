"""Eigenvectors by a call of LAPACK that lets other threads run."""

import ctypes

import numpy as np
import pytest

from residua.analysis.support import eigen
from residua.analysis.support.eigen import eigenvectors_


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (2, 2), (60, 60), (60, 7)])
def test_they_are_numpys(n: int, rank: int, dtype: type[np.floating]) -> None:
    rows = np.random.default_rng(n).standard_normal((rank, n)).astype(dtype)
    matrix = rows.T @ rows
    values, vectors = eigenvectors_(matrix.copy())
    exact, near = matrix.astype(np.float64), 60 * float(np.finfo(dtype).eps) * n
    assert values.dtype == vectors.dtype == np.dtype(dtype)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(exact), atol=near)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), atol=near)
    np.testing.assert_allclose(exact @ vectors, vectors * values, atol=near)


def test_the_interpreters_lock_is_let_go() -> None:
    """A worker has to send heartbeats meanwhile."""
    eigenvectors_(np.eye(2))
    assert not type(eigen._syevr("float64"))._flags_ & ctypes._FUNCFLAG_PYTHONAPI  # type: ignore[attr-defined]


@pytest.mark.parametrize("matrix", [np.eye(3, dtype=np.float16), np.eye(6)[::2, ::2]])
def test_other_matrices_are_refused(matrix: np.ndarray) -> None:
    with pytest.raises(TypeError, match="contiguous"):
        eigenvectors_(matrix)
