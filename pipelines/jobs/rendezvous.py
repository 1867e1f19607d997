"""How the workers of a job find each other, and who may be at work on an archive or a folder of results.

Workers are launched together (torchrun, accelerate, SLURM, or the user's own script with a process group), or they
join: the lock beside the archive says where the run that holds it keeps its store. Worker 0 of those launched
together holds the lock.
"""

import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from residua.capture.scheduling.membership import (
    EXIT_GRACE_SECONDS,
    LOST_SECONDS,
    START_SECONDS,
    Launch,
    Membership,
    number_of_late_worker,
)
from residua.store.base.canonical import Json
from residua.store.base.errors import CaptureError
from residua.store.storage.lock import ArchiveInUseError, Owner, locked

_LOCAL = ("localhost", "127.0.0.1", "::1")
_jobs = itertools.count()


class _Launch(NamedTuple):
    """Processes that were launched together, as one of them sees them."""

    store: Store
    rank: int
    n: int
    address: Mapping[str, Json] | None


@contextmanager
def meeting(out: Path | None, *, join: bool) -> Iterator[Membership | None]:
    """Yield this worker's place among those who make `out` together; None if it is alone and stays so.

    Args:
        out: Folder of what is made; None where nothing is written that another run could be at work on.
        join: Whether to join a run that is at work on it, and to let others join this one.

    Raises:
        ArchiveInUseError: Another run is at work on it, and is not to be joined or cannot be.
        CaptureError: The others do not appear, or have no place for this one.
    """
    launch = _launch()
    with ExitStack() as stack:
        if launch is None and not join:
            if out is not None:
                stack.enter_context(locked(out))
            yield None
        elif launch is None and out is not None:
            yield _alone_or_joining(out, stack)
        elif launch is not None:
            yield _together(out, launch, join, stack)


def _prefix() -> str:
    """Return where the next job that was launched together keeps its things in the store: the same on all ranks.

    A job of one process alone does not count, since the others may have none.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps one store for all its attempts
    return f"residua/{attempt}/{next(_jobs)}"


def _launch() -> _Launch | None:
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            return None
        store = PrefixStore(_prefix(), _get_default_store())
        return _Launch(store, dist.get_rank(), dist.get_world_size(), None)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    try:
        store, rank, n = next(rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
    except dist.DistError as error:
        raise CaptureError(f"the processes that were launched together did not meet: {error}") from error
    store.set_timeout(timedelta(seconds=LOST_SECONDS))
    prefix = _prefix()
    address: dict[str, Json] = {
        "host": os.environ["MASTER_ADDR"],
        "port": int(os.environ["MASTER_PORT"]),
        "prefix": prefix,
        "n": n,
    }
    return _Launch(PrefixStore(prefix, store), rank, n, address)


def _alone_or_joining(out: Path, stack: ExitStack) -> Membership:
    """Keep a store that others can join; or join the run that is there."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LOST_SECONDS))
    prefix = "residua/alone"  # the store is this capture's own
    address: dict[str, Json] = {"host": socket.gethostname(), "port": store.port, "prefix": prefix, "n": 1}
    try:
        stack.enter_context(locked(out, join=address))
    except ArchiveInUseError as error:
        return _joining(_address(error))
    return Membership(PrefixStore(prefix, store), 0, 1)


def _together(out: Path | None, launch: _Launch, join: bool, stack: ExitStack) -> Membership:
    """Let the first of those launched together take the lock, or find where all of them join."""
    launched = Launch(launch.store, launch.rank, launch.n)
    membership = Membership(launch.store, launch.rank, launch.n, launch=launched)
    if launch.rank == 0:
        address, refusal = _lock_or_address(out, launch, join, stack)
        membership.publish("lock", {"refused": None if refusal is None else str(refusal), "address": address})
        if refusal is not None:
            _await_readers(launch)
            raise refusal
        return _joining(address, launched) if address else membership
    found = membership.await_message("lock", patience=START_SECONDS)
    if found["refused"]:
        membership.publish(f"read/{launch.rank}", {})
        raise CaptureError(found["refused"])
    return _joining(found["address"], launched) if found["address"] else membership


def _lock_or_address(
    out: Path | None, launch: _Launch, join: bool, stack: ExitStack
) -> tuple[Mapping[str, Any] | None, ArchiveInUseError | None]:
    """Take the lock; else return where the run that has it can be joined, or why that is not to be."""
    if out is None:
        return None, None
    try:
        stack.enter_context(locked(out, join=launch.address))
    except ArchiveInUseError as error:
        try:
            return (_address(error), None) if join else (None, error)
        except ArchiveInUseError:
            return None, error
    return None, None


def _await_readers(launch: _Launch) -> None:
    """Give the others a little time to read a message: the store may go with this process."""
    deadline = time.monotonic() + EXIT_GRACE_SECONDS
    keys = [f"read/{rank}" for rank in range(1, launch.n)]
    while not launch.store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.05)


def _address(error: ArchiveInUseError) -> Mapping[str, Any]:
    """Return where the run that holds the archive can be joined, or raise `error` again."""
    owner: Owner | None = error.owner
    if owner is None or not owner.join:
        raise error
    host = owner.join["host"]
    is_here = owner.host == socket.gethostname()
    if host in _LOCAL and not is_here:
        raise error
    return {**owner.join, "host": "localhost" if is_here else host}


def _joining(address: Mapping[str, Any], launched: Launch | None = None) -> Membership:
    try:
        store = TCPStore(
            address["host"], int(address["port"]), is_master=False, timeout=timedelta(seconds=LOST_SECONDS)
        )
    except dist.DistError as error:
        raise CaptureError(
            f"the run to join, at {address['host']}:{address['port']}, does not answer: {error}"
        ) from error
    common, n_launched = PrefixStore(address["prefix"], store), int(address["n"])
    return Membership(common, number_of_late_worker(common, n_launched), n_launched, launch=launched)
