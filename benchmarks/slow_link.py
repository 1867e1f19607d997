"""A link before a server, in a process of its own: slow as it is told, and counting requests and bytes.

Each piece of a request arrives `latency` seconds later, one behind the other, as over a long line. So one request
after another costs the latency each, and requests that are under way together cost it once. What both sides send
shares a rate of bytes, if one is given.
"""

import fcntl
import multiprocessing
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

_PIECE = 1 << 20
_REQUEST = b" HTTP/1.1\r\n"


class Counts(NamedTuple):
    """What passed: requests, and bytes of requests and answers, with their heads."""

    requests: int
    sent: int
    received: int


class Link:
    """The near end of the link.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, port: int, line: Any, counts: Any) -> None:
        self.port = port
        self._line, self._counts = line, counts

    def set_line(self, latency: float, bytes_per_second: float = 0) -> None:
        """Set the delay of requests in seconds, and the rate; 0 is no limit."""
        self._line[:] = latency, bytes_per_second, 0

    def counts(self) -> Counts:
        """Return what has passed so far."""
        return Counts(*self._counts)


@contextmanager
def slow_link(port: int) -> Iterator[Link]:
    """Run a link to the server at `port` of this machine while the context lasts."""
    context = multiprocessing.get_context("spawn")
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    line, counts = context.Array("d", 3), context.Array("q", 3)
    process = context.Process(target=_serve, args=(listening, port, line, counts), daemon=True)
    process.start()
    try:
        yield Link(listening.getsockname()[1], line, counts)
    finally:
        listening.close()
        process.kill()
        process.join()


def _serve(listening: socket.socket, port: int, line: Any, counts: Any) -> None:
    while True:
        near, _ = listening.accept()
        far = socket.create_connection(("127.0.0.1", port))
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        delayed: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        for work in (
            (_take, near, delayed, line, counts),
            (_pass, far, delayed, line),
            (_answer, far, near, line, counts),
        ):
            threading.Thread(target=work[0], args=work[1:], daemon=True).start()


def _take(near: socket.socket, delayed: Any, line: Any, counts: Any) -> None:
    """Take what the client sends, and note when it is to arrive."""
    piece = b"-"
    while piece:
        try:
            piece = near.recv(_PIECE)
        except OSError:
            piece = b""
        with counts.get_lock():
            counts[0] += piece.count(_REQUEST)
            counts[1] += len(piece)
        delayed.put((time.monotonic() + line[0], piece))


def _keep_rate(line: Any, n_bytes: int) -> None:
    """Wait until the line has taken so many bytes."""
    with line.get_lock():
        if not line[1]:
            return
        line[2] = max(line[2], time.monotonic()) + n_bytes / line[1]
        until = line[2]
    time.sleep(max(0.0, until - time.monotonic()))


def _pass(far: socket.socket, delayed: Any, line: Any) -> None:
    """Give the server what the client sent, when its time has come."""
    piece = b"-"
    while piece:
        due, piece = delayed.get()
        time.sleep(max(0.0, due - time.monotonic()))
        _keep_rate(line, len(piece))
        with suppress(OSError):
            far.sendall(piece) if piece else far.shutdown(socket.SHUT_WR)


def _answer(far: socket.socket, near: socket.socket, line: Any, counts: Any) -> None:
    """Give the client what the server answers, without copying it through this process."""
    outlet, inlet = os.pipe()
    fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, _PIECE)
    with suppress(OSError):
        while n_bytes := os.splice(far.fileno(), inlet, _PIECE):
            with counts.get_lock():
                counts[2] += n_bytes
            _keep_rate(line, n_bytes)
            while n_bytes:
                n_bytes -= os.splice(outlet, near.fileno(), n_bytes)
    for descriptor in (outlet, inlet):
        os.close(descriptor)
    with suppress(OSError):
        near.shutdown(socket.SHUT_WR)
