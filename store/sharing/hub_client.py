"""The two kinds of place on the Hub to which files are sent, through `huggingface_hub`: repositories and buckets.

A dataset repository takes files in commits and says their SHA-256 (of small text files, git's SHA-1). A bucket takes
them one by one and says their sizes. Failures that may pass are tried again; others say what to do.
"""

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple
from urllib.parse import unquote

from residua.store.base.errors import MissingPackageError, ResiduaError, StorageError
from residua.store.storage.address import HubPlace
from residua.store.storage.hub import hub_endpoint, hub_token

_TRIES = 5
_PASSING = (408, 412, 429, 500, 502, 503, 504)  # 412: somebody else's commit came first
_DENIED = (401, 403)
_STEP_BYTES = 1 << 20


class HubSizes(NamedTuple):
    """How many files the Hub takes, and how many are sent at a time.

    Attributes:
        most_files: Files that a repository may have.
        most_in_a_folder: Files and folders that a folder of a repository may have.
        commit_files: Files of one commit.
        commit_bytes: Bytes of one commit, unless a file has more.
        group_files: Files that are sent together, between two steps of the progress.
        group_bytes: Bytes of these, unless a file has more.
    """

    most_files: int = 100_000
    most_in_a_folder: int = 10_000
    commit_files: int = 200
    commit_bytes: int = 8 * 2**30
    group_files: int = 50
    group_bytes: int = 2**30


USUAL_SIZES = HubSizes()


