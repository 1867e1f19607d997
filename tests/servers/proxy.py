"""A proxy in front of a server on loopback: it passes requests on, counts them, and fails as it is told."""

import http.client
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.servers.web import QuietHandler, listening

Fault = int | str | tuple[int, str]


@dataclass
class Proxy:
    """What the proxy does, and what it was asked.

    Attributes:
        target: Address of the server behind it.
        url: Where it answers.
        fault: Called with method and path of each request; returns what goes wrong with it. A number is the status of
            an answer in the server's place, and a name with it is S3's for the error. ``drop`` breaks the connection
            before anything is passed on, ``lost`` after the server has done what it was asked, ``cut`` in the middle
            of the answer, ``slow`` waits first.
        requests: How often each method was asked for.
        n_bytes: Bytes of bodies that were sent through.
    """

    target: str
    url: str = ""
    fault: Callable[[str, str], Fault | None] = lambda _method, _path: None
    requests: Counter[str] = field(default_factory=Counter)
    n_bytes: int = 0

    def answer(self, handler: QuietHandler) -> None:
        """Answer one request."""
        self.requests[handler.command] += 1
        fault = self.fault(handler.command, handler.path)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        handler.close_connection = fault in ("drop", "lost", "cut")
        if isinstance(fault, int):
            handler.send_error(fault)
        if isinstance(fault, tuple):
            _refuse(handler, *fault)
        if isinstance(fault, int | tuple) or fault == "drop":
            return
        if fault == "slow":
            time.sleep(0.3)
        connection = http.client.HTTPConnection(urlsplit(self.target).netloc, timeout=60)
        connection.request(handler.command, handler.path, body or None, dict(handler.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.n_bytes += len(body)
        if fault == "lost":
            return
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "date", "server", "transfer-encoding", "content-length"):
                handler.send_header(name, value)
        length = answer.getheader("Content-Length") if handler.command == "HEAD" else None
        handler.send_header("Content-Length", length or str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if fault == "cut" else content)


def _refuse(handler: QuietHandler, status: int, code: str) -> None:
    """Answer as S3 does."""
    body = f"<Error><Code>{code}</Code><Message>no</Message><RequestId>1</RequestId></Error>".encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


class _Handler(QuietHandler):
    proxy: Proxy

    def handle_request(self) -> None:
        self.proxy.answer(self)


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    """Run a proxy in front of the server at `target` while the context lasts."""
    proxy = Proxy(target)
    with listening(_Handler, proxy=proxy) as proxy.url:
        yield proxy
