"""Stopping within a stated time: Ctrl-C and SIGTERM end the work in order, or else at once after a grace.

The first signal raises KeyboardInterrupt in the main thread: full shards are written and committed, and the process
exits. A main thread that hangs in a library, for example in a collective whose other side is dead, never gets so
far; then the process ends without it.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 130
GRACE_SECONDS = 25.0  # below the 30 s that torchrun, SLURM and container runtimes leave before they kill


def _interrupt(_signal: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's second one must not break what the first began
    raise KeyboardInterrupt


@contextmanager
def stopping_in_time(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, and end the process `grace_seconds` after the first of them.

    For the main thread; the handlers that were there come back afterwards.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(heard, over, grace_seconds), name="residua-stopping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        told.close()
        thread.join()
        heard.close()


def _watch(heard: socket.socket, over: threading.Event, grace_seconds: float) -> None:
    """Wait for the first signal, which the kernel's side of Python writes here whatever the main thread does."""
    while number := heard.recv(1):
        if number[0] in (signal.SIGINT, signal.SIGTERM):
            if not over.wait(grace_seconds):
                os._exit(STOPPED)
            return
