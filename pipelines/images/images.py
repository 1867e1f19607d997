"""Images of a dataset, opened without trusting them.

An image is a PIL image, an array of pixels, the bytes of a file, a path, or what `datasets` has of one (``bytes`` and
``path``). A path has to lead to a file inside a folder that the user named or whose dataset was given. Pillow decodes
files, only in formats that need no other program, and their size is compared with a limit before a pixel is decoded.
What a model gets has the colours red, green and blue, 8 bits each, turned upright as the file's Exif data say.

An image is known by a SHA-256: of the bytes of its file; of an image that was given as pixels, of the text
``WIDTHxHEIGHT`` and the bytes of its pixels in rows from the top. So it does not depend on how a file is decoded.
"""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from residua.store.base.errors import DatasetError
from residua.store.base.naming import named

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_MAX_FILE_BYTES = 2**28
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa")  # of 8 bits a colour


@dataclass(frozen=True, kw_only=True)
class GivenImage:
    """One image of a dataset.

    Attributes:
        sha256: What it is known by, in hex.
        content: The bytes of its file, or of its pixels; empty if there is a path.
        path: Its file, absolute.
        size: (width, height) of an image that was given as pixels.
    """

    sha256: str
    content: bytes = b""
    path: Path | None = None
    size: tuple[int, int] | None = None


def given_image(value: object, *, folder: Path | None, where: str) -> GivenImage:
    """Return the image that a dataset gives; its pixels are not decoded yet.

    Args:
        value: What the dataset has.
        folder: Folder that paths are relative to, and which they must not leave; None if there is none.
        where: Row and column, for messages.

    Raises:
        DatasetError: The value is no image, or a path that leaves the folder.
    """
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        return given_image(path if content is None else content, folder=folder, where=where)
    if isinstance(value, bytes | bytearray | memoryview):
        content = bytes(value)
        _check_size(len(content), where)
        return GivenImage(sha256=hashlib.sha256(content).hexdigest(), content=content)
    if isinstance(value, str | PathLike):
        path = _file(fspath(value), folder, where)
        return GivenImage(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), path=path)
    if isinstance(value, np.ndarray):
        value = _of_array(value, where)
    if isinstance(value, Image.Image):
        upright = _plain(value, where)
        content = upright.tobytes()
        digest = hashlib.sha256(f"{upright.width}x{upright.height}".encode() + content)
        return GivenImage(sha256=digest.hexdigest(), content=content, size=upright.size)
    raise DatasetError(
        f"{where}: found a {type(value).__name__}, which is no image: give a PIL image, an array of (height, width, 3) "
        "bytes, the bytes of a file, or a path"
    )


def open_image(image: GivenImage, *, max_pixels: int, where: str) -> Image.Image:
    """Return the pixels of an image, red, green and blue.

    Args:
        image: The image.
        max_pixels: Most pixels that it may have.
        where: Row and column, for messages.

    Raises:
        DatasetError: The image is too large, damaged, of a format that is not read, or its file has changed.
    """
    if image.size is not None:
        _check_pixels(image.size, max_pixels, where)
        return Image.frombytes("RGB", image.size, image.content)
    content = image.content
    if image.path is not None:
        content = image.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != image.sha256:
            raise DatasetError(f"{where}: {image.path} has changed since the capture began")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            found = Image.open(BytesIO(content), formats=FORMATS)
        _check_pixels(found.size, max_pixels, where)
        return _plain(found, where)
    except DatasetError:
        raise
    except UnidentifiedImageError as error:
        raise DatasetError(f"{where}: this is no image of a format that is read ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{where}: {error}; make the image smaller, or leave it out") from error
    except Exception as error:  # the boundary to Pillow's decoders, which raise whatever damage makes them raise
        raise DatasetError(f"{where}: the image cannot be decoded: {type(error).__name__}: {error}") from error


def _plain(image: Image.Image, where: str) -> Image.Image:
    """Return an image upright, in red, green and blue."""
    if image.mode not in _MODES:
        raise DatasetError(
            f"{where}: the image has the mode {image.mode!r}, whose values do not fit 8 bits a colour: convert it first"
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def _of_array(array: "np.ndarray[Any, Any]", where: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise DatasetError(
            f"{where}: found an array of {array.dtype} and shape {array.shape}: an image is uint8 of (height, "
            "width, 3) or (height, width)"
        )
    return Image.fromarray(array)


def _check_pixels(size: tuple[int, int], max_pixels: int, where: str) -> None:
    if size[0] * size[1] > max_pixels or min(size) < 1:
        raise DatasetError(
            f"{where}: the image has {size[0]:,} x {size[1]:,} pixels, and at most {max_pixels:,} are decoded: make it "
            f"smaller, leave it out, or raise {named('max_image_pixels')} if you trust the dataset"
        )


def _check_size(n_bytes: int, where: str) -> None:
    if n_bytes > _MAX_FILE_BYTES:
        raise DatasetError(f"{where}: the image has {n_bytes:,} bytes, and at most {_MAX_FILE_BYTES:,} are read")


def _file(text: str, folder: Path | None, where: str) -> Path:
    """Return the file that a path of a dataset names, with links followed."""
    if "://" in text or text.startswith("data:"):
        raise DatasetError(
            f"{where}: {text[:80]!r} is an address, and images are not fetched: download it, or give bytes"
        )
    if folder is None:
        raise DatasetError(
            f"{where}: {text[:80]!r} is a path, and it is not known in which folder: name it with "
            f"{named('image_folder')}"
        )
    root = folder.resolve()
    try:
        path = (root / text).resolve()
        inside = path.is_relative_to(root)
        if inside and path.is_file():
            _check_size(path.stat().st_size, where)
            return path
    except (OSError, ValueError) as error:  # a NUL byte, a name that is too long, a loop of links
        raise DatasetError(f"{where}: {text[:80]!r} cannot be a path: {error}") from error
    problem = "there is no such file" if inside else "it leads out of that folder"
    raise DatasetError(f"{where}: {text[:80]!r} in {root}: {problem}; name another folder with {named('image_folder')}")
