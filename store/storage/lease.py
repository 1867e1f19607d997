"""One run at a time in a bucket: a lease, which takes the place of a file lock.

The lease is a small object, `.residua-lease.json`, created only if it is absent. Its holder writes it again every few
seconds. Another run watches it: a lease that does not change for `LeaseTimes.expire` has expired, whatever the clocks
of the two machines say, and one whose process is gone from this machine has ended at once. Who takes over, or renews,
writes over the version that it has read, and over no other, where the service has that condition; of two that do so
at once, one wins. A holder that finds another's name stops: `check` is asked before each write. So do the workers that
share its work, which look at the lease now and then (`LeaseWatch`).
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from residua.store.base.canonical import Json
from residua.store.base.errors import StorageError
from residua.store.storage.lock import ArchiveInUseError, in_use_advice, is_alive, owner_of
from residua.store.storage.objects import ObjectFolder

if TYPE_CHECKING:
    from obstore import UpdateVersion

LEASE = ".residua-lease.json"
_MAX_BYTES = 64 * 1024


class LeaseTimes(NamedTuple):
    """The times of a lease, in seconds; all runs of an archive need the same.

    Attributes:
        expire: A lease that was not renewed for so long has ended.
        renew: Its holder renews it after so long, and its workers look at it as often.
        poll: Between two looks of a run that waits for it.
    """

    expire: float = 30.0
    renew: float = 10.0
    poll: float = 0.5


USUAL_TIMES = LeaseTimes()


class Lease:
    """The lease on a folder in a bucket, held by this process.

    Args:
        folder: The folder.
        join: What another run needs to join this one.
        times: When it expires and is renewed.

    Attributes:
        token: What tells this lease from others.
    """

    def __init__(self, folder: ObjectFolder, join: Mapping[str, Json] | None, times: LeaseTimes = USUAL_TIMES) -> None:
        self._folder = folder
        self._times = times
        self._values: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "join": None if join is None else dict(join),
            "machine": _machine(),
            "started": _started(os.getpid()),
            "token": secrets.token_hex(8),
        }
        self.token: str = self._values["token"]
        self._n_renewed = 0
        self._version: UpdateVersion = {}
        self._renewed_at = 0.0
        self._lost = ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="residua-lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease; wait as long as another one may have expired.

        Raises:
            ArchiveInUseError: Another run holds it.
            StorageError: The bucket cannot be read or written.
        """
        first = b""
        since = time.monotonic()
        while True:
            data = self._data()
            with suppress(FileExistsError):
                self._folder.create(LEASE, data)
                break
            try:
                found, version = self._folder.read_tagged(LEASE, _MAX_BYTES)
            except FileNotFoundError:
                continue
            owner, values = owner_of(found), _values(found)
            if owner is None or _is_gone(values) or (found == first and time.monotonic() - since > self._times.expire):
                with suppress(FileExistsError):
                    self._folder.replace(LEASE, data, version)
                    break
            elif _is_here(values) or (first and found != first):
                raise ArchiveInUseError(str(self._folder), owner, in_use_advice())
            first = first or found
            time.sleep(self._times.poll)
        self._adopt()
        self._thread.start()

    def release(self) -> None:
        """End the lease, if it is still held; a bucket that does not answer keeps it until it expires."""
        self._stop.set()
        self._thread.join()
        with suppress(StorageError, FileNotFoundError):
            if not self._lost and self._is_mine(self._folder.read(LEASE, _MAX_BYTES)):
                self._folder.delete([LEASE])

    def check(self) -> None:
        """Return if this process holds the lease; renew it first if it may have expired.

        Raises:
            StorageError: Another run has taken over, or the bucket does not answer.
        """
        if not self._lost and time.monotonic() - self._renewed_at > self._times.expire:
            self._renew()
        if self._lost:
            raise StorageError(self._lost)

    def _keep(self) -> None:
        while not self._lost and not self._stop.wait(self._times.renew):
            with suppress(StorageError):  # it is tried again; `check` says so where it matters
                self._renew()

    def _renew(self) -> None:
        with self._lock:
            self._n_renewed += 1
            try:
                self._require_mine()
                self._folder.replace(LEASE, self._data(), self._version)
                self._adopt()
            except FileExistsError:
                self._require_mine()

    def _require_mine(self) -> None:
        """Read the lease again; note the loss if it is not this process's."""
        with suppress(FileNotFoundError):
            found, self._version = self._folder.read_tagged(LEASE, _MAX_BYTES)
            if self._is_mine(found):
                return
        self._lost = _lost(self._folder, self._times)
        raise StorageError(self._lost)

    def _adopt(self) -> None:
        found, self._version = self._folder.read_tagged(LEASE, _MAX_BYTES)
        if self._is_mine(found):
            self._renewed_at = time.monotonic()

    def _is_mine(self, found: bytes) -> bool:
        return bool(_values(found).get("token") == self.token)

    def _data(self) -> bytes:
        return json.dumps({**self._values, "renewed": self._n_renewed}).encode()


class LeaseWatch:
    """The lease of the run that this process works for, and that another process holds.

    Args:
        folder: The folder.
        token: The lease's.
        times: Its times.
    """

    def __init__(self, folder: ObjectFolder, token: str, times: LeaseTimes = USUAL_TIMES) -> None:
        self._folder = folder
        self._times = times
        self._token = token
        self._seen_at = -inf
        self._lock = threading.Lock()

    def check(self) -> None:
        """Return if the lease is held, as far as is known for `LeaseTimes.renew`.

        Raises:
            StorageError: Another run has taken over, or the bucket does not answer.
        """
        with self._lock:
            if time.monotonic() - self._seen_at <= self._times.renew:
                return
            found = b""
            with suppress(FileNotFoundError):
                found = self._folder.read(LEASE, _MAX_BYTES)
            if _values(found).get("token") != self._token:
                raise StorageError(_lost(self._folder, self._times))
            self._seen_at = time.monotonic()


@contextmanager
def leased(
    folder: ObjectFolder, *, join: Mapping[str, Json] | None = None, times: LeaseTimes = USUAL_TIMES
) -> Iterator[Lease]:
    """Hold the lease on a folder in a bucket inside the `with` block.

    Args:
        folder: The folder; nothing need be there.
        join: What another run needs to join this one.
        times: When the lease expires and is renewed.

    Raises:
        ArchiveInUseError: Another run holds the lease.
        StorageError: The bucket cannot be read or written.
    """
    lease = Lease(folder, join, times)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def _lost(folder: ObjectFolder, times: LeaseTimes) -> str:
    """Return the message for a run whose lease is another's, or gone."""
    owner = None
    with suppress(FileNotFoundError, StorageError):
        owner = owner_of(folder.read(LEASE, _MAX_BYTES))
    who = f" ({owner})" if owner else ""
    return (
        f"another run{who} has taken over {folder}, or {LEASE} was removed there; a lease that is not renewed for "
        f"{times.expire:.0f} s ends. So this run stops. What was committed before is safe"
    )


def _values(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _is_here(values: Mapping[str, Any]) -> bool:
    """Say whether the holder is a process of this machine; one whose machine is not known is not."""
    return bool(_machine()) and values.get("machine") == _machine()


def _is_gone(values: Mapping[str, Any]) -> bool:
    """Say whether the holder was a process of this machine that has ended."""
    pid = values.get("pid")
    if not _is_here(values) or not isinstance(pid, int):
        return False
    return not is_alive(pid) or _started(pid) != values.get("started")


def _machine() -> str:
    """Return what tells this machine since it was started, and its process numbers, from others; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115  # not a path
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process of this machine started, in the kernel's ticks: numbers are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
