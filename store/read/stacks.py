"""The archives of several stacks of one model, opened together; and the door to every archive: `open_archive`."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack, cast

from residua.store.base.errors import NotCapturedError, PlanError, UnknownSiteError
from residua.store.base.sizes import Size, n_bytes
from residua.store.base.untrusted import check_inside
from residua.store.format.archive_metadata import MAX_METADATA_BYTES, ROOT
from residua.store.format.site_names import parse_site
from residua.store.format.stacks import stacks_in
from residua.store.read.archive import Archive, Progress
from residua.store.read.array import ArchiveArray
from residua.store.read.joined import JoinedArchive
from residua.store.read.remote import JOIN_GAP_BYTES, REQUEST_BYTES
from residua.store.read.remote_archive import Cache, RemoteArchive
from residua.store.read.rows_in_shards import Check
from residua.store.storage.address import is_remote, scheme_of, shown
from residua.store.storage.destination import BucketFolder, Destination
from residua.store.storage.hub import folder_at
from residua.store.storage.mirror import Mirror

if TYPE_CHECKING:
    import residua
    from residua.analysis.loader.loader import LoaderOptions


def open_archive(
    archive: Archive | str | PathLike[str] | Sequence[Archive | str | PathLike[str]],
    *,
    check: Check = "once",
    threads: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache: Cache = None,
    join_gap_bytes: Size = JOIN_GAP_BYTES,
    request_bytes: Size = REQUEST_BYTES,
) -> Archive:
    """Open an archive for reading, or the archives of several stacks as one; public as `residua.open`.

    A list of finished archives of the same rows is read as one, with the sites of all of them.

    Args:
        archive: Its folder, or its address: ``s3://``, ``gs://``, ``az://``, ``http(s)://`` or
            ``hf://datasets/ORG/NAME[@REVISION][/FOLDER]``. An archive that is open already is returned as it is.
        check: When chunks are verified: ``once`` (when they are used first), ``always`` or ``never``. What arrives over
            the network is always compared.
        threads: Threads that decode compressed chunks; by default the processor's, up to four.
        storage_options: For an address: arguments of obstore's store, such as ``endpoint``, ``region`` or credentials.
            What is not given comes from where each service's own tools find it. None of it is kept in any result.
        cache: For an address: where what was fetched is kept on the local disk: a folder, True for the user's folder of
            caches, or False for nowhere. By default web servers and the Hub have a cache of 10 GiB.
        join_gap_bytes: For an address: chunks that are this near share a request. Bytes, or a text such as ``64KiB``.
        request_bytes: For an address: size of one request for rows, written likewise, unless a chunk has more. Longer
            runs of rows take several, 16 at once.

    Returns:
        The archive; a `StackedArchive` if the folder holds several, a `JoinedArchive` of a list.

    Raises:
        PlanError: Archives of a list are not of the same rows, or have different rows of a site.
        FileNotFoundError: There is no archive at that path or address.
        DamagedArchiveError: A file is missing or altered; the message names it.
        UnsafeArchiveError: Residua does not write such metadata.
        NotCapturedError: An archive at an address has no packed index.
        StorageError: An address cannot be read.
    """
    if isinstance(archive, Archive):
        return archive
    local: dict[str, Any] = {"check": check, "threads": threads}
    remote: dict[str, Any] = {"storage_options": storage_options, "cache": cache}
    remote["join_gap_bytes"] = n_bytes(join_gap_bytes, "join_gap_bytes") if join_gap_bytes else 0
    remote["request_bytes"] = n_bytes(request_bytes, "request_bytes")
    if not isinstance(archive, str | PathLike):
        opened = [open_archive(one, **local, **(remote if is_remote(one) else {})) for one in archive]
        if not opened:
            raise PlanError("an empty list of archives was to be opened: name one or more")
        return opened[0] if len(opened) == 1 else JoinedArchive(opened)
    if is_remote(archive):
        return _open_remote(str(archive), **local, **remote)
    kind = StackedArchive if stacks_in(Path(archive)) else Archive
    return kind(archive, **local)


def open_source(
    archive: Archive | str | PathLike[str] | Sequence[Archive | str | PathLike[str]],
    out: str | PathLike[str],
    storage_options: Mapping[str, Any] | None,
    **settings: Any,
) -> Archive:
    """Open the archive of which something is written to `out`.

    Args:
        archive: As for `open_archive`.
        out: Path or address.
        storage_options: Those of the address, or of both; where different services have them, of `out` alone.
        settings: Further arguments of `open_archive`.
    """
    is_place = isinstance(archive, str | PathLike) and not isinstance(archive, Archive)
    if is_place and is_remote(out) and scheme_of(cast("str", archive)) != scheme_of(out):
        storage_options = None
    return open_archive(archive, storage_options=storage_options, **settings)


def open_written(out: Destination) -> Archive:
    """Open an archive, or those of several stacks, where they were written."""
    if isinstance(out, BucketFolder):
        return open_archive(out.objects.address, storage_options=out.objects.options)
    return open_archive(out.path)


def _open_remote(address: str, **settings: Any) -> Archive:
    try:
        return RemoteArchive(address, **settings)
    except PlanError:
        mirror = Mirror(folder_at(address, settings["storage_options"]))
        mirror.need(ROOT, MAX_METADATA_BYTES)
        with mirror.naming():
            names = stacks_in(mirror.path)
        if not names:
            raise
    return StackedArchive(mirror.path, at=(address, settings))


def archives_of(archive: Archive) -> list[Archive]:
    """Return the archives of all stacks that were begun; of one archive, itself."""
    return list(archive.stacks.values()) if isinstance(archive, StackedArchive) else [archive]


def main_archive(archive: Archive) -> Archive:
    """Return the archive whose positions a model's logits are of: of several stacks the decoder's, if it is there.

    Raises:
        NotCapturedError: No stack was begun.
    """
    if not (found := archives_of(archive)):
        raise NotCapturedError(f"{archive.place} has no rows yet: run the capture first")
    return found[-1]


def by_rows(archive: Archive, sites: str | Iterable[str]) -> list[tuple[Archive, tuple[str, ...]]]:
    """Return the archives whose rows some sites have, each with these sites; of one archive, itself with all of them.

    Raises:
        UnknownSiteError: `sites` matches no stored site.
    """
    names = archive.select(sites)
    found = [(each, tuple(name for name in names if name in each.sites)) for each in archives_of(archive)]
    return [(each, own) for each, own in found if own]


class StackedArchive(Archive):
    """The archives of several stacks of one model.

    Those of encoder and decoder have the same examples in the same order. An example of a vision tower is one image:
    its columns ``source_index`` and ``source_image`` say which.

    Sites of all stacks are read by their names: ``archive["encoder.resid_post.3"]``. Each stack has rows of its own, so
    what is about rows (`rows`, `n_rows`, `example`, `text`) belongs to one stack: ``archive.stacks["encoder"]``.

    Args:
        path: Folder that holds the archives.
        check: As for `Archive`.
        threads: As for `Archive`.
        at: Address of the archives, if `path` only has the metadata that name them, and what opening each takes.

    Raises:
        FileNotFoundError: There is no archive at that path.
        DamagedArchiveError: A file is missing or altered; the message names it.
        UnsafeArchiveError: Residua does not write such metadata.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        check: Check = "once",
        threads: int | None = None,
        at: tuple[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.path = Path(path)
        self._examples = None  # of both stacks: opening them asks for one
        self._place = str(path) if at is None else shown(at[0].rstrip("/"))
        self._names = stacks_in(self.path)
        if at is not None:
            address, settings = at
            there = {name: f"{address.rstrip('/')}/{name}" for name in self._names}
            self._stacks: dict[str, Archive] = {name: RemoteArchive(each, **settings) for name, each in there.items()}
            return
        for name in self._names:
            check_inside(self.path, self.path / name)
        begun = [name for name in self._names if (self.path / name / ROOT).is_file()]
        self._stacks = {name: Archive(self.path / name, check=check, threads=threads) for name in begun}

    @property
    def place(self) -> str:
        """Where the archives are: their folder, or its address."""
        return self._place

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse what is of one stack: all of it needs the metadata of an archive, which this one does not have."""
        if name != "metadata":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise PlanError(
            f"{self.place} holds {' and '.join(self._names)}, each with rows of its own, and one of them is needed: "
            f"take archive.stacks[{self._names[0]!r}], or open {self.place}/{self._names[0]}"
        )

    @property
    def stacks(self) -> Mapping[str, Archive]:
        """The archive of each stack that was begun."""
        return self._stacks

    @property
    def provenance(self) -> Mapping[str, object]:
        """The sources of model, data and numbers, by stack."""
        return {name: archive.provenance for name, archive in self._stacks.items()}

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the stored sites, stack by stack."""
        return tuple(site for archive in self._stacks.values() for site in archive.sites)

    @cached_property
    def absent_sites(self) -> tuple[str, ...]:
        """Names of captured sites that this copy of finished archives lacks, stack by stack."""
        return tuple(site for archive in self._stacks.values() for site in archive.absent_sites)

    @property
    def progress(self) -> Progress:
        """Captured and total rows and shards of all stacks; the totals are None while a stack is not begun."""
        found = [archive.progress for archive in self._stacks.values()]
        totals = [(each.total_rows, each.total_shards) for each in found]
        is_known = len(found) == len(self._names) and all(rows is not None for rows, _ in totals)
        return Progress(
            sum(each.rows for each in found),
            sum(rows or 0 for rows, _ in totals) if is_known else None,
            sum(each.shards for each in found),
            sum(shards or 0 for _, shards in totals) if is_known else None,
        )

    @property
    def is_sealed(self) -> bool:
        """Whether every shard of every stack is captured, and none is lost."""
        return len(self._stacks) == len(self._names) and all(archive.is_sealed for archive in self._stacks.values())

    @property
    def was_finished(self) -> bool:
        """Whether the capture of every stack was finished once."""
        return len(self._stacks) == len(self._names) and all(archive.was_finished for archive in self._stacks.values())

    def of_sites(self, sites: str | Iterable[str]) -> Archive:
        """Return the archive of the stack whose rows have all of these sites.

        Raises:
            UnknownSiteError: `sites` matches no stored site, or sites with rows of several stacks.
        """
        found = by_rows(self, sites)
        if len(found) > 1:
            firsts = [own[0] for _, own in found]
            stacks = " and ".join(parse_site(first).row_stack for first in firsts)
            raise UnknownSiteError(
                f"{' and '.join(firsts)} have rows of different stacks, {stacks}: name sites of one, for example "
                f"{firsts[-1].rpartition('.')[0]}.*. Keys and values of cross-attention (cross_k, cross_v) have a row "
                "for each position of the encoder"
            )
        return found[0][0]

    def refuse_losses(self, sites: Iterable[str], job: str) -> None:
        """Raise PlanError if the stored rows of one of `sites` lack finite values that the model had."""
        for name in sites:
            self.of_sites(name).refuse_losses([name], job)

    def loader(
        self, sites: str | Iterable[str], *, batch_size: int, **options: "Unpack[LoaderOptions]"
    ) -> "residua.analysis.Loader":
        """Return batches of rows for training with torch; all sites are of one stack. See `Archive.loader`."""
        names = self.select(sites)
        return self.of_sites(names).loader(names, batch_size=batch_size, **options)

    def __getitem__(self, site: str) -> ArchiveArray:
        return self.of_sites(site)[site]

    def __repr__(self) -> str:
        state = "sealed" if self.is_sealed else "not sealed"
        return f"<StackedArchive {self.place} of {' and '.join(self._names)} ({state}), {len(self)} sites>"
