"""Membership of one worker in a job: who else is there, how far the others are, and who is lost.

Workers exchange messages through a c10d key-value store, which needs no process group and no collective. Each worker
writes its status to the store once a second; this heartbeat shows the others that it lives. The store holds nothing
that a capture needs to keep: the commit records on the disk say which shards are done.

A worker is lost when its heartbeat was last seen more than `LOST_SECONDS` ago. If the store host (the process that
runs the store) dies, the other workers notice within two heartbeats, and every method here raises CaptureError.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf
from types import TracebackType
from typing import Any, NamedTuple, Self

from torch.distributed import DistError

from residua.capture.runtime.compat import Store
from residua.store.base.errors import CaptureError

HEARTBEAT_SECONDS = 1.0
LOST_SECONDS = 30.0  # a worker without a heartbeat for this long is lost
START_SECONDS = 600.0  # time for the others to appear: they may be loading a large model
EXIT_GRACE_SECONDS = 5.0  # time for the others to read the failure reason before the store host exits
_POLL_SECONDS = 0.1


def number_of_late_worker(store: Store, n_launched: int) -> int:
    """Return the number of a worker that joins those that were launched together."""
    return n_launched - 1 + store.add("joined", 1)


class Launch(NamedTuple):
    """Processes that were launched together, as one of them sees them; late workers may join the job.

    `store` is that of the job, and `calls` one for all jobs of the launch.
    """

    store: Store
    rank: int
    n_launched: int
    calls: Store


class Membership:
    """This worker's membership in a job; a context manager that sends heartbeats inside.

    Args:
        store: The store that all workers of this job share; no other job uses it.
        number: This worker's number. Worker 0 makes the plan, shows the progress and finishes the job.
        n_launched: Number of workers that were launched together; late workers may join.
        lost_seconds: Time without a heartbeat after which a worker counts as lost, in seconds.
        launch: The processes that this one was launched with; None if it was launched alone.
    """

    def __init__(
        self,
        store: Store,
        number: int,
        n_launched: int,
        *,
        lost_seconds: float = LOST_SECONDS,
        launch: Launch | None = None,
    ) -> None:
        self.number = number
        self.n_launched = n_launched
        self.launch = launch
        self.lost_seconds = lost_seconds
        self._store = store
        self._token = secrets.token_hex(8)
        self._status: dict[str, Any] = {
            "worker": number,
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "state": "working",
        }
        self._n_heartbeats = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._send_heartbeats, name="residua-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._heartbeat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is not None and self._failure is None:
            self._status |= {"state": "left", "why": str(error) or type(error).__name__}
            with suppress(CaptureError):  # the error that ends this context says more
                self._heartbeat()
                if self.number == 0:  # this process may be the store host: let the others read the failure reason
                    self.await_others("done", "left", "closed", seconds=EXIT_GRACE_SECONDS)

    def report(self, **status: Any) -> None:
        """Add `status` to what the next heartbeat tells the others.

        Raises:
            CaptureError: The store does not answer.
        """
        if self._failure is not None:
            raise _no_store(self._failure)
        with self._lock:
            self._status |= status

    def report_now(self, **status: Any) -> None:
        """Send a heartbeat with `status` at once."""
        self.report(**status)
        self._heartbeat()

    def publish(self, name: str, message: Mapping[str, Any]) -> None:
        """Publish a message under a name."""
        self._call(self._store.set, name, json.dumps(message))

    def message(self, name: str) -> dict[str, Any] | None:
        """Return the message that was published under `name`; None if there is none."""
        if not self._call(self._store.check, [name]):
            return None
        message: dict[str, Any] = json.loads(self._call(self._store.get, name))
        return message

    def drop(self, name: str) -> None:
        """Delete what was published under `name`."""
        self._call(self._store.delete_key, name)

    def await_message(self, name: str, *, patience: float, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Wait for the message that worker 0 publishes under `name`, and return it.

        Args:
            name: Name of the message.
            patience: Time that worker 0 may take to appear, in seconds. Once it has appeared, the wait ends only with
                the message or with worker 0.
            check: Called meanwhile; what it raises ends the wait.

        Raises:
            CaptureError: Worker 0 is lost, has left, or did not appear.
        """
        started = time.monotonic()
        while (message := self.message(name)) is None:
            status = self.status(0)
            if status is None and time.monotonic() - started > patience:
                raise CaptureError(f"worker 0 did not appear within {patience:.0f} s: see its own messages")
            if status is not None and self.is_gone(0) and (message := self.message(name)) is None:
                raise CaptureError(self.failure_reason(0))
            check()
            time.sleep(_POLL_SECONDS)
        return message

    def once(self, name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Let worker 0 call `make`, and return its message on every worker.

        Raises:
            CaptureError: Worker 0 is lost, has left, or did not appear.
        """
        if self.number:
            return self.await_message(name, patience=START_SECONDS)
        message = make()
        self.publish(name, message)
        return message

    def finish(self, close: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Wait until every worker is done, let worker 0 call `close`, and return its message on every worker.

        Raises:
            CaptureError: Worker 0 is gone.
        """
        self.report_now(state="done")
        if self.number == 0:
            self.await_others("done")
        message = self.once("closed", close)
        self.report_now(state="closed")
        if self.number == 0:
            self.await_others("closed")  # this process may be the store host
        return message

    def unfinished(self) -> str:
        """Name the workers that ended before they were done, for a message."""
        lost = [status for status in self.all_statuses() if status["state"] not in ("done", "closed")]
        return " and ".join(f"worker {s['worker']} ({s['host']}, process {s['pid']})" for s in lost)

    def claim(self, name: str, owner: str = "") -> bool:
        """Claim `name` if it has no owner, or if `owner` owns it; return whether this worker owns it now."""
        me = f"{self.number}/{self._token}"
        found: bytes = self._call(self._store.compare_set, name, owner, me)
        return found.decode() == me

    def count(self, name: str) -> int:
        """Add one to the counter `name`, which all workers share, and return it."""
        return int(self._call(self._store.add, name, 1))

    def lost_owner(self, name: str) -> str | None:
        """Return the owner of `name` if it is gone, an empty string if nobody owns `name`, None if the owner lives."""
        if not self._call(self._store.check, [name]):
            return ""
        owner: str = self._call(self._store.get, name).decode()
        number, _, token = owner.partition("/")
        status = self.status(int(number))
        is_another = status is None or status["token"] != token  # a worker of the launcher's earlier attempt
        return owner if is_another or self.is_gone(int(number)) else None

    def status(self, number: int) -> dict[str, Any] | None:
        """Return the last status of worker `number`; None if it has not appeared."""
        if not self._call(self._store.check, [f"worker/{number}"]):
            return None
        text: bytes = self._call(self._store.get, f"worker/{number}")
        if self._seen.get(number, (b"", 0.0))[0] != text:
            self._seen[number] = (text, time.monotonic())
        status: dict[str, Any] = json.loads(text)
        return status

    def all_statuses(self) -> list[dict[str, Any]]:
        """Return the last status of each worker that has appeared, in the order of their numbers."""
        n_joined = int(self._call(self._store.add, "joined", 0))
        everyone = (self.status(number) for number in range(self.n_launched + n_joined))
        return [status for status in everyone if status is not None]

    def is_gone(self, number: int) -> bool:
        """Return whether worker `number` has left or is lost."""
        status = self.status(number)
        if status is None or number == self.number:
            return False
        return status["state"] == "left" or time.monotonic() - self._seen[number][1] > self.lost_seconds

    def failure_reason(self, number: int) -> str:
        """Describe a worker that is gone, and why it is considered gone."""
        status = self.status(number) or {"host": "unknown", "pid": 0}
        why = status.get("why", f"no heartbeat for {self.lost_seconds:.0f} s")
        return f"worker {number} ({status['host']}, process {status['pid']}) is gone: {why}"

    def await_others(self, *states: str, seconds: float = inf) -> None:
        """Wait until every other worker that has appeared is in one of `states` or gone, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(
            status["state"] not in states and not self.is_gone(status["worker"])
            for status in self.all_statuses()
            if status["worker"] != self.number
        ):
            time.sleep(_POLL_SECONDS)

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._heartbeat()
            except CaptureError as error:  # thread boundary: the next call of a method raises it
                self._failure = error
                return

    def _heartbeat(self) -> None:
        with self._lock:
            self._n_heartbeats += 1
            text = json.dumps({**self._status, "heartbeat": self._n_heartbeats})
        self._call(self._store.set, f"worker/{self.number}", text)

    def _call(self, operation: Any, *arguments: Any) -> Any:
        if self._failure is not None:
            raise _no_store(self._failure)
        try:
            return operation(*arguments)
        except (DistError, RuntimeError, ValueError, OSError) as error:
            raise _no_store(error) from error


def _no_store(cause: Exception) -> CaptureError:
    first_line = (str(cause).splitlines() or [type(cause).__name__])[0]
    return CaptureError(
        f"the store that the workers share does not answer, so the process that hosts it is gone ({first_line}). What "
        "was finished before is safe; run the same command again to go on."
    )
