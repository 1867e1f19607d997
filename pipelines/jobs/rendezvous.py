"""How the workers of a job find each other, and which run may write an archive or a folder of results.

Workers are launched together (by torchrun, accelerate or SLURM, or in the user's own script with a process group), or
they join a run: the lock next to the archive, or the lease in its bucket, names the store of the run that holds it.
Among workers that are launched together, worker 0 holds the lock.
"""

import hashlib
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from residua.capture.runtime.compat import PrefixStore, Store, TCPStore, default_store
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
from residua.store.base.naming import named
from residua.store.storage.destination import Destination, destination_of
from residua.store.storage.lock import ArchiveInUseError

_LOCAL = ("localhost", "127.0.0.1", "::1")
_jobs: Counter[str] = Counter()
_calls: Counter[str] = Counter()


@contextmanager
def rendezvous(out: Path | Destination | None, *, join: bool, job: str = "") -> Iterator[Membership | None]:
    """Yield this worker's place among those that make `out` together; None if it is alone and stays alone.

    Args:
        out: Where the results go; None if nothing is written.
        join: Whether to join a run that is writing it, and to let others join this run.
        job: What tells the job from others of the launch, beside the folder: the same on every rank.

    Raises:
        ArchiveInUseError: Another run is writing it, and `join` is False or that run cannot be joined.
        CaptureError: The other workers do not appear, or name another folder in the same call of a program, or the run
            to join does not answer.
    """
    launch, address = _launch(f"{job} {out or ''}")
    with ExitStack() as stack:
        membership = None
        if launch is not None:
            call = _Call(launch, f"{out or job}")
            call.require_same()
            membership = _launched_together(out, launch, address, join, stack, call)
        elif out is not None and join:
            membership = _alone_or_joining(out, stack)
        elif out is not None:
            stack.enter_context(destination_of(out).locked())
        if membership is not None:
            stack.enter_context(membership)
            _tell_lease(out, membership, stack)
        yield membership


def _tell_lease(out: Path | Destination | None, membership: Membership, stack: ExitStack) -> None:
    """Let all workers write only as long as worker 0 holds its lease, if it has one."""
    if out is None:
        return
    place = destination_of(out)
    if membership.number == 0:
        membership.publish("lease", {"lease": place.lease})
    else:
        found = membership.await_message("lease", patience=START_SECONDS)
        stack.enter_context(place.following(found["lease"]))


class _Call:
    """One call of the program that asks for a job, as the processes of a launch see it.

    The same lines of a program, reached for the same time, are the same call on every rank. A job of rank 0 alone is
    another call than the next one, for which the others wait already.

    Args:
        launch: The processes; the store under its own prefix may differ between them, so calls are kept above it.
        what: The folder, or else the job.
    """

    def __init__(self, launch: Launch, what: str) -> None:
        place = _lines_of_callers()
        self._launch = launch
        self._name = f"{place}/{_calls[place]}"
        self._what = what
        _calls[place] += 1
        launch.calls.set(f"{self._name}/{launch.rank}", what)

    def require_same(self) -> None:
        """Raise CaptureError if another process of the launch makes the same call for something else."""
        for rank in range(self._launch.n_launched):
            name = f"{self._name}/{rank}"
            if not self._launch.calls.check([name]):
                continue
            other = self._launch.calls.get(name).decode()
            if other != self._what:
                raise CaptureError(
                    f"processes that were launched together make one result, and in one call rank {rank} names "
                    f"{other}, and rank {self._launch.rank} {self._what}: give the same {named('out')} on all of them"
                )


def _lines_of_callers() -> str:
    """Return a digest of the lines that are being called, of all modules up to the program."""
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _launch(job: str) -> tuple[Launch | None, Mapping[str, Json] | None]:
    """Return the processes that were launched together, and where other runs can reach their store, if they can."""
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            return None, None
        store = default_store()
        return _launch_of(store, _prefix(job), dist.get_rank(), dist.get_world_size()), None
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None, None
    try:
        store, rank, n = next(torch_rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
    except dist.DistError as error:
        raise CaptureError(f"the processes that were launched together did not find each other: {error}") from error
    store.set_timeout(timedelta(seconds=LOST_SECONDS))
    prefix = _prefix(job)
    address = _address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), prefix, n)
    return _launch_of(store, prefix, rank, n), address


