"""The archive as an xarray Dataset. `ArchiveStore` gives axes their names, also those of older archives.

xarray itself opens a group of an archive (`xr.open_zarr(path, group="sites/resid_post")`) or all of them
(`xr.open_datatree`); sites of several groups in one Dataset, under their own names, are what this adds.
"""

from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Any

from residua.store.base.errors import MissingPackageError, PlanError
from residua.store.encoding.codecs import INT8
from residua.store.encoding.spec import ArraySpec
from residua.store.format.plan import Plan, SitePlan

if TYPE_CHECKING:
    import xarray


def as_dataset(
    place: str, plan: Plan, sites: Iterable[SitePlan], arrays: Container[ArraySpec], store: Any
) -> "xarray.Dataset":
    """Return sites and the row columns of an archive; see `Archive.to_xarray`.

    Args:
        place: Folder or address of the archive.
        plan: Its plan.
        sites: The sites to include.
        arrays: The arrays that are there.
        store: The archive's `ArchiveStore`.

    Raises:
        MissingPackageError: xarray is not installed.
        PlanError: A site is stored in codes and scales, which only Residua multiplies.
    """
    try:
        import xarray
    except ImportError as error:
        raise MissingPackageError("to_xarray needs the package xarray: pip install xarray") from error
    variables: dict[str, Any] = {}
    for site in sites:
        if site.codec == INT8:
            raise PlanError(
                f"{site.name} is stored as {INT8}, in codes and scales that xarray would not multiply: read it with "
                f"archive[{site.name!r}], or choose other sites"
            )
        variables[site.name] = _variable(store, site.path)
    rows = [spec.path for spec in plan.row_arrays if spec in arrays]
    coordinates = {node.removeprefix("rows/"): _variable(store, node) for node in rows}
    return xarray.Dataset(variables, coords=coordinates, attrs={"plan": plan.digest, "archive": place})


def _variable(store: Any, path: str) -> "xarray.Variable":
    """Return one array, read when it is used."""
    import xarray

    group, _, name = path.rpartition("/")
    opened = xarray.open_dataset(store, engine="zarr", group=group, consolidated=False, chunks=None)
    return opened[name].drop_attrs().variable
