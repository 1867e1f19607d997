"""Servers in processes of their own, on loopback: ports for them, and the wait until one answers."""

import socket
import subprocess
import time
from collections.abc import Callable

SECONDS = 90


def free_ports(n: int) -> list[int]:
    """Return ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def await_answer(process: subprocess.Popen[bytes], ask: Callable[[], object], name: str) -> None:
    """Wait until `ask` raises no OSError; fails if the process ends before, or after `SECONDS`."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            ask()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"{name} did not start")
