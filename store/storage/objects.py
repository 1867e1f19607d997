"""A folder of objects at an address, read and written through obstore.

Whole objects and ranges come with a bound on their size, so that no server fills the memory. A request that fails for a
passing reason (a connection that broke, 500, 503, too many requests) is made again by obstore, for three minutes at
most. Every error names the object and says what to do; none repeats a password, a signature or a token.

`create` writes an object only if there is none. Two things can go wrong there that no server tells: the answer to a
first try got lost, so that the second finds one's own bytes; or a conflict is reported as "exists" although nothing is
there. So what is there is read back and compared: the same bytes are done, nothing is tried again, and other bytes are
an error.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import obstore
from obstore import exceptions as failures
from obstore.store import HTTPStore, ObjectStore, from_url

from residua.store.base.errors import ResiduaError, StorageError
from residua.store.storage.address import check_address, scheme_of, shown

if TYPE_CHECKING:
    from obstore import PutMode, UpdateVersion

_CREATE_TRIES = 5
_PAUSE_SECONDS = 0.1  # after the first of them; each pause is twice as long
_READ_TRIES = 4
_ENDPOINTS = {  # where services of each scheme may be said to be, in options and in the environment
    "s3": ("endpoint", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("base_url", "GOOGLE_BASE_URL"),
    "az": ("endpoint", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_CREDENTIALS = ("AWS_", "GOOGLE_", "AZURE_")
_BROKE_OFF = "body error"
_NOT_SUPPORTED = {
    "read": "the server does not answer requests for ranges of bytes: download the whole folder, and open that",
    "list": "the server does not list its files: give the address of the archive itself",
}
_RETRY = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}
_CLIENT = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=2), "user_agent": "residua"}
_REMEDY = "Give credentials in the environment, as the service's own tools take them, or in storage_options"
_STATUS = re.compile(r"status code: (\d{3}[^:\n]*)")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")  # in the answers of S3, Google and Azure
_PLAIN_PATH = re.compile(r"(/\w[\w.=-]*)*", re.ASCII)
_REFUSED_STATUS = ("401", "403")
_REFUSED_CODES = ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed")
_NO_BUCKET_CODES = ("NoSuchBucket", "ContainerNotFound")
_LOGIN_SOURCES = ("/latest/api/token", "/latest/meta-data/", "token request", "/metadata/identity/")
_DENIED = (failures.PermissionDeniedError, failures.UnauthenticatedError, PermissionError)
_EXISTS = (failures.AlreadyExistsError, failures.PreconditionError, FileExistsError)
_FAILURES = (failures.BaseError, OSError, ValueError)
_PROCESS: dict[str, int] = {}  # the process in which obstore's threads are

Bytes = npt.NDArray[np.uint8]
R = TypeVar("R")
T = TypeVar("T")


class DeniedError(StorageError):
    """The server does not allow it, now or later."""


class _UnsupportedError(StorageError):
    """The service has nothing of the kind."""


class _NoBucketError(StorageError, FileNotFoundError):
    """The bucket is not there."""


class Listed(NamedTuple):
    """An object below a folder: its path there, and its size in bytes."""

    name: str
    n_bytes: int


class ObjectFolder:
    """The objects below one address. It pickles as the address and its options.

    obstore answers no request in a forked child of a process that has used it (its threads are not copied), so that is
    an error: child processes have to be started with ``forkserver`` or ``spawn``.

    Args:
        address: Where the folder is; see `residua.store.storage.address`.
        options: Arguments of obstore's store, for example ``endpoint``, ``access_key_id`` or ``client_options``. What
            is not given comes from where each service's own clients find it (environment, files, instance).

    Attributes:
        address: As given, without a slash at its end.
        options: As given.

    Raises:
        StorageError: The address or an option is not understood.
    """

    def __init__(self, address: str, options: Mapping[str, Any] | None = None) -> None:
        check_address(address)
        self.address = address.rstrip("/")
        self.options = dict(options or {})
        self._store_address, self._prefix = _bucket_and_prefix(self.address)
        self._opened: tuple[object, ObjectStore] | None = None
        self._store  # noqa: B018  # an option that is not understood is an error here

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.address, self.options)

    def __str__(self) -> str:
        return shown(self.address)

    @property
    def _store(self) -> ObjectStore:
        opened_for = os.getpid(), _credentials()
        if self._opened is None or self._opened[0] != opened_for:
            self._opened = opened_for, self._open()
        return self._opened[1]

    def _open(self) -> ObjectStore:
        settings = _connection(self.address, self.options)
        if _PROCESS.setdefault("pid", os.getpid()) != os.getpid():
            raise StorageError(
                f"{self} cannot be read in a forked process, because the process that it was forked from has used "
                "addresses: start processes with forkserver or spawn, in torch's DataLoader with "
                "multiprocessing_context='forkserver'"
            )
        try:
            return _store_at(self._store_address, _frozen(settings), _credentials())
        except (*_FAILURES, TypeError) as error:  # TypeError: an option of another service
            account = "; Azure's account is account_name there, or AZURE_STORAGE_ACCOUNT_NAME"
            raise StorageError(
                f"{self} cannot be opened: {_said(error)}. Check the address and storage_options"
                f"{account * (scheme_of(self.address) == 'az')}"
            ) from None

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return a whole object.

        Args:
            name: Path of the object in the folder.
            most_bytes: Largest size; a larger object is refused before its bytes are read.

        Raises:
            FileNotFoundError: There is no such object.
            StorageError: It cannot be read, or is larger.
        """

        def whole() -> bytes:
            result = obstore.get(self._store, self._prefix + name)
            if (size := result.meta["size"]) > most_bytes:
                raise StorageError(f"{self}/{name} has {size:,} bytes, and at most {most_bytes:,} are read there")
            return result.bytes().to_bytes()

        return self._ask(name, "read", whole, tries=_READ_TRIES)

    def read_range(self, name: str, start: int, stop: int) -> Bytes:
        """Return the bytes of an object from `start` to before `stop`.

        Raises:
            FileNotFoundError: There is no such object.
            StorageError: It cannot be read, or has other bytes there than were asked for.
        """
        found = self._ask(name, "read", partial(self._range, name, start, stop), tries=_READ_TRIES)
        part = np.frombuffer(memoryview(found), np.uint8)
        if len(part) != stop - start:
            raise StorageError(
                f"{self}/{name} was asked for bytes {start:,} to {stop:,}, and {len(part):,} came: the object is cut "
                "short, or the server does not answer requests for ranges"
            )
        return part

    def read_start(self, name: str, most_bytes: int) -> bytes:
        """Return the first bytes of an object, or all of it if it has fewer; raises as `read_range`."""
        found = self._ask(name, "read", partial(self._range, name, 0, most_bytes), tries=_READ_TRIES)
        return memoryview(found).tobytes()

    def _range(self, name: str, start: int, stop: int) -> obstore.Bytes | bytes:
        if scheme_of(self.address) not in ("http", "https"):
            return obstore.get_range(self._store, self._prefix + name, start=start, end=stop)
        # A web server may be anybody's: obstore alone would take whatever it sends into memory.
        answer = obstore.get(self._store, self._prefix + name, options={"range": (start, stop)})
        parts, n_bytes = [], 0
        for part in answer.stream(min_chunk_size=stop - start):
            parts.append(part)
            n_bytes += len(part)
            if n_bytes > stop - start:
                raise StorageError(
                    f"{self}/{name} was asked for bytes {start:,} to {stop:,}, and more came: this server does not "
                    "answer requests for ranges as it should"
                )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self, name: str) -> int | None:
        """Return the bytes of an object, None if there is none.

        Raises:
            StorageError: The server does not say.
        """
        try:
            n_bytes: int = self._ask(name, "look at", lambda: obstore.head(self._store, self._prefix + name))["size"]
        except FileNotFoundError:
            return None
        return n_bytes

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """Yield all objects below the folder `prefix`, in the order of their names.

        Raises:
            StorageError: The folder cannot be listed; web servers and the Hub's files cannot.
        """
        pages: Iterator[Any] | None = None
        last: str | None = None

        def following() -> Any:
            nonlocal pages
            asked, pages = pages, None  # after an answer that breaks off, the listing is asked for again behind `last`
            asked = asked or iter(
                obstore.list(self._store, self._prefix + prefix or None, offset=last, chunk_size=1000)
            )
            page = next(asked, None)
            pages = asked
            return page

        while (page := self._ask(prefix, "list", following, tries=_READ_TRIES)) is not None:
            for entry in page:
                yield Listed(entry["path"].removeprefix(self._prefix), entry["size"])
                last = entry["path"]

    def write(self, name: str, data: Path | Iterable[Any]) -> None:
        """Write an object, over what is there: completely, or not at all.

        Args:
            name: Path of the object in the folder.
            data: A local file, or buffers one after the other; one buffer is not copied.

        Raises:
            StorageError: It cannot be written.
        """
        content: Any = data
        if not isinstance(data, Path):
            buffers = list(data)
            content = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        in_parts = None if isinstance(data, Path) else False  # a large file in parts

        def put() -> object:
            return obstore.put(self._store, self._prefix + name, content, use_multipart=in_parts)

        conflict: OSError | None = None
        for number in range(_CREATE_TRIES):
            try:
                self._ask(name, "write", put)
            except FileExistsError as error:  # 409: two requests met, of which one may be a try of this one
                conflict = error
                time.sleep(_PAUSE_SECONDS * 2**number)
            else:
                return
        raise StorageError(f"cannot write {self}/{name}: the server reports a conflict each time") from conflict

    def write_parts(self, name: str, buffers: Iterable[Any], *, part_bytes: int, n_parts: int) -> None:
        """Write an object in parts while its buffers are made: completely, or not at all.

        Args:
            name: Path of the object in the folder.
            buffers: Buffers one after the other; none may change before the object is written.
            part_bytes: Bytes of a part; S3 takes 5 MiB and more.
            n_parts: Parts that are under way at once.

        Raises:
            StorageError: It cannot be written.
        """

        def put() -> object:
            return obstore.put(
                self._store,
                self._prefix + name,
                iter(buffers),
                use_multipart=True,
                chunk_size=part_bytes,
                max_concurrency=n_parts,
            )

        self._ask(name, "write", put)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one; return False if the same is there already.

        Raises:
            FileExistsError: There is an object of that name with other bytes; it stays as it is.
            StorageError: It cannot be written.
        """
        return self._put_once(name, data, "create")

    def read_tagged(self, name: str, most_bytes: int) -> "tuple[bytes, UpdateVersion]":
        """Return a whole object, as `read` does, and what tells its version from others, for `replace`."""

        def whole() -> "tuple[bytes, UpdateVersion]":
            result = obstore.get(self._store, self._prefix + name)
            meta = result.meta
            if meta["size"] > most_bytes:
                raise StorageError(f"{self}/{name} has {meta['size']:,} bytes, and at most {most_bytes:,} are read")
            found: UpdateVersion = {}
            if meta["e_tag"] is not None:
                found["e_tag"] = meta["e_tag"]
            if meta["version"] is not None:
                found["version"] = meta["version"]
            return result.bytes().to_bytes(), found

        return self._ask(name, "read", whole, tries=_READ_TRIES)

    def replace(self, name: str, data: bytes, version: "UpdateVersion") -> None:
        """Write an object over the version of it that `read_tagged` returned, and over no other.

        Where the service has no such condition, what is there is replaced.

        Raises:
            FileExistsError: It was changed or removed since.
            StorageError: It cannot be written.
        """
        try:
            self._put_once(name, data, version)
        except _UnsupportedError:
            self.write(name, [data])

    def _put_once(self, name: str, data: bytes, mode: "PutMode") -> bool:
        """Write an object on a condition; return False if it had these bytes when the condition failed."""
        failure: OSError | None = None
        for number in range(_CREATE_TRIES):
            try:
                self._ask(name, "write", lambda: obstore.put(self._store, self._prefix + name, data, mode=mode))
            except (DeniedError, _UnsupportedError, _NoBucketError):
                raise
            except (FileExistsError, StorageError) as error:  # the answer may be lost, and not what was sent
                failure = error
            else:
                return True
            size = self.size(name)
            if size == len(data) and self.read(name, len(data)) == data:
                return False
            if isinstance(failure, FileExistsError) and (size is not None or mode != "create"):
                raise FileExistsError(f"{self}/{name} exists already with other content, and is not overwritten")
            time.sleep(_PAUSE_SECONDS * 2**number)
        raise StorageError(f"cannot write {self}/{name}, in {_CREATE_TRIES} tries: {failure}") from failure

    def copy(self, source: str, name: str) -> None:
        """Copy an object of the folder to another name, over what is there, without fetching it.

        Raises:
            FileNotFoundError: There is no such object.
            StorageError: It cannot be copied.
        """

        def copy() -> None:
            obstore.copy(self._store, self._prefix + source, self._prefix + name)

        self._ask(source, "copy", copy, tries=_READ_TRIES)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are not there are no error.

        Raises:
            StorageError: One cannot be deleted.
        """
        try:
            self._ask("", "delete from", lambda: obstore.delete(self._store, [self._prefix + name for name in names]))
        except _NoBucketError:
            raise
        except FileNotFoundError:  # of one of them, in services that say so; others may be left
            for name in names:
                with suppress(FileNotFoundError):
                    self._ask(name, "delete", partial(obstore.delete, self._store, self._prefix + name))

    def _ask(self, name: str, doing: str, request: Callable[[], T], tries: int = 1) -> T:
        """Make a request, and say what went wrong in the user's words.

        obstore tries again what failed before the answer began. `tries` are for answers that broke off.
        """
        try:
            return request()
        except ResiduaError:  # also of what makes the bytes that are written
            raise
        except _FAILURES as error:
            if tries > 1 and _BROKE_OFF in str(error):
                return self._ask(name, doing, request, tries - 1)
            raise self._explained(error, doing, f"{self}/{name}" if name else str(self)) from None

    def _explained(self, error: BaseException, doing: str, where: str) -> OSError:
        """Return the error to raise for one of obstore's."""
        if _code_of(error) in _NO_BUCKET_CODES:
            return _NoBucketError(
                f"cannot {doing} {where}: there is no bucket {urlsplit(self.address).netloc}. Check its name, and the "
                "endpoint, region or account in storage_options; Residua makes no buckets"
            )
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"there is no {where}")
        if isinstance(error, _EXISTS):
            return FileExistsError(f"{where} exists already")
        if _wants_login(error):
            return DeniedError(
                f"cannot {doing} {where}: no credentials were found. {_REMEDY}; for a bucket that everybody may read, "
                "give skip_signature=True there"
            )
        if _is_refused(error):
            return DeniedError(f"cannot {doing} {where}: it is not allowed ({_said(error)}). {_REMEDY}")
        if isinstance(error, failures.NotSupportedError):
            return _UnsupportedError(f"cannot {doing} {where}: {_NOT_SUPPORTED.get(doing, 'it cannot do that')}")
        return StorageError(f"cannot {doing} {where}: {_said(error)}")


