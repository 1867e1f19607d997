"""Linear probes with scikit-learn's interface, fitted from blocks of rows that need not fit into memory.

`RidgeProbe` and `LogisticProbe` take numpy arrays and Dask arrays, such as those of `residua.analysis.array`, whose
blocks are computed one at a time. The heads of a row are joined to one vector. Both probes standardise the channels.
Both are exact: they find what scikit-learn's `Ridge` and `LogisticRegression` find after a `StandardScaler`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted

from residua.analysis.probes.files import SavedProbe, read_probe, write_probe
from residua.analysis.probes.logistic import (
    SAMPLE_ROWS,
    Basis,
    LossSums,
    Problem,
    Products,
    best_constant,
    fit_logistic,
    has_many_rows,
    loss_sums,
    probabilities,
    scale_of,
    standardised,
)
from residua.analysis.probes.ridge import solve
from residua.analysis.rows.blocks import Array, Rows, array_blocks, labelled_blocks
from residua.analysis.support.moments import Moments
from residua.store.base.errors import AnalysisError
from residua.store.storage.place import saved_to

Floats: TypeAlias = npt.NDArray[np.float64]
LabelledBlock: TypeAlias = tuple[Array, npt.NDArray[np.int64]]


class LinearProbe(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What both probes share: prediction from weights and biases, and files.

    Attributes:
        penalty: Penalty on the squared weights of standardised rows.
        n_features_in_: Width of a row.
    """

    penalty: float
    n_features_in_: int

    @abstractmethod
    def saved(self, about: Mapping[str, str]) -> SavedProbe:
        """Return the content to save of the fitted probe."""

    def save(
        self, folder: str | PathLike[str], *, storage_options: Mapping[str, Any] | None = None, **about: str
    ) -> None:
        """Write ``probe.safetensors`` and ``probe.json``, which also holds `about`, into `folder`.

        The folder is created if it does not exist.

        Args:
            folder: The folder, or its address in a bucket.
            storage_options: For an address, as for `residua.open`.
            about: What the probe was fitted to, such as site and target.

        Raises:
            PlanError: Nothing can be written at such an address.
            OSError: The files cannot be written.
        """
        check_is_fitted(self, "n_features_in_")
        with saved_to(folder, storage_options) as local:
            write_probe(local, self.saved(about))

    @staticmethod
    def load(
        folder: str | PathLike[str], *, storage_options: Mapping[str, Any] | None = None
    ) -> "RidgeProbe | LogisticProbe":
        """Return the probe that was saved in `folder`.

        Args:
            folder: The folder, or its address.
            storage_options: For an address, as for `residua.open`.

        Raises:
            AnalysisError: There is no probe, or its files are damaged.
            StorageError: The address cannot be read.
        """
        saved = read_probe(folder, storage_options)
        return RidgeProbe.of(saved) if saved.classes is None else LogisticProbe.of(saved)

    def _scores(self, X: Rows) -> Floats:
        """Return weight times row plus bias, (rows, vectors)."""
        check_is_fitted(self, "n_features_in_")
        saved = self.saved({})
        found = [self._checked(block).astype(np.float64) @ saved.weight.T + saved.bias for block in array_blocks(X)]
        return np.concatenate(found)

    def _checked(self, block: Array) -> Array:
        """Return a block as (rows, width) float32 or float64; the first block that is fitted sets the width."""
        dtype = np.float32 if block.dtype.itemsize < 4 or block.dtype == np.float32 else np.float64
        checked: Array = check_array(block.reshape(len(block), -1).astype(dtype, copy=False), input_name="X")
        if checked.shape[1] != getattr(self, "n_features_in_", checked.shape[1]):
            raise ValueError(
                f"X has {checked.shape[1]} features, but {type(self).__name__} was fitted to {self.n_features_in_}"
            )
        self.n_features_in_ = checked.shape[1]
        return checked


class RidgeProbe(RegressorMixin, LinearProbe):  # type: ignore[misc]  # scikit-learn has no types
    """Ridge regression, solved exactly from a covariance; `partial_fit` adds rows.

    Args:
        penalty: Penalty on the squared weights of standardised rows; scikit-learn's alpha divided by the number of
            rows.

    Attributes:
        n_features_in_: Width of a row.

    Example:
        >>> rows = np.random.default_rng(0).standard_normal((1000, 4))
        >>> probe = RidgeProbe(penalty=1e-6).fit(rows, 3 * rows[:, 0] - rows[:, 2] + 5)
        >>> probe.predict([[1, 0, 0, 0]]).round(2)
        array([8.])
    """

    def __init__(self, penalty: float = 1e-3) -> None:
        self.penalty = penalty

    @classmethod
    def of(cls, saved: SavedProbe) -> Self:
        """Return the saved probe; it can predict, but `partial_fit` raises."""
        probe = cls(saved.penalty)
        probe.n_features_in_ = saved.weight.shape[1]
        probe._solution = saved.weight[0], float(saved.bias[0])
        return probe

    def fit(self, X: Rows, y: Rows) -> Self:
        """Fit to rows `X`, ``(rows, *row shape)``, and numbers `y`, (rows,); forget earlier rows."""
        for name in ("n_features_in_", "_moments", "_solution"):
            self.__dict__.pop(name, None)
        return self.partial_fit(X, y)

    def partial_fit(self, X: Rows, y: Rows) -> Self:
        """Add rows; the result is the same as from all rows at once.

        Raises:
            AnalysisError: The probe was loaded; files do not hold its covariance.
        """
        if "_moments" not in self.__dict__ and "_solution" in self.__dict__:
            raise AnalysisError("a loaded probe cannot take in more rows: fit a new one")
        check_consistent_length(X, y)
        numbers = check_array(np.asarray(y), dtype="float64", ensure_2d=False, input_name="y")
        for rows, targets in labelled_blocks(X, numbers):
            checked = self._checked(rows)
            if "_moments" not in self.__dict__:
                self._moments = Moments(self.n_features_in_ + 1)
            self._moments.add(np.column_stack([checked, targets]))
        self.__dict__.pop("_solution", None)
        return self

    @property
    def coef_(self) -> Floats:
        """Weights for rows as they are stored, (width,)."""
        return self._solved()[0]

    @property
    def intercept_(self) -> float:
        """The bias."""
        return self._solved()[1]

    def predict(self, X: Rows) -> Floats:
        """Return the predicted numbers, (rows,)."""
        return self._scores(X)[:, 0]

    def saved(self, about: Mapping[str, str]) -> SavedProbe:
        """Return the content to save of the fitted probe."""
        weight, bias = self._solved()
        return SavedProbe(weight[None], np.array([bias]), self.penalty, None, about)

    def _solved(self) -> tuple[Floats, float]:
        check_is_fitted(self, "n_features_in_")
        if "_solution" not in self.__dict__:
            line = solve(self._moments, self.n_features_in_, 0, [self.penalty])[0]
            self._solution = line.weight, line.bias
        return self._solution


