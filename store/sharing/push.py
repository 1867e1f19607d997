"""Copy a finished archive to an address: parallel, taken up again after a kill, compared at the far end.

The root's metadata go last, so nobody meets half an archive. Until then a small object, `.residua-push.json`, has the
plan of the archive that is on its way there: a copy that was killed goes on, and another archive is not mixed into it.
A shard never changes, so one that is there with its size is not sent again. Commit records stay behind: the packed
index has all that they say.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from residua.store.base.canonical import canonical_json
from residua.store.base.errors import DamagedArchiveError, NotCapturedError, PlanError, StorageError, few
from residua.store.base.local_paths import shortened
from residua.store.base.untrusted import parse_json
from residua.store.encoding.shard import check_shard, shard_path, shard_rows
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.side_tables import SIDE_TABLES
from residua.store.format.archive_metadata import MAX_METADATA_BYTES, ROOT, is_archive, metadata_bytes
from residua.store.format.plan import Plan
from residua.store.format.stacks import stacks_in
from residua.store.read.archive import Archive
from residua.store.read.remote_archive import RemoteArchive
from residua.store.sealing.packed_index import INDEX
from residua.store.sharing.card import Licences
from residua.store.sharing.copied import BytesDone, Copied, in_parallel, is_part_of, refuse_lost_side_tables, together
from residua.store.sharing.hub import HubPush
from residua.store.storage.address import scheme_of
from residua.store.storage.lease import LEASE
from residua.store.storage.objects import ObjectFolder

_JOURNAL = ".residua-push.json"


def push(
    source: str | PathLike[str],
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

    Every shard is compared with its record before it is sent. Afterwards the far end is listed, and every object has
    to be there with its size (on the Hub, with its digest); ``residua verify ADDRESS`` reads all of it. What is there
    already is not sent again, also if the archive there has only some of the sites.

    A dataset repository of the Hub is made unless it is there, and gets a card: see ``residua card``.

    Args:
        source: The archive, or its folder.
        address: Where it goes, for example ``s3://bucket/acts.zarr`` or ``hf://datasets/ORG/NAME[@BRANCH][/FOLDER]``.
        public: On the Hub: whether a repository that is made now can be seen by everybody.
        license: On the Hub: licence of the activations for the card, such as ``cc-by-4.0``.
        model_license: On the Hub: licence of the model for the card.
        text_license: On the Hub: licence of the text for the card.
        keep_paths: Whether the copy's provenance keeps absolute paths of this machine, such as the model's folder. By
            default it has only their last part, and a note says so; the archive itself stays as it is.
        storage_options: As for `residua.open`.
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
    if is_archive(Path(source)) and (stacks := stacks_in(Path(source))):
        return _push_stacks(Path(source), stacks, address, storage_options, on_bytes, keep_paths=keep_paths)
    archive = _finished(source)
    licences = Licences(data=license, model=model_license, text=text_license)
    root, notes = _root(archive, keep_paths=keep_paths)
    files = {**_files(archive), ROOT: len(root)}
    shards = {
        shard_path(Path(), spec, shard).as_posix(): (spec, shard)
        for array in archive.arrays
        for spec in array.file_specs
        for shard in archive.commits
    }

    def check(name: str) -> None:
        if name in shards:
            _check(archive, *shards[name])

    if scheme_of(address) == "hf":
        hub = HubPush(archive, address, files, check, storage_options or {}, root)
        copied = hub.run(licences, on_bytes, public=public)
        return replace(copied, notes=(*copied.notes, *notes))
    folder = ObjectFolder(address, storage_options)
    is_update = _is_update(archive, folder)
    with ThreadPoolExecutor(1, thread_name_prefix="residua-copy") as pool:
        listed = pool.submit(_listed, folder)
        _begin(archive.plan, folder)
    there = listed.result()
    to_send = [name for name in files if name != ROOT and not (name in shards and there.get(name) == files[name])]
    done = BytesDone(sum(files.values()), on_bytes)
    done.add(sum(files.values()) - sum(files[name] for name in (*to_send, ROOT)))

    def send(name: str) -> None:
        check(name)
        folder.write(name, [root] if name == ROOT else archive.path / name)
        done.add(files[name])

    # An archive with some of the sites may be there, which is read by its own index until the new one comes.
    last = [name for name in ((SIDE_TABLES, INDEX, ROOT) if is_update else (ROOT,)) if name in files]
    first = sorted((name for name in to_send if name not in last), key=lambda name: files[name], reverse=True)
    in_parallel(send, first)  # the largest first, so that none is left alone at the end
    there = _listed(folder)
    unseen = [name for name in files if name not in last and there.get(name) != files[name]]
    if lost := [name for name in unseen if folder.size(name) != files[name]]:  # a list may lag behind
        raise StorageError(f"{folder}: {few(lost)} did not arrive whole: run the same command again")
    for name in last:
        send(name)
    folder.delete([_JOURNAL])
    return Copied(len(files), sum(files.values()), sum(files[name] for name in (*to_send, ROOT)), tuple(notes))


def _finished(source: str | PathLike[str]) -> Archive:
    """Return an archive that can be copied; raises NotCapturedError for others."""
    archive = Archive(source)
    if archive.metadata.index is None:
        raise NotCapturedError(
            f"{archive.path} has no packed index: finish its capture, or run residua pack on it if it is of format 1.0"
        )
    return archive


def _push_stacks(
    source: Path,
    stacks: Sequence[str],
    address: str,
    storage_options: Mapping[str, Any] | None,
    on_bytes: Callable[[int, int], None],
    *,
    keep_paths: bool,
) -> Copied:
    """Copy the archive of each stack, and at the end the metadata that name them."""
    if scheme_of(address) == "hf":
        raise PlanError(
            f"{source} holds the archives of {' and '.join(stacks)}, and each has a card of its own on the Hub: push "
            f"them one by one, {source / stacks[0]} to {address}/{stacks[0]} for example"
        )
    root, folder = (source / ROOT).read_bytes(), ObjectFolder(address, storage_options)
    if folder.size(ROOT) is not None and folder.read(ROOT, MAX_METADATA_BYTES) != root:
        raise PlanError(f"{folder} holds another archive: choose another address, or delete it first")
    total = sum(sum(_files(Archive(source / name)).values()) for name in stacks)
    copies: list[Copied] = []
    for name in stacks:
        before = sum(copied.n_bytes for copied in copies)
        copies.append(
            push(
                source / name,
                f"{folder.address}/{name}",
                keep_paths=keep_paths,
                storage_options=storage_options,
                on_bytes=lambda done, _, before=before: on_bytes(before + done, total),  # type: ignore[misc]
            )
        )
    folder.write(ROOT, [root])
    return together(copies, len(root))


def _root(archive: Archive, *, keep_paths: bool) -> tuple[bytes, list[str]]:
    """Return the root's metadata as they are sent, and what to say about them."""
    provenance, notes = shortened(archive.provenance, keep=keep_paths)
    if not notes:
        return (archive.path / ROOT).read_bytes(), []
    return metadata_bytes(archive.path, replace(archive.metadata, provenance=provenance)), notes


