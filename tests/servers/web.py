"""What the web servers of the tests share: a handler that prints nothing, and a server that ends with its context."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Gives all requests to `handle_request`, several on one connection, and prints nothing."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

    def handle_request(self) -> None:
        """Answer one request, whatever its method."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Answer one request."""
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PROPFIND = do_GET  # noqa: N815  # the names that the base class calls

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing."""


@contextmanager
def listening(handler: type[QuietHandler], **facts: Any) -> Iterator[str]:
    """Serve on loopback while the context lasts, each request in a thread; yield the server's address.

    Args:
        handler: Answers a request.
        facts: Attributes that each handler gets, such as what it serves.
    """
    kind: Any = type(handler.__name__, (handler,), facts)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
