"""Copy a finished archive from a folder or an address to an address: parallel, taken up again after a kill.

The root's metadata go last, so nobody meets half an archive. Until then a small object, `.residua-push.json`, has the
plan of the archive that is on its way there: a copy that was killed goes on, and another archive is not mixed into it.
Before the root, the far end is listed. Only if the server has confirmed every other object to this very copy, root and
listing go at once, for one wait less; should one be missing all the same, the root is removed.

A shard never changes, so one that is there with its size is not sent again. Each is read once: its chunks are compared
with its record while it goes, and one that is damaged does not appear at the far end. Commit records stay behind: the
packed index has all that they say.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from residua.store.base.canonical import canonical_json
from residua.store.base.errors import NotCapturedError, PlanError, StorageError, few
from residua.store.base.local_paths import shortened
from residua.store.base.untrusted import parse_json
from residua.store.encoding.shard import shard_path
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.side_tables import SIDE_TABLES
from residua.store.format.archive_metadata import MAX_METADATA_BYTES, ROOT, metadata_bytes
from residua.store.format.plan import Plan
from residua.store.read.archive import Archive
from residua.store.read.remote_archive import RemoteArchive
from residua.store.read.shard_files import shard_file
from residua.store.read.stacks import StackedArchive, archives_of, open_source
from residua.store.sealing.packed_index import INDEX, file_record
from residua.store.sharing.card import Licences
from residua.store.sharing.copied import (
    N_AT_ONCE,
    BytesDone,
    Copied,
    FileWork,
    copy_files,
    is_part_of,
    refuse_lost_side_tables,
    together,
)
from residua.store.sharing.hub import HubPush
from residua.store.sharing.hub_client import USUAL_SIZES, HubSizes
from residua.store.sharing.pull import pull_one
from residua.store.sharing.small_files import fetch_index, fetch_small, side_table_files, small_files
from residua.store.storage.address import is_remote, scheme_of
from residua.store.storage.crc import Buffer
from residua.store.storage.destination import BucketFolder
from residua.store.storage.files import write_file
from residua.store.storage.hub import folder_at
from residua.store.storage.lease import LEASE
from residua.store.storage.objects import ObjectFolder, in_parallel
from residua.store.storage.place import bucket_at, require_room

_MEMORY_BYTES = 256 * 2**20  # of large shards that are under way

_OnBytes: TypeAlias = Callable[[int, int], None]

_JOURNAL = ".residua-push.json"


def push(
    source: Archive | str | PathLike[str],
    address: str,
    *,
    public: bool = False,
    license: str | None = None,  # noqa: A002  # as the card names it
    model_license: str | None = None,
    text_license: str | None = None,
    keep_paths: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int, int], None] = lambda *_: None,
) -> Copied:
    """Copy a finished archive to an address.

    Every shard is read once, and compared with its record on the way. Afterwards the far end is listed, and every
    object has to be there with its size (on the Hub, with its digest); ``residua verify ADDRESS`` reads all of it. What
    is there already is not sent again, also if the archive there has only some of the sites.

    A dataset repository of the Hub is made unless it is there, and gets a card: see ``residua card``.

    Args:
        source: The archive, or its folder or address.
        address: Where it goes, for example ``s3://bucket/acts.zarr`` or ``hf://datasets/ORG/NAME[@BRANCH][/FOLDER]``.
        public: On the Hub: whether a repository that is made now can be seen by everybody.
        license: On the Hub: licence of the activations for the card, such as ``cc-by-4.0``.
        model_license: On the Hub: licence of the model for the card.
        text_license: On the Hub: licence of the text for the card.
        keep_paths: Whether the copy's provenance keeps absolute paths of this machine, such as the model's folder. By
            default it has only their last part, and a note says so; the archive itself stays as it is.
        storage_options: For `address`, as for `residua.open`, and for `source` if that is of the same kind. If it needs
            others, give the open archive.
        on_bytes: Called with the bytes done and the total, from several threads.

    Raises:
        NotCapturedError: The archive is not finished.
        DamagedArchiveError: A file of the archive was altered.
        PlanError: Another archive is at that address, or on its way there; or the Hub does not take so many files.
        StorageError: The address cannot be written.
        MissingPackageError: The Hub needs huggingface_hub.

    Example:
        >>> residua.push("acts.zarr", "s3://bucket/acts.zarr")  # doctest: +SKIP
    """
    if not is_remote(address):
        raise PlanError(f"{address} is a folder, and push copies to an address: copy with cp -r, or residua pull")
    archive = _finished(source, address, storage_options)
    if isinstance(archive, StackedArchive):
        return _push_stacks(archive, address, storage_options, on_bytes, keep_paths=keep_paths)
    if scheme_of(address) == "hf":
        licences = Licences(data=license, model=model_license, text=text_license)
        return push_to_hub(archive, address, licences, storage_options, on_bytes, keep_paths=keep_paths, public=public)
    out = bucket_at(address, storage_options)
    out.memory_bytes = _MEMORY_BYTES
    out.writer_threads(N_AT_ONCE)
    with ThreadPoolExecutor(1, thread_name_prefix="residua-copy") as pool:
        looked = pool.submit(_look, archive, out.objects)
        if archive.is_remote:
            looked.result()  # nothing is fetched for an address that is refused
        with _small_files_of(archive) as small:
            copy = _Push(archive, out, small, keep_paths=keep_paths)
            return copy.run(*looked.result(), on_bytes)


class _Push:
    """One copy of a finished archive to a bucket.

    Args:
        archive: The archive.
        out: Where it goes.
        small: A folder with all of its files but shards.
        keep_paths: As for `push`.
    """

    def __init__(self, archive: Archive, out: BucketFolder, small: Path, *, keep_paths: bool) -> None:
        self._archive, self._out, self._small = archive, out, small
        self._root, self._notes = _root(archive, small, keep_paths=keep_paths)
        self._shards = _shards_of(archive)
        self._files = {**_small_sizes(small), **_shard_sizes(archive, self._shards), ROOT: len(self._root)}

    def run(self, there: Mapping[str, int], is_update: bool, on_bytes: _OnBytes) -> Copied:
        """Send what is not there yet.

        Args:
            there: Sizes of the objects that are there.
            is_update: Whether the archive, or a part of it, is there already.
            on_bytes: As for `push`.
        """
        files = self._files
        # An archive with some of the sites may be there, which is read by its own index until the new one comes.
        last = [name for name in ((SIDE_TABLES, INDEX, ROOT) if is_update else (ROOT,)) if name in files]
        to_send = [name for name in files if not (name in self._shards and there.get(name) == files[name])]
        done = BytesDone(sum(files.values()), on_bytes)
        done.add(done.total - sum(files[name] for name in to_send))

        def send(name: str, begun: Future[None]) -> int:
            self._send(name, begun)
            done.add(files[name])
            return files[name]

        with ThreadPoolExecutor(1, thread_name_prefix="residua-copy") as pool:
            begun = pool.submit(_begin, self._archive.plan, self._out.objects)
            first = [name for name in to_send if name not in last]
            sent = copy_files([FileWork(files[name], partial(send, name, begun)) for name in first])
            begun.result()
            arrived = pool.submit(self._require_arrived, [name for name in files if name not in last])
            if is_update or len(to_send) < len(files):  # the server has not confirmed all of it now
                arrived.result()
            sent += sum(send(name, begun) for name in last)
            try:
                arrived.result()
            except StorageError:
                self._out.objects.delete([ROOT])
                raise
        self._out.objects.delete([_JOURNAL])
        return Copied(len(files), done.total, sent, tuple(self._notes))

    def _send(self, name: str, begun: Future[None]) -> None:
        """Send a file, which does not appear before the copy has `begun`; the bytes of a shard go meanwhile."""
        if name in self._shards:
            self._out.write(name, _ShardFile(self._archive, *self._shards[name], begun), are_kept=True)
            return
        begun.result()
        self._out.objects.write(name, [self._root] if name == ROOT else self._small / name)

    def _require_arrived(self, names: Sequence[str]) -> None:
        there, objects = _listed(self._out.objects), self._out.objects
        unseen = [name for name in names if there.get(name) != self._files[name]]
        if lost := [name for name in unseen if objects.size(name) != self._files[name]]:  # a list may lag behind
            raise StorageError(f"{self._out} lacks {few(lost)}, or has not all of it: run the same command again")


class _ShardFile:
    """The bytes of a shard file, read and compared anew each time that they are asked for.

    They do not end before the copy has `begun`, so the object does not appear before.
    """

    def __init__(self, archive: Archive, spec: ArraySpec, shard: int, begun: Future[None]) -> None:
        self._args = archive, spec, shard
        self._begun = begun

    def __iter__(self) -> Iterator[Buffer]:
        yield from shard_file(*self._args)
        self._begun.result()


def push_to_hub(
    archive: Archive,
    address: str,
    licences: Licences,
    storage_options: Mapping[str, Any] | None,
    on_bytes: _OnBytes,
    *,
    keep_paths: bool = False,
    public: bool = False,
    sizes: HubSizes = USUAL_SIZES,
) -> Copied:
    """Copy an archive to the Hub, whose client sends files of this machine.

    Args:
        archive: The archive, which is finished.
        address: As for `push`.
        licences: What the card says of them.
        storage_options: As for `push`.
        on_bytes: As for `push`.
        keep_paths: As for `push`.
        public: As for `push`.
        sizes: How many files the Hub takes, and how many are sent at a time.

    Raises:
        DamagedArchiveError, MissingPackageError, PlanError, StorageError: As `push` does.
    """
    with ExitStack() as stack:
        if archive.is_remote:
            archive, on_bytes = _brought(archive, stack.enter_context(_temporary()), on_bytes)
        root, notes = _root(archive, archive.path, keep_paths=keep_paths)
        shards = _shards_of(archive)

        def check(name: str) -> None:
            if name in shards:
                for _ in shard_file(archive, *shards[name]):
                    pass

        files = {**_small_sizes(archive.path), **_shard_sizes(archive, shards), ROOT: len(root)}
        hub = HubPush(archive, address, files, check, storage_options or {}, root, sizes)
        copied = hub.run(licences, on_bytes, public=public)
        return replace(copied, notes=(*copied.notes, *notes))


def _brought(archive: Archive, folder: Path, on_bytes: _OnBytes) -> tuple[Archive, _OnBytes]:
    """Copy an archive from an address into a folder; return it there, and what counts the bytes of the way on."""
    n_bytes = sum(_shard_sizes(archive, _shards_of(archive)).values())
    require_room(folder, n_bytes, f"the files of {archive.place}")
    pulled = pull_one(archive, folder / "a.zarr", archive.sites, lambda done, total: on_bytes(done, 2 * total))
    return Archive(folder / "a.zarr"), lambda done, total: on_bytes(pulled.n_bytes + done, pulled.n_bytes + total)


def _finished(
    source: Archive | str | PathLike[str], address: str, storage_options: Mapping[str, Any] | None
) -> Archive:
    """Return an archive that can be copied, or those of several stacks; raises NotCapturedError for others."""
    is_open = isinstance(source, Archive) and is_remote(source)
    archive = open_source(source if is_open else fspath(source), address, storage_options, cache=False)
    for one in archives_of(archive):
        if one.metadata.index is None:
            raise NotCapturedError(
                f"{one.place} has no packed index: finish its capture, or run residua pack on it if it is of format 1.0"
            )
    if not archive.was_finished:
        raise NotCapturedError(f"{archive.place} is not finished: some of its stacks were not begun")
    return archive


def _push_stacks(
    source: StackedArchive,
    address: str,
    storage_options: Mapping[str, Any] | None,
    on_bytes: _OnBytes,
    *,
    keep_paths: bool,
) -> Copied:
    """Copy the archive of each stack, and at the end the metadata that name them."""
    if scheme_of(address) == "hf":
        first = next(iter(source.stacks))
        raise PlanError(
            f"{source.place} holds the archives of {' and '.join(source.stacks)}, and each has a card of its own on "
            f"the Hub: push them one by one, {source.place}/{first} to {address}/{first} for example"
        )
    folder = bucket_at(address, storage_options).objects
    if is_remote(source):
        options = next(iter(source.stacks.values())).storage_options
        root = folder_at(source.place, options).read(ROOT, MAX_METADATA_BYTES)
    else:
        root = (source.path / ROOT).read_bytes()
    if folder.size(ROOT) is not None and folder.read(ROOT, MAX_METADATA_BYTES) != root:
        raise PlanError(f"{folder} holds another archive: choose another address, or delete it first")
    copies: list[Copied] = []
    for number, (name, one) in enumerate(source.stacks.items(), 1):
        before, left = sum(copied.n_bytes for copied in copies), len(source.stacks) - number

        def on_step(done: int, total: int, before: int = before, left: int = left) -> None:
            on_bytes(before + done, before + total * (1 + left))  # the others are taken for as large

        copied = push(
            one, f"{folder.address}/{name}", keep_paths=keep_paths, storage_options=storage_options, on_bytes=on_step
        )
        copies.append(copied)
    folder.write(ROOT, [root])
    return together(copies, len(root))


@contextmanager
def _small_files_of(archive: Archive) -> Iterator[Path]:
    """Give a folder with all files of an archive but shards: its own, or, for an address, one with copies of them."""
    if not isinstance(archive, RemoteArchive):
        yield archive.path
        return
    tables = archive.side_tables
    files = {**small_files(archive, archive.arrays), **side_table_files(tables)}
    with _temporary() as folder:

        def bring(name: str) -> None:
            write_file(folder / name, [fetch_small(archive, name, files[name])])

        in_parallel(bring, list(files), n_at_once=N_AT_ONCE)
        write_file(folder / INDEX, fetch_index(archive))
        for name in [*([SIDE_TABLES] if tables else []), ROOT]:
            write_file(folder / name, [(archive.path / name).read_bytes()])
        yield folder


@contextmanager
def _temporary() -> Iterator[Path]:
    with TemporaryDirectory(prefix="residua-") as folder:
        yield Path(folder)


def _shards_of(archive: Archive) -> dict[str, tuple[ArraySpec, int]]:
    """Return the shard files of an archive by their paths."""
    return {
        shard_path(Path(), spec, shard).as_posix(): (spec, shard)
        for array in archive.arrays
        for spec in array.file_specs
        for shard in archive.commits
    }


def _shard_sizes(archive: Archive, shards: Mapping[str, tuple[ArraySpec, int]]) -> dict[str, int]:
    """Return the sizes that the records of an archive give to shard files."""
    return {name: file_record(archive.commits, spec.key, shard).n_bytes for name, (spec, shard) in shards.items()}


def _small_sizes(folder: Path) -> dict[str, int]:
    """Return the files below a folder that are copied, with their sizes, and perhaps shards."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return {name: size for name, size in names.items() if not name.startswith((".", "commits/")) and "/." not in name}