def _is_update(archive: Archive, folder: ObjectFolder) -> bool:
    """Say whether the archive, or a part of it, is at the address; refuse if something else is."""

    def there() -> RemoteArchive | None:
        try:
            return RemoteArchive(folder.address, storage_options=folder.options, cache=False)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(1, thread_name_prefix="residua-copy") as pool:
        lease = pool.submit(folder.size, LEASE)
        found = there()
    if found is None:
        if lease.result() is not None:
            raise PlanError(f"a capture into {folder} has begun: choose another address")
        return False
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
    return True


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


def _files(archive: Archive) -> dict[str, int]:
    """Return the files that are copied, with their sizes."""
    paths = [path for path in sorted(archive.path.rglob("*")) if path.is_file()]
    names = {path.relative_to(archive.path).as_posix(): path.stat().st_size for path in paths}
    return {name: size for name, size in names.items() if not name.startswith((".", "commits/")) and "/." not in name}


def _listed(folder: ObjectFolder) -> dict[str, int]:
    return {entry.name: entry.n_bytes for entry in folder.list()}


def _check(archive: Archive, spec: ArraySpec, shard: int) -> None:
    """Raise DamagedArchiveError unless a shard is the one that its record describes."""
    path = shard_path(archive.path, spec, shard)
    n_rows = shard_rows(spec, archive.n_rows, shard)
    if (
        check_shard(path, spec, n_rows, first_row=shard * spec.rows_per_shard)
        != archive.commits[shard].arrays[spec.key].digest
    ):
        raise DamagedArchiveError(f"{path} is not the file that its record describes: restore it from a copy")
