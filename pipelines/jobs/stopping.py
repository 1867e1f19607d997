"""Stop within a stated time: Ctrl-C and SIGTERM end the work in order, or by force after a grace period.

The first signal raises KeyboardInterrupt in the main thread: full shards are written and committed, and the process
exits. A library may swallow it (a bare `except` while a file is loaded); then it is raised again. A main thread that
hangs in a library, for example in a collective whose other side is dead, never raises it. Then the process ends by
force.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 130
GRACE_SECONDS = 25.0  # below the 30 s after which torchrun, SLURM and container runtimes kill
_AGAIN_SECONDS = 1.0


@contextmanager
def stopping_in_time(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, and end the process `grace_seconds` after the first signal.

    Only the main thread may enter this. Leaving it restores the handlers of before.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    is_over = threading.Event()

    def interrupt(number: int, _frame: object) -> None:
        # A launcher sends a second SIGTERM, which must not interrupt the stop. A second Ctrl-C may.
        if not is_over.is_set() and (number == signal.SIGINT or not _is_stopping()):
            raise KeyboardInterrupt

    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    watch = (receiver, is_over, grace_seconds, threading.get_ident())
    thread = threading.Thread(target=_watch, args=watch, name="residua-stopping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        signal.set_wakeup_fd(before)
        sender.close()
        thread.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        receiver.close()


def _is_stopping() -> bool:
    """Return whether this thread handles a KeyboardInterrupt, or an exception that was raised because of one."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _watch(receiver: socket.socket, is_over: threading.Event, grace_seconds: float, main_thread: int) -> None:
    """Wait for the first signal: Python's C handler writes its number here, whatever the main thread does."""
    while number := receiver.recv(1):
        if number[0] in (signal.SIGINT, signal.SIGTERM):
            deadline = time.monotonic() + grace_seconds
            while not is_over.wait(min(_AGAIN_SECONDS, max(0.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline:
                    os._exit(STOPPED)
                signal.pthread_kill(main_thread, signal.SIGTERM)  # does nothing if the main thread is stopping
            return
