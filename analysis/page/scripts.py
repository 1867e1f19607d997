"""Data as script files, which a page loads from a disk as well as from a server, and which only hand over a value.

What comes from an archive is untrusted. Each file is one call with one JSON text in ASCII, in which ``<``, ``>`` and
``&`` are written as escapes, so that nothing in it can end a script or begin one, wherever it is put.
"""

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from residua.store.storage.files import write_file

DATA = "data"
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}


def write_script(folder: Path, name: str, value: Any) -> str:
    """Write ``data/NAME.js``, which registers `value` under its name; return the file's path inside `folder`.

    Args:
        folder: The folder of the page.
        name: Letters, digits and hyphens: never a text of an archive.
        value: JSON values. NaN and infinite numbers become null.
    """
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    file = f"{DATA}/{name}.js"
    write_file(folder / file, [f'residua.register("{name}",{text});\n'.encode("ascii")])
    return file


def packed(values: npt.NDArray[Any]) -> str:
    """Return numbers as base64 of their little-endian bytes."""
    return base64.b64encode(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
