"""A linear probe on disk: ``probe.safetensors`` holds its numbers, ``probe.json`` says what they are."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from residua.store.base.errors import AnalysisError
from residua.store.storage.files import write_file
from residua.store.storage.mirror import fetched

TENSORS, DESCRIPTION = "probe.safetensors", "probe.json"


class SavedProbe(NamedTuple):
    """The saved content of a probe.

    Attributes:
        weight: (vectors, width) float64, for rows as they are stored; the heads of a row one after the other.
        bias: (vectors,) float64.
        penalty: Penalty on the squared weights of standardised rows.
        classes: The class of each vector (of two classes, the vector is that of the second); None for a regression.
        about: What it was fitted to, such as site and target, as information for people.
    """

    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]
    penalty: float
    classes: list[str] | list[int] | list[float] | list[bool] | None
    about: Mapping[str, str]


def write_probe(folder: str | PathLike[str], probe: SavedProbe) -> None:
    """Write the two files into `folder`, which is created if it does not exist."""
    description = {"classes": probe.classes, "penalty": probe.penalty, "about": dict(probe.about)}
    write_file(Path(folder) / TENSORS, [save({"weight": np.ascontiguousarray(probe.weight), "bias": probe.bias})])
    write_file(Path(folder) / DESCRIPTION, [json.dumps(description, indent=1).encode()])


def read_probe(folder: str | PathLike[str], storage_options: Mapping[str, Any] | None = None) -> SavedProbe:
    """Read and check the two files in `folder`, which may be an address.

    Args:
        folder: Path or address.
        storage_options: For an address, as for `residua.open`.

    Raises:
        AnalysisError: A file is missing, or the files do not describe a probe.
        StorageError: The address cannot be read.
    """
    try:
        with fetched(folder, storage_options, names=(TENSORS, DESCRIPTION)) as place:
            return _read(place)
    except FileNotFoundError as error:
        raise AnalysisError(f"{error}: give the folder of a saved probe, or its address") from error


def _read(place: Path) -> SavedProbe:
    try:
        tensors = load((place / TENSORS).read_bytes())
        description = json.loads((place / DESCRIPTION).read_bytes())
        probe = SavedProbe(
            weight=tensors["weight"],
            bias=tensors["bias"],
            penalty=description["penalty"],
            classes=description["classes"],
            about=description["about"],
        )
        _check(probe)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise AnalysisError(f"no probe can be read from {place} ({error}): give the folder of a saved probe") from error
    return probe


def _check(probe: SavedProbe) -> None:
    weight, bias = probe.weight, probe.bias
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or {weight.dtype, bias.dtype} != {np.dtype(np.float64)}:
        raise ValueError(f"weight {weight.dtype} {weight.shape} and bias {bias.dtype} {bias.shape} do not fit together")
    if not isinstance(probe.penalty, int | float) or not isinstance(probe.about, dict):
        raise TypeError("penalty is not a number, or about is not a mapping")
    n_vectors = 1
    if probe.classes is not None:
        is_plain = isinstance(probe.classes, list) and {*map(type, probe.classes)} in ({str}, {int}, {float}, {bool})
        if not is_plain or len(probe.classes) < 2:
            raise TypeError("classes is neither null nor a list of two or more texts, numbers or truth values")
        n_vectors = 1 if len(probe.classes) == 2 else len(probe.classes)
    if n_vectors != len(weight):
        raise ValueError(f"{n_vectors} vectors were expected, but there are {len(weight)}")