def _frozen(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        sorted((key, _frozen(value) if isinstance(value, Mapping) else value) for key, value in options.items())
    )


def _thawed(options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {key: _thawed(value) if isinstance(value, tuple) else value for key, value in options}


def _connection(address: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the store of an address."""
    client = {**_CLIENT, **options.get("client_options", {})}
    said = (options.get(name, os.environ.get(name)) for name in _ENDPOINTS.get(scheme_of(address), ()))
    place = next((place for place in said if place is not None), address)
    if str(place).startswith("http://"):
        client.setdefault("allow_http", True)
    return {**options, "client_options": client, "retry_config": {**_RETRY, **options.get("retry_config", {})}}


def _credentials() -> tuple[tuple[str, str], ...]:
    """Return what stores read from the environment, so that a store is made again when it changes."""
    return tuple((name, os.environ[name]) for name in sorted(os.environ) if name.startswith(_CREDENTIALS))


def _bucket_and_prefix(address: str) -> tuple[str, str]:
    """Return the address of the store to ask, and how the paths of objects begin there.

    A store takes 10 ms to make, and opens connections of its own, so one serves a bucket. Where a path has characters
    that addresses write in another way, or on a web server, the store is at the address itself.
    """
    parts = urlsplit(address)
    if parts.scheme not in _ENDPOINTS or parts.query or not _PLAIN_PATH.fullmatch(parts.path):
        return address, ""
    return f"{parts.scheme}://{parts.netloc}", f"{parts.path[1:]}/".lstrip("/")


@lru_cache(maxsize=64)
def _store_at(
    url: str, settings: tuple[tuple[str, Any], ...], _credentials: tuple[tuple[str, str], ...]
) -> ObjectStore:
    """Return the store of a URL; it is kept, for each opens its own connections."""
    open_ = HTTPStore.from_url if scheme_of(url) in ("http", "https") else from_url
    return open_(url, **_thawed(settings))


def _is_refused(error: BaseException) -> bool:
    """Say whether a service does not allow it, also with an answer that obstore has no class for."""
    if isinstance(error, _DENIED) or _code_of(error) in _REFUSED_CODES:
        return True
    return _status_of(error)[:3] in _REFUSED_STATUS


def _wants_login(error: BaseException) -> bool:
    """Say whether a request failed because the machine that it was made on has no credentials to offer."""
    return any(source in str(error).partition("\n")[0] for source in _LOGIN_SOURCES)


def _status_of(error: BaseException) -> str:
    found = _STATUS.search(str(error))
    return found[1].strip() if found else ""


def _code_of(error: BaseException) -> str:
    found = _CODE.search(str(error))
    return found[1] if found else ""


def _said(error: BaseException) -> str:
    """Return what a server said, without what obstore adds for debugging and without anything secret."""
    text = str(error)
    if status := _status_of(error):
        return ", ".join(["the server answered " + status, *filter(None, [_code_of(error)])])
    return shown_in(text.splitlines()[0].strip() if text else type(error).__name__)


def shown_in(text: str) -> str:
    """Return a message without the queries and passwords of the addresses in it."""
    return re.sub(r"[a-z]+://\S+", lambda found: shown(found[0]), text)


def in_parallel(work: Callable[[T], R], items: Sequence[T], *, n_at_once: int = 16) -> list[R]:
    """Return the results of `work` for all items, several at once; after a failure no other item is begun."""
    with ThreadPoolExecutor(n_at_once, thread_name_prefix="residua-objects") as pool:
        jobs = [pool.submit(work, item) for item in items]
        wait(jobs, return_when=FIRST_EXCEPTION)
        failed = next((job for job in jobs if job.done() and job.exception()), None)
        if failed is not None:
            for job in jobs:
                job.cancel()
            failed.result()
    return [job.result() for job in jobs]
