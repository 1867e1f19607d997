"""Read arrays of an archive with plain zarr-python; only the data type bfloat16 is ours."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr


def plain_array(archive: Path, node: str) -> npt.NDArray[Any]:
    """Return all values of one array; bfloat16 as `ml_dtypes.bfloat16`."""
    array = zarr.open_array(str(archive / node), mode="r")
    return np.asarray(array[...])