def _root(archive: Archive, folder: Path, *, keep_paths: bool) -> tuple[bytes, list[str]]:
    """Return the root's metadata as they are sent, of which `folder` has a copy, and what to say about them."""
    provenance, notes = shortened(archive.provenance, keep=keep_paths)
    if not notes:
        return (folder / ROOT).read_bytes(), []
    return metadata_bytes(folder, replace(archive.metadata, provenance=provenance)), notes


def _listed(folder: ObjectFolder) -> dict[str, int]:
    return {entry.name: entry.n_bytes for entry in folder.list()}


def _look(archive: Archive, folder: ObjectFolder) -> tuple[dict[str, int], bool]:
    """Return the sizes of what is at the address, and whether it is the archive or a part of it.

    All is asked at once. Raises PlanError if something else is there.
    """

    def there() -> RemoteArchive | None:
        try:
            return RemoteArchive(folder.address, storage_options=folder.options, cache=False)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(2, thread_name_prefix="residua-copy") as pool:
        lease, listed = pool.submit(folder.size, LEASE), pool.submit(_listed, folder)
        found = there()
    if found is None:
        if lease.result() is not None:
            raise PlanError(f"a capture into {folder} has begun: choose another address")
        return listed.result(), False
    if not found.was_finished:
        raise PlanError(
            f"{folder} holds an unfinished archive: finish its capture there, choose another address, or delete it "
            "first"
        )
    refuse_lost_side_tables(archive, found)
    if not is_part_of(found.plan, archive.plan):
        raise PlanError(
            f"{folder} holds another archive (plan {found.plan.digest[:12]}, this one is {archive.plan.digest[:12]}): "
            "choose another address, or delete it first"
        )
    return listed.result(), True


def _begin(mine: Plan, folder: ObjectFolder) -> None:
    """Say at the address which archive comes; refuse if the copy of another one was begun."""
    journal = canonical_json(mine.to_json())
    try:
        folder.create(_JOURNAL, journal)
    except FileExistsError:
        if not _is_begun_part(folder, mine):
            raise PlanError(
                f"a copy of another archive to {folder} was begun: choose another address, or, if that copy was given "
                f"up, delete what is there, {_JOURNAL} included"
            ) from None
        folder.write(_JOURNAL, [journal])


def _is_begun_part(folder: ObjectFolder, mine: Plan) -> bool:
    """Say whether the copy that was begun there is of the same archive, with these sites or some of them."""
    try:
        return is_part_of(Plan.from_json(parse_json(folder.read(_JOURNAL, MAX_METADATA_BYTES))), mine)
    except (FileNotFoundError, ValueError):
        return False