@dataclass(frozen=True)
class Source:
    """A file to send.

    Attributes:
        data: A path of this machine, or its bytes.
        n_bytes: Its size.
    """

    data: Path | bytes
    n_bytes: int

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of its bytes, in hex; a file is read once for it."""
        return self._digest(hashlib.sha256())

    @cached_property
    def blob(self) -> str:
        """The SHA-1 that git has of it, in hex."""
        return self._digest(hashlib.sha1(b"blob %d\0" % self.n_bytes, usedforsecurity=False))

    @property
    def is_hashed(self) -> bool:
        """Whether `sha256` is known."""
        return "sha256" in self.__dict__

    def learn(self, sha256: str) -> None:
        """Take the `sha256` that somebody else has computed while reading the file."""
        self.__dict__["sha256"] = sha256

    def _digest(self, digest: Any) -> str:
        if isinstance(self.data, bytes):
            digest.update(self.data)
        else:
            with self.data.open("rb") as file:
                while step := file.read(_STEP_BYTES):
                    digest.update(step)
        found: str = digest.hexdigest()
        return found


@dataclass(frozen=True)
class There:
    """A file on the Hub.

    Attributes:
        n_bytes: Its size.
        sha256: Its SHA-256, of a large file in a repository.
        blob: The SHA-1 that git has of it, of a small file in a repository.
    """

    n_bytes: int
    sha256: str | None = None
    blob: str | None = None

    def holds(self, source: Source) -> bool:
        """Say whether this is the file `source`, as far as the Hub says what it is."""
        if self.n_bytes != source.n_bytes:
            return False
        if self.sha256 is not None:
            return self.sha256 == source.sha256
        return self.blob in (None, source.blob)


class HubTarget(ABC):
    """A folder on the Hub to which files are sent; `target_at` gives the one of an address.

    Args:
        place: The folder.
        options: ``token`` and ``endpoint``, as for reading.
        sizes: How many files are sent together.

    Attributes:
        place: As given.
        page: Address of the page that shows it.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
    """

    says_content: ClassVar[bool]
    """Whether `There` says what a file holds, and not its size alone."""

    def __init__(self, place: HubPlace, options: Mapping[str, Any], sizes: HubSizes) -> None:
        self.place = place
        self._sizes = sizes
        self.page = f"{hub_endpoint(options)}{place.page}"
        self._client = _client(f"residua push to {place.address}")
        self._api: Any = self._client.HfApi(endpoint=hub_endpoint(options), token=hub_token(options) or False)

    def create(self, *, public: bool) -> None:
        """Make it unless it is there.

        Raises:
            StorageError: It cannot be made.
        """
        with self._saying("create"):
            _again(lambda: self._create(private=not public))

    def list(self) -> dict[str, There]:
        """Return the files of the folder, by their paths in it.

        Raises:
            StorageError: They cannot be listed.
        """
        with self._saying("list"):
            folder, found = PurePosixPath(self.place.folder), dict(self._list())
        inside = {path: found[path] for path in found if PurePosixPath(path).is_relative_to(folder)}
        return {PurePosixPath(path).relative_to(folder).as_posix(): there for path, there in inside.items()}

    def send(self, files: Mapping[str, Source], message: str, on_file: Callable[[str], None] = lambda _: None) -> None:
        """Send files.

        Args:
            files: By their paths in the folder; ``/README.md`` is in the repository's root.
            message: What the commit is about.
            on_file: Called with the path of each file that arrived.

        Raises:
            StorageError: They cannot be sent.
        """
        with self._saying("send files to"):
            self._send(files, message, on_file)

    @abstractmethod
    def _create(self, *, private: bool) -> None: ...

    @abstractmethod
    def _list(self) -> Iterator[tuple[str, There]]: ...

    @abstractmethod
    def _send(self, files: Mapping[str, Source], message: str, on_file: Callable[[str], None]) -> None: ...

    def _entries(self, tree: Iterator[Any]) -> Iterator[Any]:
        """Yield the entries of a listing; none if there is no such folder."""
        try:
            yield from tree
        except self._client.errors.EntryNotFoundError:
            return

    def _path(self, name: str) -> str:
        return name[1:] if name.startswith("/") else (PurePosixPath(self.place.folder) / name).as_posix()

    @contextmanager
    def _saying(self, doing: str) -> Iterator[None]:
        """Say what went wrong in the user's words, and keep the client's own progress bars out of the way."""
        utils: Any = self._client.utils
        is_silent = utils.are_progress_bars_disabled()
        if not is_silent:
            utils.disable_progress_bars()
        try:
            yield
        except ResiduaError:
            raise
        except Exception as error:  # noqa: BLE001  # the client's errors are of several libraries
            raise StorageError(f"cannot {doing} {self.place.address}: {self._said(error)}") from None
        finally:
            if not is_silent:
                utils.enable_progress_bars()

    def _said(self, error: Exception) -> str:
        status, cause = _status(error), error
        while isinstance(cause.__cause__, Exception):  # the client's own errors say which file, theirs why
            cause = cause.__cause__
        said = getattr(cause, "server_message", None) or str(cause).strip() or type(cause).__name__
        text = said.splitlines()[0].rstrip(".:")
        if status in _DENIED:
            return (
                f"it is not allowed (the server answered {status}: {text}). Log in with hf auth login, with a token "
                f"that may write to {self.place.repository.partition('/')[0]}; the page is {self.page}"
            )
        answered = "" if status is None else f"the server answered {status}: "
        return f"{answered}{text}. Run the same command again: what has arrived is not sent again"


class HubRepository(HubTarget):
    """A folder of a dataset repository; its revision is the branch to which commits are added."""

    says_content = True

    @property
    def _id(self) -> dict[str, str]:
        return {"repo_id": self.place.repository, "repo_type": "dataset"}

    @property
    def _branch(self) -> str:
        return unquote(self.place.revision)  # the client quotes it itself

    def _create(self, *, private: bool) -> None:
        self._api.create_repo(**self._id, private=private, exist_ok=True)
        if self._branch != "main":
            self._api.create_branch(**self._id, branch=self._branch, exist_ok=True)

    def _list(self) -> Iterator[tuple[str, There]]:
        tree = self._api.list_repo_tree(
            **self._id, path_in_repo=self.place.folder or None, recursive=True, revision=self._branch
        )
        for entry in self._entries(tree):
            if hasattr(entry, "blob_id"):  # or it is a folder
                lfs = entry.lfs
                yield entry.path, There(entry.size, *((lfs.sha256,) if lfs else (None, entry.blob_id)))

    def _send(self, files: Mapping[str, Source], message: str, on_file: Callable[[str], None]) -> None:
        operations: dict[str, Any] = {}
        for name, source in files.items():
            data = source.data if isinstance(source.data, bytes) else os.fspath(source.data)
            operations[name] = self._client.CommitOperationAdd(self._path(name), data)
            if source.is_hashed:
                operations[name].upload_info.sha256 = bytes.fromhex(source.sha256)
        for group in grouped(files, self._sizes.group_files, self._sizes.group_bytes):
            self._upload([operations[name] for name in group])
            for name, source in group.items():
                source.learn(operations[name].upload_info.sha256.hex())  # the client hashes what it reads
                on_file(name)
        where = {**self._id, "revision": self._branch, "num_threads": 8}
        _again(lambda: self._api.create_commit(operations=[*operations.values()], commit_message=message, **where))

    def _upload(self, additions: Sequence[Any]) -> None:
        where = {**self._id, "revision": self._branch, "num_threads": 8}
        _again(lambda: self._api.preupload_lfs_files(additions=additions, **where))


class HubBucket(HubTarget):
    """A folder of a bucket. It needs a version of huggingface_hub that has buckets."""

    says_content = False

    def __init__(self, place: HubPlace, options: Mapping[str, Any], sizes: HubSizes) -> None:
        super().__init__(place, options, sizes)
        if not hasattr(self._api, "batch_bucket_files"):
            raise StorageError(
                f"{place.address}: the installed huggingface_hub has no buckets: pip install -U huggingface_hub"
            )

    def _create(self, *, private: bool) -> None:
        self._api.create_bucket(self.place.repository, private=private, exist_ok=True)

    def _list(self) -> Iterator[tuple[str, There]]:
        tree = self._api.list_bucket_tree(self.place.repository, prefix=self.place.folder or None, recursive=True)
        for entry in self._entries(tree):
            if entry.type == "file":
                yield entry.path, There(entry.size)

    def _send(
        self,
        files: Mapping[str, Source],
        message: str,  # noqa: ARG002  # a bucket has no messages
        on_file: Callable[[str], None],
    ) -> None:
        for group in grouped(files, self._sizes.group_files, self._sizes.group_bytes):
            self._upload([(source.data, self._path(name)) for name, source in group.items()])
            for name in group:
                on_file(name)

    def _upload(self, files: Sequence[tuple[Path | bytes, str]]) -> None:
        _again(lambda: self._api.batch_bucket_files(self.place.repository, add=list(files)))


def target_at(place: HubPlace, options: Mapping[str, Any], sizes: HubSizes) -> HubTarget:
    """Return the place on the Hub to which files are sent."""
    return (HubBucket if place.kind == "buckets" else HubRepository)(place, options, sizes)


def grouped(files: Mapping[str, Source], most_files: int, most_bytes: int) -> Iterator[dict[str, Source]]:
    """Yield files in groups of at most `most_files`, and of at most `most_bytes` or one file."""
    group: dict[str, Source] = {}
    for name, source in files.items():
        n_bytes = sum(other.n_bytes for other in group.values())
        if group and (len(group) == most_files or n_bytes + source.n_bytes > most_bytes):
            yield group
            group = {}
        group[name] = source
    if group:
        yield group


def _client(wanted: str) -> Any:
    try:
        return import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise MissingPackageError(
            f"{wanted} needs huggingface_hub, which is not installed: pip install 'residua[hub]'"
        ) from None


def _again(work: Callable[[], object]) -> None:
    """Do `work`; after a failure that may pass, once more."""
    for number in range(_TRIES):
        try:
            work()
        except Exception as error:  # the client's errors are of several libraries
            status = _status(error)
            may_pass = status in _PASSING if status is not None else not isinstance(error, TypeError | ValueError)
            if number == _TRIES - 1 or not may_pass:
                raise
            time.sleep(0.2 * 4.0**number)
        else:
            return


def _status(error: BaseException | None) -> int | None:
    """Return the status code that an error of the client came with, or its cause did."""
    while error is not None:
        status: int | None = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None
