"""The affine map of a lens, read from its folder: plain tensors, no code and no pickle.

A lens takes a row h of the residual stream to h + W h + b, its guess at the final residual stream. The folder holds
``.safetensors`` files with ``NAME.weight`` (width, width) and ``NAME.bias`` (width), or ``NAME.weight.npy`` and
``NAME.bias.npy``. NAME is a site, or the number that the `tuned-lens` package gives: of the block whose input it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from residua.store.errors import PlanError
from residua.store.sitenames import Site
from residua.store.vectors import MAX_VECTOR_BYTES, read_tensors

_MAX_FILES = 10_000
Floats = npt.NDArray[np.float64]


def lens_map(folder: Path, site: Site) -> tuple[Floats, Floats]:
    """Return the matrix W and the vector b of a site, float64.

    Raises:
        PlanError: The folder has no lens for the site, or none that fits together.
    """
    if not folder.is_dir():
        raise PlanError(f"there is no lens at {folder}: name a folder")
    tensors = _tensors(folder)
    for name in _names(site):
        if f"{name}.weight" in tensors:
            weight = np.asarray(tensors[f"{name}.weight"], np.float64)
            bias = np.asarray(tensors.get(f"{name}.bias", np.zeros(len(weight))), np.float64)
            if weight.ndim != 2 or weight.shape != (bias.size, bias.size) or bias.ndim != 1:
                raise PlanError(f"{folder}: the lens of {site} is {weight.shape} and {bias.shape}, no affine map")
            return weight, bias
    raise PlanError(f"{folder} has no lens for {site}: it holds {', '.join(sorted(tensors)[:6]) or 'no tensors'}")


def _names(site: Site) -> list[str]:
    layer = {"resid_pre": 0, "resid_post": 1}.get(site.kind)
    return [str(site), *([] if layer is None or site.layer is None else [str(site.layer + layer)])]


def _tensors(folder: Path) -> Mapping[str, npt.NDArray[Any]]:
    found: dict[str, npt.NDArray[Any]] = {}
    for number, path in enumerate(sorted(folder.iterdir())):
        if number > _MAX_FILES or not path.is_file() or path.suffix not in (".safetensors", ".npy"):
            continue
        if path.stat().st_size > MAX_VECTOR_BYTES:
            raise PlanError(f"{path} is over 512 MiB: no lens is that large")
        try:
            if path.suffix == ".npy":
                found[path.name.removesuffix(".npy")] = np.load(path, mmap_mode="r", allow_pickle=False)
            else:
                found.update(read_tensors(path))
        except (OSError, ValueError, EOFError, SafetensorError) as error:
            raise PlanError(f"{path} cannot be read as part of a lens: {error}") from error
    return found
