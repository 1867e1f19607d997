"""A web server for the files of a folder: it answers requests for ranges, counts them, and fails as it is told."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.servers.web import QuietHandler, listening

ENDLESS_BYTES = 2**30


@dataclass
class FileServer:
    """What the server does, and what it was asked.

    Attributes:
        folder: Whose files it has.
        url: Where it answers.
        prefix: Path before the names of files, as the Hub has it.
        latency: Seconds before each answer.
        ranges: Whether it answers requests for ranges; otherwise it sends whole files.
        token: If given, requests without it are refused.
        faults: What goes wrong next, one a request, before it answers well again: status codes; ``cut`` breaks off the
            body, ``endless`` sends a body without an end, ``claims`` says that it will send an exbibyte.
        faulty: How the paths end that `faults` are for.
        elsewhere: If given, where every request is redirected to.
        logins: The logins that came with requests.
        altered: Names of files of which the first byte of each answer is changed.
        altered_once: Likewise, for one answer each.
        requests: How often each path was asked for.
        n_bytes: Bytes of bodies sent.
    """

    folder: Path
    url: str = ""
    prefix: str = "/"
    latency: float = 0.0
    ranges: bool = True
    token: str = ""
    elsewhere: str = ""
    logins: set[str | None] = field(default_factory=set)
    faults: list[int | str] = field(default_factory=list)
    faulty: str = ""
    altered: set[str] = field(default_factory=set)
    altered_once: set[str] = field(default_factory=set)
    requests: Counter[str] = field(default_factory=Counter)
    n_bytes: int = 0

    def forget(self) -> None:
        """Count from zero."""
        self.requests.clear()
        self.n_bytes = 0

    def answer(self, handler: QuietHandler) -> None:
        """Answer one request."""
        time.sleep(self.latency)
        path = unquote(urlsplit(handler.path).path)
        self.requests[path] += 1
        self.logins.add(handler.headers.get("Authorization"))
        fault = self.faults.pop(0) if self.faults and path.endswith(self.faulty) else None
        if isinstance(fault, int):
            handler.send_error(fault)
        elif self.elsewhere:
            handler.send_response(302)
            handler.send_header("Location", self.elsewhere + handler.path)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        elif self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            handler.send_error(401)
        elif not path.startswith(self.prefix) or not (file := self.folder / path.removeprefix(self.prefix)).is_file():
            handler.send_error(404)
        else:
            self._send(handler, file, fault)

    def _send(self, handler: QuietHandler, file: Path, fault: str | None) -> None:
        size = file.stat().st_size
        asked = handler.headers.get("Range") if self.ranges else None
        first, last = byte_range(asked, size)
        with file.open("rb") as opened:
            opened.seek(first)
            body = opened.read(last + 1 - first)
        if file.name in self.altered | self.altered_once and body:
            self.altered_once.discard(file.name)
            body = bytes([body[0] ^ 1]) + body[1:]
        handler.send_response(206 if asked else 200)
        if asked:
            handler.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        is_long = fault in ("endless", "claims")
        handler.send_header("Content-Length", str(2**60 if is_long else len(body)))
        handler.send_header("Last-Modified", formatdate(file.stat().st_mtime, usegmt=True))
        handler.end_headers()
        if is_long:
            self._flood(handler, ENDLESS_BYTES if fault == "endless" else 0)
            return
        sent = body[: len(body) // 2] if fault == "cut" else body
        self.n_bytes += len(sent)
        if handler.command == "GET":
            handler.wfile.write(sent)
        handler.close_connection = fault == "cut"

    def _flood(self, handler: QuietHandler, n_bytes: int) -> None:
        """Send zeros until the client has enough."""
        handler.close_connection = True
        with suppress(OSError):
            for _ in range(0, n_bytes, 2**20):
                self.n_bytes += handler.wfile.write(bytes(2**20))


def byte_range(asked: str | None, size: int) -> tuple[int, int]:
    """Return the first and the last byte of a Range header; of the whole file if there is none."""
    if asked is None:
        return 0, size - 1
    first, _, last = asked.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size - 1
    return int(first), min(int(last), size - 1) if last else size - 1


class _Handler(QuietHandler):
    files: FileServer

    def handle_request(self) -> None:
        if self.command in ("GET", "HEAD"):
            self.files.answer(self)
        else:
            self.send_error(405)  # as servers that list nothing do; 501 would be tried again


@contextmanager
def serving_files(folder: Path, **settings: object) -> Iterator[FileServer]:
    """Serve the files of `folder` on loopback while the context lasts."""
    server = FileServer(folder, **settings)  # type: ignore[arg-type]

    with listening(_Handler, files=server) as server.url:
        yield server
