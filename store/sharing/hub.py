"""Copy a finished archive to the Hugging Face Hub, with a card: in commits, taken up after a kill, and compared there.

What is there is compared with what is here by its digest, so a file is sent once, also after a kill, and an archive to
which a site was added sends that site alone. The root's metadata go with the last commit, so nobody meets half an
archive; before that, all files are listed and compared. In a bucket, which has no digests and no commits, shards are
compared by their sizes, and all other files are sent again.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from residua.store.base.errors import PlanError, StorageError, few
from residua.store.format.archive_metadata import ROOT
from residua.store.read.archive import Archive
from residua.store.read.remote_archive import RemoteArchive
from residua.store.sharing.card import CARD, MAX_CARD_BYTES, Licences, is_own, make_card
from residua.store.sharing.copied import N_AT_ONCE, BytesDone, Copied, is_part_of, refuse_lost_side_tables
from residua.store.sharing.croissant import CROISSANT
from residua.store.sharing.hub_client import HubSizes, Source, There, grouped, target_at
from residua.store.storage.address import HubPlace, hub_place
from residua.store.storage.hub import folder_at
from residua.store.storage.objects import in_parallel

_COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDERS = ("sites", "rows", "scales", "examples", "head", "tokenizer", "annotations")  # of an archive


class HubPush:
    """One copy of a finished archive to the Hub.

    Args:
        archive: The archive.
        address: ``hf://datasets/ORG/NAME[@BRANCH][/FOLDER]`` or ``hf://buckets/ORG/NAME[/FOLDER]``.
        files: What is sent of the archive's folder, with sizes, by path.
        check: Called with the path of a shard before it is sent; raises DamagedArchiveError if it was altered.
        storage_options: ``token`` and ``endpoint``.
        root: The root's metadata, as they are sent.
        sizes: How many files the Hub takes, and how many a commit has.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
        PlanError: There are more files than the Hub takes.
        StorageError: The address is not one to which files are sent.
    """

    def __init__(
        self,
        archive: Archive,
        address: str,
        files: Mapping[str, int],
        check: Callable[[str], None],
        storage_options: Mapping[str, Any],
        root: bytes,
        sizes: HubSizes,
    ) -> None:
        self._archive, self._check, self._options, self._sizes = archive, check, storage_options, sizes
        self.place = hub_place(address)
        if _COMMIT.fullmatch(self.place.revision):
            raise StorageError(f"{self.place.address} is a commit, which does not change: name a branch, or none")
        _check_limits(files, self.place, sizes)
        self._files = {name: Source(archive.path / name, size) for name, size in files.items()}
        self._files[ROOT] = Source(root, len(root))
        self._target = target_at(self.place, storage_options, sizes)
        self._left = set[str]()  # files of the folder that are not sent

    def run(self, licences: Licences, on_bytes: Callable[[int, int], None], *, public: bool) -> Copied:
        """Send what is not there yet.

        Args:
            licences: What the card says of them.
            on_bytes: Called with the bytes done and the total.
            public: Whether a repository that is made now can be seen by everybody.

        Raises:
            DamagedArchiveError: A shard was altered.
            PlanError: Another archive is there.
            StorageError: The Hub cannot be written.
        """
        self._target.create(public=public)
        there = self._target.list()
        self._refuse_others(there)
        card, notes = self._card(licences)
        files = {name: source for name, source in self._files.items() if name not in card and name not in self._left}
        names = sorted(files)
        are_there = in_parallel(lambda name: self._is_there(name, there), names, n_at_once=N_AT_ONCE)
        to_send = {name: files[name] for name, is_there in zip(names, are_there, strict=True) if not is_there}
        # What replaces a file of an archive that is complete goes with the last commit, as the root does.
        late = {name for name in to_send if name == ROOT or (ROOT in there and name in there)}
        last = {**{name: to_send[name] for name in sorted(late)}, **card}
        done = BytesDone(sum(source.n_bytes for source in {**files, **card}.values()), on_bytes)
        done.add(sum(source.n_bytes for name, source in files.items() if name not in to_send))
        early = {name: source for name, source in to_send.items() if name not in late}
        for batch in grouped(early, self._sizes.commit_files, self._sizes.commit_bytes):
            self._send(batch, f"Add {len(batch):,} files", done)
        if early:
            self._compare({name: source for name, source in files.items() if name not in late})
        if last:
            self._send(last, "Say that the archive is complete", done)
            self._compare({name: source for name, source in last.items() if not name.startswith("/")})
        sent = sum(source.n_bytes for source in {**to_send, **card}.values())
        return Copied(len(files) + len(card), done.total, sent, tuple(notes))

    def _send(self, files: Mapping[str, Source], message: str, done: BytesDone) -> None:
        for name in files:
            self._check(name)
        self._target.send(files, message, lambda name: done.add(files[name].n_bytes))

    def _refuse_others(self, there: Mapping[str, There]) -> None:
        """Raise PlanError if the folder holds another archive, or files of one that was on its way there."""
        if ROOT in there:
            archive = RemoteArchive(self.place.address, storage_options=self._options, cache=False)
            found = archive.plan
            if not is_part_of(found, self._archive.plan):
                raise PlanError(
                    f"{self.place.address} holds another archive (plan {found.digest[:12]}, this one is "
                    f"{self._archive.plan.digest[:12]}): choose another folder, or delete it first"
                )
            refuse_lost_side_tables(self._archive, archive)
            return
        owned = (name for name in there if PurePosixPath(name).parts[0] in _FOLDERS)
        if others := [name for name in owned if name not in self._files]:
            raise PlanError(
                f"{self.place.address} has files of another archive, such as {few(others, 2)}: choose another folder, "
                "or delete them first"
            )

    def _is_there(self, name: str, there: Mapping[str, There]) -> bool:
        is_shard = "/c/" in name
        return name in there and (is_shard or self._target.says_content) and there[name].holds(self._files[name])

    def _compare(self, files: Mapping[str, Source]) -> None:
        there = self._target.list()
        if lost := [name for name, source in files.items() if name not in there or not there[name].holds(source)]:
            raise StorageError(
                f"{self.place.address}: {few(lost)} did not arrive whole, or were changed there: run the same command "
                "again"
            )

    def _card(self, licences: Licences) -> tuple[dict[str, Source], list[str]]:
        """Return the files of the card that are to be written, by their paths, and what to say about it.

        A card that somebody wrote or edited stays, here and there. There is none in a bucket.
        """
        mine = self._archive.path / CARD
        local = mine.read_text(errors="replace") if mine.is_file() else ""
        is_mine = bool(local) and not is_own(local)
        self._left = {CARD} if local and not is_mine else set[str]()
        if self.place.kind == "buckets":
            return {}, []
        there, described = self._published(CARD, ""), self._published(CROISSANT, self.place.folder)
        text = there.decode(errors="replace")
        if there and not is_own(text):
            self._left |= set() if self.place.folder else {CARD}
            is_same = is_mine and there == mine.read_bytes()
            return {}, [] if is_same else [f"{CARD} was edited there, and stays as it is"]
        if is_mine and not self.place.folder:
            return {}, []
        card = make_card(self._archive, self.place, licences, there=described)
        files = {} if described == card.croissant else {CROISSANT: card.croissant}
        self._left.add(CROISSANT)
        note = f"{CARD} there describes another archive, and stays as it is: add this one to it"
        if there and f'residua.open("{self.place.address}")' not in text:
            return _of_bytes(files), [note]
        if text != card.text:
            files["/" * bool(self.place.folder) + CARD] = card.text.encode()
        return _of_bytes(files), []

    def _published(self, name: str, folder: str) -> bytes:
        """Return a file of the card as it is there; empty if there is none."""
        place = replace(self.place, folder=folder)
        try:
            return folder_at(place.address, self._options).read(name, MAX_CARD_BYTES)
        except FileNotFoundError:
            return b""


def _of_bytes(files: Mapping[str, bytes]) -> dict[str, Source]:
    return {name: Source(data, len(data)) for name, data in files.items()}


def _check_limits(files: Mapping[str, int], place: HubPlace, sizes: HubSizes) -> None:
    """Raise PlanError if the Hub does not take so many files, in all or in one folder."""
    entries = {path for name in files for path in (PurePosixPath(name), *PurePosixPath(name).parents)}
    folder, most = Counter(path.parent.as_posix() for path in entries).most_common(1)[0]
    if len(files) > sizes.most_files or most > sizes.most_in_a_folder:
        raise PlanError(
            f"{place.address}: the archive has {len(files):,} files, {most:,} of them in {folder}, and the Hub takes "
            f"{sizes.most_files:,}, and {sizes.most_in_a_folder:,} in a folder: make one with larger shards, with "
            "residua pack ARCHIVE --for hub --out FOLDER, and push that"
        )