def _launch_of(store: Store, prefix: str, rank: int, n: int) -> Launch:
    return Launch(PrefixStore(prefix, store), rank, n, PrefixStore(f"residua/{_attempt()}/calls", store))


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps one store for all its attempts


def _prefix(job: str) -> str:
    """Return the prefix of a job's keys in the launcher's store.

    Ranks meet by what the job is and how often they have run it, so a job that only some of them run, such as a capture
    by rank 0 alone, does not mix up the next one. A job of one process alone does not count, since other processes may
    have none.
    """
    number = _jobs[job]
    _jobs[job] += 1
    return f"residua/{_attempt()}/{hashlib.sha256(job.encode()).hexdigest()[:16]}/{number}"


def _address(host: str, port: int, prefix: str, n: int) -> dict[str, Json]:
    """Return how other runs reach a store, as the lock of an archive records it."""
    return {"host": host, "port": port, "prefix": prefix, "n": n}


def _alone_or_joining(out: Path | Destination, stack: ExitStack) -> Membership:
    """Host a store that other runs can join; if another run holds the lock, join that run instead."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LOST_SECONDS))
    prefix = "residua/alone"  # the store serves this job only
    owner, refusal = _lock(out, _address(socket.gethostname(), store.port, prefix, 1), join=True, stack=stack)
    if refusal is not None:
        raise refusal
    return _join(owner) if owner else Membership(PrefixStore(prefix, store), 0, 1)


def _launched_together(
    out: Path | Destination | None,
    launch: Launch,
    address: Mapping[str, Json] | None,
    join: bool,
    stack: ExitStack,
    call: _Call,
) -> Membership:
    """Let worker 0 take the lock, or find the run that all of them join."""
    membership = Membership(launch.store, launch.rank, launch.n_launched, launch=launch)
    if launch.rank == 0:
        owner, refusal = (None, None) if out is None else _lock(out, address, join=join, stack=stack)
        membership.publish("lock", {"refused": None if refusal is None else str(refusal), "address": owner})
        if refusal is not None:
            _await_readers(launch)
            raise refusal
    else:
        found = membership.await_message("lock", patience=START_SECONDS, check=call.require_same)
        if found["refused"]:
            membership.publish(f"read/{launch.rank}", {})
            raise CaptureError(found["refused"])
        owner = found["address"]
    return _join(owner, launch) if owner else membership


def _lock(
    out: Path | Destination, address: Mapping[str, Json] | None, *, join: bool, stack: ExitStack
) -> tuple[Mapping[str, Any] | None, ArchiveInUseError | None]:
    """Take the lock; else return the address of the run that holds it, or why that run cannot be joined.

    Args:
        out: Where the results go.
        address: Where other runs can join this one.
        join: Whether to join a run that holds the lock.
        stack: Holds the lock.
    """
    try:
        stack.enter_context(destination_of(out).locked(join=address))
    except ArchiveInUseError as error:
        owner = error.owner
        if not join or owner is None or not owner.join:
            return None, error
        host, is_here = owner.join["host"], owner.host == socket.gethostname()
        if host in _LOCAL and not is_here:
            return None, error
        return {**owner.join, "host": "localhost" if is_here else host}, None
    return None, None


def _await_readers(launch: Launch) -> None:
    """Give the other workers a little time to read a message: the store may end with this process."""
    deadline = time.monotonic() + EXIT_GRACE_SECONDS
    keys = [f"read/{rank}" for rank in range(1, launch.n_launched)]
    while not launch.store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.05)


def _join(address: Mapping[str, Any], launch: Launch | None = None) -> Membership:
    try:
        store = TCPStore(
            address["host"], int(address["port"]), is_master=False, timeout=timedelta(seconds=LOST_SECONDS)
        )
    except dist.DistError as error:
        raise CaptureError(
            f"the run to join, at {address['host']}:{address['port']}, does not answer: {error}"
        ) from error
    common, n_launched = PrefixStore(address["prefix"], store), int(address["n"])
    return Membership(common, number_of_late_worker(common, n_launched), n_launched, launch=launch)
