"""The workers of one job, as one of them sees them: who is there, how far they are, who is lost.

A worker is a process with a whole replica of the model. Workers meet in a c10d key-value store, which needs no
process group and no collective. Each writes its figures there once a second; that is also how the others see that
it lives. Nothing that counts of a capture is kept in the store: what is done is what is committed on the disk.

A worker that has not been heard of for `LOST_SECONDS` is lost. If the process that keeps the store dies, the others
notice within two beats, and every call here raises.
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

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from residua.store.base.errors import CaptureError

BEAT_SECONDS = 1.0
LOST_SECONDS = 30.0  # after which a worker without a sign is lost
START_SECONDS = 600.0  # that others may take to appear: they may be loading a large model
FAREWELL_SECONDS = 5.0  # for the others to read why a worker leaves that keeps the store
_POLL_SECONDS = 0.1


def number_of_joiner(store: Store, n_launched: int) -> int:
    """Return a number for one more worker, beside those that were launched together."""
    return n_launched - 1 + store.add("joined", 1)


class Home(NamedTuple):
    """Processes that were launched together, as one of them sees them; a crew may have more workers."""

    store: Store
    rank: int
    n_launched: int


class Crew:
    """This worker's place among the others; a context, in which it is seen to live.

    Args:
        store: The store that all workers have in common, for this job alone.
        number: This worker's number. Number 0 makes the plan, shows the progress and has the last word.
        n_launched: How many workers were launched together; more may join.
        lost_seconds: After how long without a sign a worker counts as lost.
        home: The processes that this one was launched with; None if it was launched alone.
    """

    def __init__(
        self,
        store: Store,
        number: int,
        n_launched: int,
        *,
        lost_seconds: float = LOST_SECONDS,
        home: Home | None = None,
    ) -> None:
        self.number = number
        self.n_launched = n_launched
        self.home = home
        self.lost_seconds = lost_seconds
        self._store = store
        self._token = secrets.token_hex(8)
        self._figures: dict[str, Any] = {
            "worker": number,
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "state": "working",
        }
        self._n_beats = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat_on, name="residua-beat", daemon=True)

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is not None and self._failure is None:
            self._figures |= {"state": "left", "why": str(error) or type(error).__name__}
            with suppress(CaptureError):  # the error under way says more
                self._beat()
                if self.number == 0:  # the store may go with this process: let the others read why
                    self.await_others("done", "left", "told", seconds=FAREWELL_SECONDS)

    def tell(self, **figures: Any) -> None:
        """Let the others know `figures` with the next beat.

        Raises:
            CaptureError: The store is gone.
        """
        if self._failure is not None:
            raise _no_store(self._failure)
        with self._lock:
            self._figures |= figures

    def tell_now(self, **figures: Any) -> None:
        """Let the others know `figures` at once."""
        self.tell(**figures)
        self._beat()

    def publish(self, name: str, message: Mapping[str, Any]) -> None:
        """Publish a message under a name."""
        self._call(self._store.set, name, json.dumps(message))

    def message(self, name: str) -> dict[str, Any] | None:
        """Return the message that was published under `name`, if it was."""
        if not self._call(self._store.check, [name]):
            return None
        message: dict[str, Any] = json.loads(self._call(self._store.get, name))
        return message

    def drop(self, name: str) -> None:
        """Forget what was published under `name`."""
        self._call(self._store.delete_key, name)

    def await_message(self, name: str, *, patience: float) -> dict[str, Any]:
        """Return what worker 0 publishes under `name`.

        Args:
            name: Name of the message.
            patience: How long worker 0 may take to appear, in seconds; once it is there, it may take as long as it
                lives.

        Raises:
            CaptureError: Worker 0 is lost, has left, or did not appear.
        """
        started = time.monotonic()
        while (message := self.message(name)) is None:
            figures = self.figures(0)
            if figures is None and time.monotonic() - started > patience:
                raise CaptureError(f"worker 0 did not appear within {patience:.0f} s: see its own messages")
            if figures is not None and self.is_gone(0) and (message := self.message(name)) is None:
                raise CaptureError(self.obituary(0))
            time.sleep(_POLL_SECONDS)
        return message

    def once(self, name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Let worker 0 make a message, and return it on every worker.

        Raises:
            CaptureError: Worker 0 is lost, has left, or did not appear.
        """
        if self.number:
            return self.await_message(name, patience=START_SECONDS)
        message = make()
        self.publish(name, message)
        return message

    def finish(self, close: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Wait until no worker has anything to do, let worker 0 call `close`, and return on all what that returned.

        Raises:
            CaptureError: Worker 0 is gone.
        """
        self.tell_now(state="done")
        if self.number == 0:
            self.await_others("done")
        message = self.once("closed", close)
        self.tell_now(state="told")
        if self.number == 0:
            self.await_others("told")  # the store may go with this process
        return message

    def gone(self) -> str:
        """Say which workers ended without a word, for a message."""
        left = [f for f in self.all_figures() if f["state"] not in ("done", "told")]
        return " and ".join(f"worker {f['worker']} ({f['host']}, process {f['pid']})" for f in left)

    def claim(self, name: str, owner: str = "") -> bool:
        """Become the owner of `name` if it has none, or if `owner` owns it; say whether that was so."""
        me = f"{self.number}/{self._token}"
        found: bytes = self._call(self._store.compare_set, name, owner, me)
        return found.decode() == me

    def count(self, name: str) -> int:
        """Return how often this was called for `name`, by all workers."""
        return int(self._call(self._store.add, name, 1))

    def lost_owner(self, name: str) -> str | None:
        """Return the owner of `name` if it is gone, an empty one if nobody owns `name`, None if its owner lives."""
        if not self._call(self._store.check, [name]):
            return ""
        owner: str = self._call(self._store.get, name).decode()
        number, _, token = owner.partition("/")
        figures = self.figures(int(number))
        is_another = figures is None or figures["token"] != token  # of an earlier attempt of the launcher
        return owner if is_another or self.is_gone(int(number)) else None

    def figures(self, number: int) -> dict[str, Any] | None:
        """Return what worker `number` told last, or None if it never did."""
        if not self._call(self._store.check, [f"worker/{number}"]):
            return None
        told: bytes = self._call(self._store.get, f"worker/{number}")
        if self._seen.get(number, (b"", 0.0))[0] != told:
            self._seen[number] = (told, time.monotonic())
        figures: dict[str, Any] = json.loads(told)
        return figures

    def all_figures(self) -> list[dict[str, Any]]:
        """Return what each worker that ever appeared told last, by number."""
        n_joined = int(self._call(self._store.add, "joined", 0))
        everyone = (self.figures(number) for number in range(self.n_launched + n_joined))
        return [figures for figures in everyone if figures is not None]

    def is_gone(self, number: int) -> bool:
        """Say whether worker `number` has left, or was there and has given no sign for too long."""
        figures = self.figures(number)
        if figures is None or number == self.number:
            return False
        return figures["state"] == "left" or time.monotonic() - self._seen[number][1] > self.lost_seconds

    def obituary(self, number: int) -> str:
        """Say who worker `number`, which is gone, was and why it is gone."""
        figures = self.figures(number) or {"host": "unknown", "pid": 0}
        why = figures.get("why", f"there was no sign of it for {self.lost_seconds:.0f} s")
        return f"worker {number} ({figures['host']}, process {figures['pid']}) is gone: {why}"

    def await_others(self, *states: str, seconds: float = inf) -> None:
        """Return when every other worker that ever appeared is in one of `states` or gone, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(
            figures["state"] not in states and not self.is_gone(figures["worker"])
            for figures in self.all_figures()
            if figures["worker"] != self.number
        ):
            time.sleep(_POLL_SECONDS)

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._beat()
            except CaptureError as error:  # thread boundary: the next call raises it
                self._failure = error
                return

    def _beat(self) -> None:
        with self._lock:
            self._n_beats += 1
            text = json.dumps({**self._figures, "beat": self._n_beats})
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
        f"the workers' common store does not answer, so the process that keeps it is gone ({first_line}). What was "
        "finished before is safe; run the same command again to go on."
    )
