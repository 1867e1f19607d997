"""Directions in the space of a site's rows: read from a file, or given by the number of a channel."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from residua.store.base.errors import AnalysisError, PlanError
from residua.store.edits.vectors import read_array
from residua.store.read.archive import Archive
from residua.store.storage.mirror import fetched

Floats = npt.NDArray[np.float64]

_TENSOR = "weight"  # of a file with several tensors, such as a saved probe


def read_direction(path: str | PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Floats:
    """Read a direction from a ``.npy`` or ``.safetensors`` file, or its address; of a saved probe it is the weight.

    Nothing in the file is executed.

    Args:
        path: Path or address of the file.
        storage_options: For an address, as for `residua.open`.

    Returns:
        The array as it was saved, float64.

    Raises:
        AnalysisError: The file cannot be read, or does not hold one array of numbers.
    """
    try:
        with fetched(path, storage_options) as local:
            values = np.array(read_array(local, default=_TENSOR, floats_only=False))
    except PlanError as error:
        raise AnalysisError(
            f"the direction {path} cannot be read ({error}): give a .npy file of plain numbers, or a .safetensors file "
            f"with one tensor or a tensor {_TENSOR!r}"
        ) from error
    if values.dtype.kind not in "fiu" and values.dtype != ml_dtypes.bfloat16:
        raise AnalysisError(f"{path} holds no array of numbers: save one, for example with numpy.save")
    return np.array(values, np.float64)


def full_row(
    archive: Archive, site: str, *, direction: npt.ArrayLike | None, channel: int | None, head: int | None
) -> Floats:
    """Return a direction for the rows of `site`, flattened: zero outside `head` if one is given.

    Args:
        archive: The archive.
        site: A stored site.
        direction: One number for each value of a row, or of `head`.
        channel: Instead of a direction: the number of a value of a row, or of `head`.
        head: The head that the direction is for; None for the full row.

    Returns:
        (width,) float64.

    Raises:
        AnalysisError: The direction does not fit the site; the message has both shapes.
    """
    shape = archive[site].shape[1:]
    if head is not None and (len(shape) < 2 or not 0 <= head < shape[0]):
        has = f"heads 0 to {shape[0] - 1}" if len(shape) > 1 else "no heads"
        raise AnalysisError(f"there is no head {head} of {site}: it has {has}")
    if (direction is None) == (channel is None):
        raise AnalysisError(f"{site}: give either a direction or the number of a channel, and not both")
    inner = shape if head is None else shape[1:]
    full = np.zeros(shape)
    full[... if head is None else head] = (
        _channel(site, inner, channel)
        if channel is not None
        else _fitted(site, inner, np.asarray(direction, np.float64))
    )
    return full.reshape(-1)


def _channel(site: str, shape: tuple[int, ...], channel: int) -> Floats:
    width = int(np.prod(shape))
    if not 0 <= channel < width:
        raise AnalysisError(f"there is no channel {channel} of {site}: it has channels 0 to {width - 1}")
    return np.eye(1, width, channel).reshape(shape)


def _fitted(site: str, shape: tuple[int, ...], direction: Floats) -> Floats:
    given = direction.shape
    while len(given) > 1 and given[0] == 1:
        given = given[1:]
    if given not in (shape, (int(np.prod(shape)),)):
        has = " x ".join(map(str, shape))
        heads = ", or choose one of its heads" if len(shape) > 1 else ""
        raise AnalysisError(
            f"the direction has shape {direction.shape}, but {site} has {has} values: give one number for each{heads}"
        )
    if not np.isfinite(direction).all():
        raise AnalysisError("the direction has NaN or infinite values, and so would every score: give a finite one")
    return direction.reshape(shape)
