"""One call for both directions: a folder is pushed to an address, and an address is pulled into a folder."""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike, fspath
from typing import Any

from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.sharing.copied import Copied
from residua.store.sharing.pull import pull
from residua.store.sharing.push import push
from residua.store.storage.address import is_remote, shown


def copy(
    source: str | PathLike[str],
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
    """Copy a finished archive from a folder to an address, or from an address into a folder; what is there stays.

    Args:
        source: Folder or address of the archive.
        target: Where it goes: an address if `source` is a folder, and a folder if it is an address.
        sites: From an address: sites to copy, as patterns; by default all.
        public: To the Hub, as for `residua.push`.
        license: To the Hub, as for `residua.push`.
        model_license: To the Hub, as for `residua.push`.
        text_license: To the Hub, as for `residua.push`.
        storage_options: Of the address, as for `residua.open`.
        on_bytes: Called with the bytes done and the total, from several threads.

    Raises:
        PlanError: Both are folders, or both addresses; sites were chosen of a folder; `public` or a license was given
            for a copy into a folder; or as `push` and `pull` do.
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
        return pull(fspath(source), target, sites=sites, storage_options=storage_options, on_bytes=on_bytes)
    if is_remote(target) and not is_remote(source):
        if sites is not None:
            raise PlanError(
                f"some sites of {source} were to be copied, and a folder is copied whole: extract them first, or copy "
                "all of it"
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
    both = "are folders: copy with cp -r, and residua verify the copy"
    if is_remote(source):
        both = "are addresses: pull the archive into a folder, and push it from there"
    raise PlanError(f"{shown(fspath(source))} and {shown(fspath(target))} {both}")
