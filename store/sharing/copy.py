"""One call for all directions: what is at an address or goes to one is pushed or pulled."""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike, fspath
from typing import Any

from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.read.archive import Archive
from residua.store.sharing.copied import Copied
from residua.store.sharing.pull import pull
from residua.store.sharing.push import push
from residua.store.storage.address import is_remote, shown


def copy(
    source: Archive | str | PathLike[str],
    target: str | PathLike[str],
    *,
    sites: str | Iterable[str] | None = None,
    public: bool = False,
    license: str | None = None,  # noqa: A002  # as the card names it
    model_license: str | None = None,
    text_license: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int, int], None] = lambda *_: None,
) -> Copied:
    """Copy a finished archive to an address, from a folder or another address, or from an address into a folder.

    What is at the target already stays, and is not copied again.

    Args:
        source: Folder or address of the archive.
        target: Where it goes; one of both is an address.
        sites: From an address into a folder: sites to copy, as patterns; by default all.
        public: To the Hub, as for `residua.push`.
        license: To the Hub, as for `residua.push`.
        model_license: To the Hub, as for `residua.push`.
        text_license: To the Hub, as for `residua.push`.
        storage_options: For addresses, as for `residua.push` and `residua.pull`.
        on_bytes: Called with the bytes done and the total, from several threads.

    Raises:
        PlanError: Both are folders; sites were chosen for a copy to an address; `public` or a license was given for a
            copy into a folder; or as `push` and `pull` do.
        As `residua.push` and `residua.pull` do otherwise.

    Example:
        >>> residua.copy("s3://bucket/acts.zarr", "acts.zarr", sites="resid_post.*")  # doctest: +SKIP
    """
    if is_remote(source) and not is_remote(target):
        if public or any((license, model_license, text_license)):
            raise PlanError(
                f"{shown(fspath(source))} is copied into the folder {fspath(target)}, and {named('public')} and "
                "licenses are for a copy to the Hub: leave them out"
            )
        return pull(source, target, sites=sites, storage_options=storage_options, on_bytes=on_bytes)
    if is_remote(target):
        if sites is not None:
            raise PlanError(
                f"some sites of {shown(fspath(source))} were to be copied to {shown(fspath(target))}, and archives are "
                "copied whole to addresses: take them with residua extract, which writes there too, or copy all of it"
            )
        return push(
            source,
            fspath(target),
            public=public,
            license=license,
            model_license=model_license,
            text_license=text_license,
            storage_options=storage_options,
            on_bytes=on_bytes,
        )
    raise PlanError(f"{fspath(source)} and {fspath(target)} are folders: copy with cp -r, and residua verify the copy")
