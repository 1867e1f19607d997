"""Vectors: numbers in an edit itself, or in a ``.npy`` or ``.safetensors`` file. Nothing in a file is executed.

``FILE#NAME`` names one tensor of a file that holds several. The file of an edit is in the folder of the edits or
below, also after links are followed, or at an address. Sizes are checked before memory is taken.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import deserialize

from residua.store.base.canonical import Json
from residua.store.base.errors import PlanError
from residua.store.edits.places import Address, Place, inside, place_of
from residua.store.encoding.safetensors_file import DTYPES
from residua.store.storage.mirror import fetched

MAX_VECTOR_VALUES = 2**26
MAX_VECTOR_BYTES = 2**29
_PROBE, _WEIGHT = "probe.safetensors", "weight"  # of the folder of a saved probe


@dataclass(frozen=True, eq=False)
class Vector:
    """One vector, or several as rows of a matrix.

    Attributes:
        values: float64, (width,) or (vectors, width), or of the shape of a site's row.
        file: The file as it was named, with ``#NAME``; None if the numbers themselves were given.
        sha256: Digest of the file's bytes, in hex; empty without a file.
    """

    values: npt.NDArray[np.float64]
    file: str | None = None
    sha256: str = ""

    def to_json(self) -> Json:
        """Return the numbers themselves, or the file's name with its digest."""
        if self.file is not None:
            return {"file": self.file, "sha256": self.sha256}
        numbers: Json = self.values.tolist()
        return numbers


def vector_of(value: object, folder: Place) -> Vector:
    """Return the vector that `value` states.

    Args:
        value: Numbers, lists of them, an array or a tensor; a fitted probe, whose vector is its `coef_`; the name of a
            file, or of the folder of a saved probe; or what `Vector.to_json` makes. Of a `Path` object the numbers
            are taken.
        folder: Folder of the files.

    Raises:
        PlanError: The value is no vector, is too large or not finite, or its file is missing or was altered.
    """
    if isinstance(value, str):
        return _from_file(value, folder, None)
    if isinstance(value, Path):
        return Vector(_from_file(value.name, value.absolute().parent, None).values)
    if isinstance(value, Mapping):
        if value.keys() != {"file", "sha256"} or not all(isinstance(text, str) for text in value.values()):
            raise PlanError(f"a vector in a file is written as its name, found a mapping of {sorted(map(str, value))}")
        return _from_file(value["file"], folder, value["sha256"])
    return Vector(_checked(_numbers(value), "the vector"))


def _numbers(value: Any) -> npt.NDArray[Any]:
    value = getattr(value, "coef_", value)
    if hasattr(value, "detach"):  # a tensor, without importing torch; numpy does not know bfloat16
        value = value.detach().cpu().double().numpy()
    try:
        found = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise PlanError("a vector is a list of numbers, or the name of a .npy or .safetensors file") from error
    return found


def _from_file(name: str, folder: Place, sha256: str | None) -> Vector:
    file_name, _, tensor = name.partition("#")
    place = place_of(file_name, folder)
    if isinstance(place, Address):
        try:
            with fetched(place.address, place.options, names=(_PROBE,), most_bytes=MAX_VECTOR_BYTES) as path:
                return _read(path / _PROBE if path.is_dir() else path, name, tensor, sha256)
        except FileNotFoundError as error:
            raise PlanError(f"there is no file or saved probe at {place}") from error
    assert isinstance(folder, Path)  # noqa: S101  # a path is inside one
    path = inside(str(Path(file_name) / _PROBE), folder) if (place / _PROBE).is_file() else place
    if not path.is_file():
        raise PlanError(f"there is no file {file_name!r} in {folder}")
    return _read(path, name, tensor, sha256)


def _read(path: Path, name: str, tensor: str, sha256: str | None) -> Vector:
    file_name = name.partition("#")[0]
    if path.stat().st_size > MAX_VECTOR_BYTES:
        raise PlanError(f"{file_name!r} is over 512 MiB: an edit's vector is not that large")
    if path.suffix not in (".npy", ".safetensors"):
        raise PlanError(f"{path.name!r} is neither .npy nor .safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 is not None and digest != sha256:
        raise PlanError(f"{file_name!r} is not the file that the edit was made with (its SHA-256 differs)")
    return Vector(_checked(read_array(path, tensor, default=_WEIGHT), repr(name)), name, digest)


def read_array(path: Path, tensor: str = "", *, default: str = "", floats_only: bool = True) -> npt.NDArray[Any]:
    """Return the array that a file holds: a ``.safetensors`` file by its name, any other as ``.npy``.

    Nothing in the file is executed, and the shape that it claims is compared with its size before memory is taken.

    Args:
        path: The file.
        tensor: For ``.safetensors``: name of the tensor; the only one unless given.
        default: For ``.safetensors``: the tensor to take where none is named and there are several.
        floats_only: For ``.safetensors``: whether tensors of integers are passed over.

    Raises:
        PlanError: The file cannot be read, or has no such tensor; the message names the file.
    """
    try:
        if path.suffix != ".safetensors":
            # Mapping the file takes no memory. Unlike `np.load`, this takes no zip archive and no pickle for an array.
            found: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
            return found
        tensors = {
            name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in deserialize(path.read_bytes())  # type: ignore[no-untyped-call]  # safetensors is bare
            if entry["dtype"] in DTYPES and not (floats_only and entry["dtype"][0] in "IU")
        }
    except Exception as error:  # boundary: of untrusted bytes numpy alone raises six kinds of errors
        raise PlanError(f"{path.name!r} cannot be read as a vector: {error}") from error
    name = tensor or (next(iter(tensors)) if len(tensors) == 1 else default)
    if name not in tensors:
        raise PlanError(f"{path.name!r} holds {', '.join(sorted(tensors)) or 'no numbers'}: name one as FILE#NAME")
    return tensors[name]


def _checked(found: npt.NDArray[Any], what: str) -> npt.NDArray[np.float64]:
    is_number = found.dtype.kind in "iuf" or found.dtype == ml_dtypes.bfloat16
    if not is_number or not 1 <= found.ndim <= 3 or not 0 < found.size <= MAX_VECTOR_VALUES:
        raise PlanError(f"{what} should be a vector of numbers, found {found.dtype} of shape {found.shape}")
    values = found.astype(np.float64)
    if not np.isfinite(values).all():
        raise PlanError(f"{what} holds NaN or infinite values")
    return values
