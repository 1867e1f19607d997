"""Arrays of an archive as plain zarr-python reads them, with nothing of ours but the bfloat16 data type."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr


def plain_array(archive: Path, node: str) -> npt.NDArray[Any]:
    """Return all of one array; bfloat16 surfaces as its bits in uint16."""
    array = zarr.open_array(str(archive / node), mode="r")
    return np.asarray(array[...])
