"""Copy an archive from an address into a folder: parallel, whole or some sites, taken up again after a kill.

Each chunk is compared with the packed index when it arrives, and a shard gets its name when it is complete. The root's
metadata come last, so a folder with them is complete. A copy of some sites is an archive: it says which sites it lacks.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from residua.store.base.errors import DamagedArchiveError, PlanError
from residua.store.encoding.shard import check_shard, shard_path, shard_rows
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.side_tables import MAX_SIDE_TABLES_BYTES, SIDE_TABLES
from residua.store.format.archive_metadata import MAX_METADATA_BYTES, ROOT, is_archive, read_metadata
from residua.store.read.archive import Archive
from residua.store.read.remote_archive import RemoteArchive
from residua.store.read.shard_files import shard_file
from residua.store.read.stacks import StackedArchive, open_archive
from residua.store.sealing.packed_index import INDEX, PackedIndex, file_record
from residua.store.sharing.copied import UNKNOWN_BYTES, BytesDone, Copied, FileWork, copy_files, together
from residua.store.sharing.small_files import SmallFile, fetch_index, fetch_small, side_table_files, small_files
from residua.store.storage.address import is_remote, shown
from residua.store.storage.files import sweep, write_file
from residua.store.storage.hub import folder_at


def pull(
    address: Archive | str | PathLike[str],
    out: str | PathLike[str],
    *,
    sites: str | Iterable[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int, int], None] = lambda *_: None,
) -> Copied:
    """Copy an archive from an address into a folder.

    Args:
        address: Where the archive is, or the archive itself.
        out: Folder that it becomes. What an earlier copy of the same archive left there is used.
        sites: Sites to copy, as patterns; by default all.
        storage_options: As for `residua.open`.
        on_bytes: Called with the bytes done and the total, from several threads.

    Raises:
        FileNotFoundError: There is no archive at that address.
        NotCapturedError: The archive there is not finished.
        UnknownSiteError: `sites` matches no stored site.
        PlanError: `out` holds another archive, or something else.
        DamagedArchiveError: A file at the address is missing, or is not what the archive's index says.
        StorageError: The address cannot be read.
        OSError: A file cannot be written.

    Example:
        >>> residua.pull("hf://datasets/org/acts", "acts.zarr", sites="resid_post.*")  # doctest: +SKIP
    """
    if is_remote(out):
        raise PlanError(
            f"{shown(out)} is an address, and pull copies into a folder: copy from one address to another with residua "
            f"push {shown(fspath(address))} {shown(out)}"
        )
    if not is_remote(address):
        raise PlanError(f"{fspath(address)} is a folder, and pull copies from an address: copy it with cp -r")
    archive = open_archive(address, storage_options=storage_options, cache=False)
    names = archive.sites if sites is None else archive.select(sites)
    if isinstance(archive, StackedArchive):
        return _pull_stacks(archive, Path(out), names, storage_options, on_bytes)
    return pull_one(archive, Path(out), names, on_bytes)


def pull_one(archive: Archive, out: Path, sites: tuple[str, ...], on_bytes: Callable[[int, int], None]) -> Copied:
    """Copy some sites of an open archive at an address into a folder; see `pull`."""
    assert isinstance(archive, RemoteArchive)  # noqa: S101  # it was opened by its address
    archive.index  # noqa: B018  # an archive that is not finished is an error here
    return _Pull(archive, out, sites).run(on_bytes)


def _pull_stacks(
    archive: StackedArchive,
    out: Path,
    sites: tuple[str, ...],
    storage_options: Mapping[str, Any] | None,
    on_bytes: Callable[[int, int], None],
) -> Copied:
    """Copy the archive of each stack that has some of the sites, and at the end the metadata that name them."""
    root = folder_at(archive.place, storage_options).read(ROOT, MAX_METADATA_BYTES)
    if is_archive(out) and (out / ROOT).read_bytes() != root:
        raise PlanError(f"{out} holds another archive than {archive.place}: choose another folder")
    chosen = {name: tuple(site for site in sites if site in one.sites) for name, one in archive.stacks.items()}
    copies = [pull_one(archive.stacks[name], out / name, own, on_bytes) for name, own in chosen.items() if own]
    write_file(out / ROOT, [root])
    return together(copies, len(root))


class _Pull:
    """One copy of the sites `sites` into the folder `out`."""

    def __init__(self, archive: RemoteArchive, out: Path, sites: tuple[str, ...]) -> None:
        self._archive = archive
        self._out = out
        height, plan = archive.plan.rows_per_shard, archive.plan
        arrays = [*plan.row_arrays, *(spec for name in sites for spec in plan.site(name).arrays(height))]
        self._specs = [files for spec in arrays for files in spec.file_specs]
        self._small = small_files(archive, arrays)
        self._side: dict[str, SmallFile] = {}  # known when the examples are

    def run(self, on_bytes: Callable[[int, int], None]) -> Copied:
        """Copy what is not there yet."""
        self._check_target()
        shards = [(spec, shard) for spec in self._specs for shard in self._archive.commits]
        sizes = [size for spec in self._specs for size in self._archive.index.file_bytes(spec.key).tolist()]
        done = BytesDone(sum(sizes), on_bytes)

        def copy_shard(i: int) -> int:
            sent = 0 if self._has(*shards[i]) else self._copy_shard(*shards[i])
            done.add(sizes[i])
            return sent

        works = [FileWork(size, partial(copy_shard, i)) for i, size in enumerate(sizes)]
        works += [
            FileWork(UNKNOWN_BYTES, self._copy_examples),
            FileWork(self._archive.index.n_bytes, self._copy_index),
        ]
        works += [
            FileWork(UNKNOWN_BYTES if file.sha256 else 0, partial(self._copy_small, name, file))  # arrays' are short
            for name, file in self._small.items()
            if not _is_of_examples(name)
        ]
        sent = copy_files(works)
        sent += write_file(self._out / ROOT, [(self._archive.path / ROOT).read_bytes()])
        names = [*self._small, *self._side, INDEX, ROOT]
        n_bytes = sum((self._out / name).stat().st_size for name in names)
        return Copied(len(shards) + len(names), sum(sizes) + n_bytes, sent)

    def _check_target(self) -> None:
        if is_archive(self._out):
            found = read_metadata(self._out).plan.digest
            if found != self._archive.plan.digest:
                raise PlanError(
                    f"{self._out} holds another archive (plan {found[:12]}) than {self._archive.place} "
                    f"({self._archive.plan.digest[:12]}): choose another folder"
                )
        elif self._out.exists() and not self._out.is_dir():
            raise PlanError(f"{self._out} is a file, and a folder is to be written: choose another place")
        sweep(self._out)

    def _has(self, spec: ArraySpec, shard: int) -> bool:
        """Say whether an earlier copy left this shard, whole and unaltered."""
        record = file_record(self._archive.commits, spec.key, shard)
        path = shard_path(self._out, spec, shard)
        if not path.is_file() or path.stat().st_size != record.n_bytes:
            return False
        try:
            return check_shard(path, spec, shard_rows(spec, self._archive.n_rows, shard)) == record.digest
        except DamagedArchiveError:
            return False

    def _copy_shard(self, spec: ArraySpec, shard: int) -> int:
        return write_file(shard_path(self._out, spec, shard), shard_file(self._archive, spec, shard))

    def _copy_small(self, name: str, file: SmallFile) -> int:
        path = self._out / name
        return 0 if path.exists() else write_file(path, [fetch_small(self._archive, name, file)])

    def _copy_examples(self) -> int:
        """Copy the files of examples behind side tables, which need them too, so that each is fetched once."""
        sent = self._copy_side_tables()
        return sent + sum(self._copy_small(name, file) for name, file in self._small.items() if _is_of_examples(name))

    def _copy_side_tables(self) -> int:
        """Copy the side tables, and at the end what names them; not over what was written here, or came earlier."""
        if (self._out / SIDE_TABLES).exists() or not self._archive.side_tables:
            return 0
        self._side = side_table_files(self._archive.side_tables)
        sent = sum(self._copy_small(name, file) for name, file in self._side.items())
        self._side[SIDE_TABLES] = SmallFile(MAX_SIDE_TABLES_BYTES)
        return sent + write_file(self._out / SIDE_TABLES, [(self._archive.path / SIDE_TABLES).read_bytes()])

    def _copy_index(self) -> int:
        n_bytes = write_file(self._out / INDEX, fetch_index(self._archive))
        entry, plan = self._archive.metadata.index, self._archive.plan
        assert entry is not None  # noqa: S101  # an archive without an index is refused first
        PackedIndex(self._out, plan, self._archive.n_rows, entry).check()
        return n_bytes


def _is_of_examples(name: str) -> bool:
    return name.startswith("examples/")
