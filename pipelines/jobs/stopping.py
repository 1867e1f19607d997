"""Stop within a stated time: Ctrl-C and SIGTERM end the work in order, or by force after a grace period.

The first signal raises KeyboardInterrupt in the main thread: full shards are written and committed, and the process
exits. A main thread that hangs in a library, for example in a collective whose other side is dead, never raises it.
Then the process ends by force.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 130
GRACE_SECONDS = 25.0  # below the 30 s after which torchrun, SLURM and container runtimes kill


def _interrupt(_signal: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends a second one, which must not interrupt the stop
    raise KeyboardInterrupt


@contextmanager
def stopping_in_time(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, and end the process `grace_seconds` after the first signal.

    Only the main thread may enter this. Leaving it restores the handlers of before.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(receiver, over, grace_seconds), name="residua-stopping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        sender.close()
        thread.join()
        receiver.close()


def _watch(receiver: socket.socket, over: threading.Event, grace_seconds: float) -> None:
    """Wait for the first signal: Python's C handler writes its number here, whatever the main thread does."""
    while number := receiver.recv(1):
        if number[0] in (signal.SIGINT, signal.SIGTERM):
            if not over.wait(grace_seconds):
                os._exit(STOPPED)
            return