class LogisticProbe(ClassifierMixin, LinearProbe):  # type: ignore[misc]  # scikit-learn has no types
    """Logistic regression with two classes or more, fitted in a few passes over the rows.

    Args:
        penalty: Penalty on the squared weights of standardised rows: 1 / (C rows), with scikit-learn's C.
        tolerance: How far the mean loss may be above its minimum, in nats.
        most_passes: Most passes over the rows.

    Attributes:
        n_features_in_: Width of a row.
        classes_: The classes, sorted.
        coef_: Weights for rows as they are stored, (vectors, width) float64; one vector for two classes.
        intercept_: (vectors,) float64.
        n_iter_: Steps taken.

    Example:
        >>> rows = np.random.default_rng(0).standard_normal((1000, 4))
        >>> probe = LogisticProbe().fit(rows, np.where(rows[:, 1] > 0, "up", "down"))
        >>> probe.predict([[0, 2, 0, 0]])
        array(['up'], dtype='<U4')
    """

    def __init__(self, penalty: float = 1e-3, tolerance: float = 1e-8, most_passes: int = 300) -> None:
        self.penalty = penalty
        self.tolerance = tolerance
        self.most_passes = most_passes

    @classmethod
    def of(cls, saved: SavedProbe) -> Self:
        """Return the saved probe."""
        probe = cls(saved.penalty)
        probe.classes_ = np.asarray(saved.classes)
        probe.coef_, probe.intercept_ = saved.weight, saved.bias
        probe.n_features_in_ = saved.weight.shape[1]
        return probe

    def fit(self, X: Rows, y: Rows) -> Self:
        """Fit to rows `X`, ``(rows, *row shape)``, and classes `y`, (rows,), in several passes over `X`.

        Raises:
            ValueError: There is only one class.
        """
        self.__dict__.pop("n_features_in_", None)
        check_consistent_length(X, y)
        self.classes_, codes = np.unique(np.asarray(y), return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"all rows are of class {self.classes_[0]!r}: a probe needs two classes or more")

        def batches() -> Iterator[LabelledBlock]:
            for rows, labels in labelled_blocks(X, codes):
                yield self._checked(rows), labels[:, None]

        moments: Moments | None = None
        for rows, _ in batches():
            moments = moments or Moments(rows.shape[1], full=False)
            moments.add(rows)
        assert moments is not None  # noqa: S101  # two classes have rows
        mean, scale = moments.mean, scale_of(moments)

        def summed(problems: Sequence[Problem], weights: Floats) -> LossSums:
            total = LossSums.zero(len(problems), weights.shape)
            for rows, labels in batches():
                total.merge(loss_sums(standardised(rows, mean, scale), labels, problems, weights))
            return total

        problem = Problem(0, len(self.classes_), self.penalty)
        sampled = partial(_sampled_products, batches, moments)
        is_whole = has_many_rows(moments.n, len(mean), problem.n_vectors)
        (found,) = fit_logistic(
            summed,
            [problem],
            Basis.of(moments, sampled, is_whole=is_whole),
            tolerance=self.tolerance,
            most_passes=self.most_passes,
            starts={0: best_constant(np.bincount(codes), len(mean))},
        )
        self.coef_, self.intercept_, self.n_iter_ = found.weight, found.bias, found.n_steps
        return self

    def decision_function(self, X: Rows) -> Floats:
        """Return the logits: (rows,) of the second of two classes, else (rows, classes)."""
        scores = self._scores(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict_proba(self, X: Rows) -> Floats:
        """Return the probability of each class, (rows, classes)."""
        return probabilities(self._scores(X))

    def predict(self, X: Rows) -> Array:
        """Return the most likely class, (rows,)."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])

    def saved(self, about: Mapping[str, str]) -> SavedProbe:
        """Return the content to save of the fitted probe."""
        return SavedProbe(self.coef_, self.intercept_, self.penalty, self.classes_.tolist(), about)


def _sampled_products(
    batches: Callable[[], Iterator[LabelledBlock]], moments: Moments, directions: Floats | None
) -> Products:
    """Return the products of every so many rows, the same ones however they are cut into batches."""
    width = len(moments.mean)
    found = Products.zero(width, directions)
    step, first = max(1, moments.n // (SAMPLE_ROWS * width)), 0
    for rows, _ in batches():
        found.add(standardised(rows[-first % step :: step], moments.mean, scale_of(moments)), directions)
        first += len(rows)
    return found
