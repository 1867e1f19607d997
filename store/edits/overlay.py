"""Overlays: edited rows on top of an archive. A row that was never written stays as the archive has it.

An overlay is a plain Zarr v3 group, so anything can write it: numpy, zarr-python, a Dask cluster. Every site is one
array of the archive's shape in float32 (float64 for a float64 site), which holds bfloat16 and float16 exactly. Its
chunks are as high as the archive's shards, so that tasks on blocks of shards never share a chunk. The fill value is
NaN: a row of NaN only has not been written. `zarr.json` names the plan of the archive.
"""

from collections.abc import Iterable
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from residua.store.base.errors import DamagedArchiveError, PlanError, UnsafeArchiveError
from residua.store.base.untrusted import MAX_ROWS_PER_SHARD, check_file
from residua.store.format.plan import SitePlan
from residua.store.read.archive import Archive
from residua.store.read.rows_in_shards import Array
from residua.store.read.stacks import open_archive
from residua.store.storage.address import is_remote, shown
from residua.store.storage.crc import CRC_BYTES

_KEY = "residua_overlay"
_NODE = "zarr.json"
_MAX_NODE_BYTES = 2**20
_FLOATS = ("bfloat16", "float16", "float32", "float64")


class Overlay:
    """Edited rows on top of an archive. Create or open one with `residua.overlay`.

    ``overlay["resid_post.5"]`` is a Zarr array, (rows, *row shape), to write to; `write` takes any list of rows.

    Args:
        path: Folder of the overlay.
        archive: The archive that it belongs to.

    Attributes:
        path: Folder of the overlay.
        archive: The archive that it belongs to.
        sites: Names of the overlay's sites.

    Raises:
        FileNotFoundError: There is no overlay at that path.
        PlanError: The overlay belongs to another plan.
        UnsafeArchiveError: Residua does not create such an overlay.
    """

    def __init__(self, path: Path, archive: Archive) -> None:
        self.path = path
        self.archive = archive
        self._group = _opened(path)
        self.sites = _sites_of(self._group, path, archive)
        for site in self.sites:
            _check_array(self._array(site), archive.plan.site(site), archive.n_rows, path)

    def __getitem__(self, site: str) -> zarr.Array[Any]:
        if site not in self.sites:
            raise PlanError(f"{self.path} has no edited rows of {site!r}; it has {', '.join(self.sites)}")
        return self._array(site)

    def __repr__(self) -> str:
        return f"<Overlay {self.path} of {self.archive.place}: {', '.join(self.sites)}>"

    def _array(self, site: str) -> zarr.Array[Any]:
        node = self.path / self.archive.plan.site(site).path / _NODE
        if node.exists():
            check_file(self.path, node, _MAX_NODE_BYTES)
        try:
            found = self._group[self.archive.plan.site(site).path]
            if not isinstance(found, zarr.Array):
                raise TypeError("it has a group there")
        except (KeyError, ValueError, TypeError) as error:
            raise UnsafeArchiveError(f"{self.path} has no array for {site}: {error}") from error
        return found

    def write(self, site: str, rows: npt.ArrayLike, values: npt.ArrayLike) -> None:
        """Write edited rows, in any order.

        Args:
            site: Name of a site.
            rows: Rows of the archive, (n).
            values: Their new values, (n, *row shape).

        Raises:
            PlanError: The overlay has no such site, or the values do not fit.
        """
        array, numbers, new = self[site], np.asarray(rows, np.int64), np.asarray(values)
        if new.shape != (len(numbers), *array.shape[1:]):
            raise PlanError(f"{len(numbers)} rows of {site} need {(len(numbers), *array.shape[1:])}: found {new.shape}")
        wrong = numbers[(numbers < 0) | (numbers >= array.shape[0])]
        if len(wrong):
            raise PlanError(f"{site} has {array.shape[0]:,} rows: there is no row {int(wrong[0]):,}")
        array.set_orthogonal_selection((numbers,), new.astype(array.dtype))

    def _check_chunks(self, array: zarr.Array[Any], rows: npt.NDArray[np.int64]) -> None:
        """Check the files of the given rows before anything is read from them."""
        max_bytes = prod(array.chunks) * array.dtype.itemsize + CRC_BYTES
        for chunk in np.unique(rows // array.chunks[0]).tolist():
            key = array.metadata.encode_chunk_key((chunk, *[0] * (array.ndim - 1)))
            file = self.path / array.path / key
            if file.exists():
                check_file(self.path, file, max_bytes)

    def read(self, site: str, rows: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return rows, (rows, *row shape), and for each whether it was edited; values of the others are arbitrary.

        Raises:
            DamagedArchiveError: A chunk was altered.
            UnsafeArchiveError: A chunk is a link that leads out of the overlay, or is too large.
        """
        array, numbers = self[site], np.asarray(rows, np.int64)
        self._check_chunks(array, numbers)
        try:
            found = cast("Array", np.asarray(array.get_orthogonal_selection((numbers,))))
        except (OSError, ValueError, RuntimeError) as error:
            raise DamagedArchiveError(f"{self.path}: rows of {site} cannot be read: {error}") from error
        n_missing: npt.NDArray[np.int64] = np.isnan(found.reshape(len(found), -1)).sum(axis=1)
        return found, n_missing < prod(found.shape[1:])


def overlay(
    archive: Archive | str | PathLike[str], out: str | PathLike[str], *, sites: str | Iterable[str] = "*"
) -> Overlay:
    """Create an overlay of edited rows at `out`, or open the existing one.

    Args:
        archive: The archive, or its folder or address.
        out: Folder of the overlay.
        sites: Sites of a new overlay. A site without edited rows takes no space.

    Raises:
        UnknownSiteError: The archive does not store a site.
        PlanError: The overlay at `out` belongs to another plan, `out` is an address, or the archive's size is still
            open.
        FileExistsError: There is something else at `out`.

    Example:
        >>> edited = residua.overlay("acts.zarr", "edited.zarr", sites="resid_post.5")  # doctest: +SKIP
        >>> edited.write("resid_post.5", [3, 4], archive["resid_post.5"][3:5] * 2)  # doctest: +SKIP
    """
    if is_remote(out):
        raise PlanError(
            f"{shown(out)} is an address, and an overlay is a folder that rows are written to one by one: name a "
            "folder; the archive may stay where it is"
        )
    below = open_archive(archive)
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        return _reopened(path, below)
    names = [name for name in below.select(sites) if below.plan.site(name).dtype in _FLOATS]
    if below.progress.total_rows is None:
        raise PlanError(f"{below.place} is still being recorded, so its number of rows is open: finish the recording")
    group = zarr.create_group(str(path), zarr_format=3)
    for name in names:
        site = below.plan.site(name)
        group.create_array(
            site.path,
            shape=(below.n_rows, *site.row_shape),
            dtype=_dtype_of(site),
            chunks=(below.plan.rows_per_shard, *site.row_shape),
            compressors=[Crc32cCodec()],  # no compression, so that a forged chunk cannot claim a huge size
            fill_value=np.nan,
        )
    group.attrs[_KEY] = {"plan": below.plan.digest, "sites": names}
    return Overlay(path, below)


def _reopened(path: Path, archive: Archive) -> Overlay:
    try:
        return Overlay(path, archive)
    except FileNotFoundError:
        raise FileExistsError(f"{path} exists and is no overlay: choose another folder") from None


def _dtype_of(site: SitePlan) -> str:
    return "float64" if site.dtype == "float64" else "float32"


def _opened(path: Path) -> zarr.Group:
    if not (path / _NODE).is_file():
        raise FileNotFoundError(f"no overlay at {path}: create one with residua.overlay(archive, {str(path)!r})")
    check_file(path, path / _NODE, _MAX_NODE_BYTES)
    try:
        return zarr.open_group(str(path), mode="r+", zarr_format=3)
    except (ValueError, TypeError, KeyError) as error:
        raise UnsafeArchiveError(f"{path} is no overlay: {error}") from error


def _sites_of(group: zarr.Group, path: Path, archive: Archive) -> tuple[str, ...]:
    entry = group.attrs.get(_KEY)
    if not isinstance(entry, dict):
        raise FileNotFoundError(f"{path} is no overlay")
    if entry.get("plan") != archive.plan.digest:
        raise PlanError(
            f"{path} is an overlay of another plan than that of {archive.place}: use it with its own archive"
        )
    names = entry.get("sites")
    found = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if not found or found != names or not set(found) <= set(archive.sites):
        raise UnsafeArchiveError(f"{path} does not say which sites it has")
    return tuple(found)


def _check_array(array: zarr.Array[Any], site: SitePlan, n_rows: int, path: Path) -> None:
    """Refuse an array that `overlay` does not create, before its sizes are used."""
    shape, chunks = (n_rows, *site.row_shape), array.chunks
    codecs = [codec["name"] for codec in array.metadata.to_dict()["codecs"]]  # type: ignore[index, union-attr, call-overload]  # zarr's union of versions 2 and 3
    if array.shape != shape or str(array.dtype) != _dtype_of(site) or codecs != ["bytes", "crc32c"]:
        raise UnsafeArchiveError(
            f"{path}: {site.name} has {array.dtype} rows of shape {array.shape} in {codecs}, and the archive {shape}"
        )
    if chunks[1:] != site.row_shape or chunks[0] > MAX_ROWS_PER_SHARD:
        raise UnsafeArchiveError(f"{path}: {site.name} has chunks of {chunks}, which Residua never creates")
