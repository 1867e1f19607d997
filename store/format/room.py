"""Whether a disk has room for what a plan will write: refused where it cannot fit, noted where it may not."""

import errno
import shutil
from collections.abc import Iterable
from math import prod
from pathlib import Path

from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.dtypes import storage_dtype
from residua.store.format.plan import COLUMN_BYTES, SitePlan
from residua.store.format.site_names import LAYER_KINDS, MODEL_KINDS, parse_site

_BEST_RATIO = 4  # bfloat16 activations compress 1.5 times, float32 copies of them 3 times
_MAY_VANISH = ("embed", "pattern", "mlp_act")  # rows that repeat, or are mostly zeros, compress without limit


def check_room(destination: Path, sites: Iterable[SitePlan], n_rows: int) -> list[str]:
    """Compare the free space of a place with the rows that will be written there.

    Args:
        destination: Folder of the archive.
        sites: What is stored of every row.
        n_rows: Rows that are not written yet.

    Returns:
        A note if the rows fit only when they compress well; else nothing.

    Raises:
        OSError: The rows do not fit, even if they compress better than activations do.
    """
    there = next(folder for folder in destination.absolute().parents if folder.is_dir())
    free, sizes = shutil.disk_usage(there).free, list(map(_row_bytes, sites))
    least, raw = n_rows * sum(least for least, _ in sizes), n_rows * (COLUMN_BYTES + sum(raw for _, raw in sizes))
    if least > free:
        raise OSError(
            errno.ENOSPC,
            f"{destination} has {_gib(free)} of free space, and {n_rows:,} rows of {_gib(raw)} together (before "
            "compression) do not fit: free some space, choose another place, or capture less",
        )
    if raw <= free:
        return []
    return [
        f"{destination} had {_gib(free)} of free space at the start, and the rows take {_gib(raw)} before compression: "
        "they may not fit. If the disk fills up, what is captured is safe, and the capture can be resumed"
    ]


def _row_bytes(site: SitePlan) -> tuple[float, int]:
    """Return the bytes that one row takes on disk at least, and without compression."""
    layouts = PRESETS[site.codec].arrays(site.row_shape, site.dtype)
    raw = sum(prod(layout.row_shape) * storage_dtype(layout.dtype).itemsize for layout in layouts)
    if all(PRESETS[layout.preset].is_raw for layout in layouts):
        return raw, raw
    kind = parse_site(site.name).kind
    return (raw / _BEST_RATIO if kind in (*LAYER_KINDS, *MODEL_KINDS) and kind not in _MAY_VANISH else 0), raw


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.3g} GiB" if n_bytes < 1000 * 2**30 else f"{n_bytes / 2**30:,.0f} GiB"
