"""A linear probe on disk: ``probe.safetensors`` with its numbers, and ``probe.json`` with what they mean."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from residua.store.base.errors import AnalysisError
from residua.store.storage.files import write_file

TENSORS, MEANING = "probe.safetensors", "probe.json"


class SavedProbe(NamedTuple):
    """What is kept of a probe.

    Attributes:
        weight: (vectors, width) float64, for rows as they are stored, heads in a line.
        bias: (vectors,) float64.
        penalty: Of the squared weights of standardised rows.
        classes: What the vectors mean (of two classes, the vector is the second's); None for a number.
        about: What it was fitted to, such as site and target; for people.
    """

    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]
    penalty: float
    classes: list[str] | list[int] | list[float] | list[bool] | None
    about: Mapping[str, str]


def write_probe(folder: str | PathLike[str], probe: SavedProbe) -> None:
    """Write the two files into `folder`, which is made where it is missing."""
    meaning = {"classes": probe.classes, "penalty": probe.penalty, "about": dict(probe.about)}
    write_file(Path(folder) / TENSORS, [save({"weight": np.ascontiguousarray(probe.weight), "bias": probe.bias})])
    write_file(Path(folder) / MEANING, [json.dumps(meaning, indent=1).encode()])


def read_probe(folder: str | PathLike[str]) -> SavedProbe:
    """Read the two files in `folder`; nothing in them is believed.

    Raises:
        AnalysisError: A file is missing, or they do not describe a probe.
    """
    place = Path(folder)
    try:
        tensors = load((place / TENSORS).read_bytes())
        meaning = json.loads((place / MEANING).read_bytes())
        probe = SavedProbe(
            weight=tensors["weight"],
            bias=tensors["bias"],
            penalty=meaning["penalty"],
            classes=meaning["classes"],
            about=meaning["about"],
        )
        _check(probe)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise AnalysisError(
            f"{place} holds no probe that can be read ({error}): give a folder that a probe was saved in"
        ) from error
    return probe


def _check(probe: SavedProbe) -> None:
    weight, bias = probe.weight, probe.bias
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or {weight.dtype, bias.dtype} != {np.dtype(np.float64)}:
        raise ValueError(f"a weight {weight.dtype} {weight.shape} and a bias {bias.dtype} {bias.shape} do not fit")
    if not isinstance(probe.penalty, int | float) or not isinstance(probe.about, dict):
        raise TypeError("penalty and about are not a number and a mapping")
    n_vectors = 1
    if probe.classes is not None:
        is_plain = isinstance(probe.classes, list) and {*map(type, probe.classes)} in ({str}, {int}, {float}, {bool})
        if not is_plain or len(probe.classes) < 2:
            raise TypeError("classes are neither a list of two or more of one plain type nor null")
        n_vectors = 1 if len(probe.classes) == 2 else len(probe.classes)
    if n_vectors != len(weight):
        raise ValueError(f"{n_vectors} vectors were expected, and {len(weight)} found")
