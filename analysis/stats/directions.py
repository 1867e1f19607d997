"""Directions in the space of a site's rows: read from a file, or made of the number of a channel."""

from os import PathLike
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from residua.store.base.errors import AnalysisError, PlanError
from residua.store.edits.vectors import read_array
from residua.store.read.archive import Archive

Floats = npt.NDArray[np.float64]

_TENSOR = "weight"  # of a file with several tensors, such as a saved probe


def read_direction(path: str | PathLike[str]) -> Floats:
    """Read a direction from a ``.npy`` or ``.safetensors`` file; of a saved probe it is the weight.

    Nothing in the file is executed.

    Returns:
        The array as it was saved, float64.

    Raises:
        AnalysisError: The file cannot be read, or does not hold one array of numbers.
    """
    try:
        values = read_array(Path(path), default=_TENSOR, floats_only=False)
    except PlanError as error:
        raise AnalysisError(
            f"the direction {path} cannot be read ({error}): give a .npy file of plain numbers, or a .safetensors file "
            f"with one tensor or a tensor {_TENSOR!r}"
        ) from error
    if values.dtype.kind not in "fiu" and values.dtype != ml_dtypes.bfloat16:
        raise AnalysisError(f"{path} holds no array of numbers: save one, for example with numpy.save")
    return np.array(values, np.float64)


def whole_row(
    archive: Archive, site: str, *, direction: npt.ArrayLike | None, channel: int | None, head: int | None
) -> Floats:
    """Return the direction that was asked for as a row of `site` sees it: zero outside `head`, heads in a line.

    Args:
        archive: The archive.
        site: A stored site.
        direction: One number for each value of a row, or of `head`.
        channel: Instead of a direction: the number of a value of a row, or of `head`.
        head: The head that is meant; None means the whole row.

    Returns:
        (width,) float64.

    Raises:
        AnalysisError: It does not fit the site; the message has what was given and what the site has.
    """
    shape = archive[site].shape[1:]
    if head is not None and (len(shape) < 2 or not 0 <= head < shape[0]):
        has = f"heads 0 to {shape[0] - 1}" if len(shape) > 1 else "no heads"
        raise AnalysisError(f"head {head} of {site} was asked for: it has {has}")
    if (direction is None) == (channel is None):
        raise AnalysisError(f"{site}: give either a direction or the number of a channel")
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
        raise AnalysisError(f"channel {channel} of {site} was asked for: there are channels 0 to {width - 1}")
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
        raise AnalysisError("the direction has a NaN or an infinity, and so would every score: save a finite one")
    return direction.reshape(shape)
