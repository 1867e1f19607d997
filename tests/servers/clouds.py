"""What obstore asks of Google Cloud Storage and of Azure Blob Storage, on loopback: a server for each, in memory.

Each knows the requests of its service that read, write, list and delete objects, writes in parts, and conditions on
them. Its bucket (or container) is there from the start, and others are not. It takes one login and refuses all others.
"""

import base64
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.servers.files import byte_range
from tests.servers.web import QuietHandler, listening

PAGE = 50  # objects of a page of a list, so that lists have pages
TOKEN = "right"  # noqa: S105
ACCOUNT, KEY = "acc", base64.b64encode(b"key").decode()


class Object(NamedTuple):
    """An object, and the number of its version."""

    data: bytes
    version: int


class RefusedError(Exception):
    """An answer that is an error: a status, and the service's name for it."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


@dataclass
class CloudServer:
    """What the server has, and what it was asked.

    Attributes:
        bucket: Name of its bucket.
        options: `storage_options` for it.
        scheme: Of its addresses.
        objects: The objects, by name.
        parts: Parts of uploads that are not complete, by upload and number.
        requests: How often each method was asked for.
        lag: How many of the last changes lists do not show yet.
    """

    scheme: str
    bucket: str = "acts"
    options: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Object] = field(default_factory=dict)
    parts: dict[tuple[str, str], bytes] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    n_versions: int = 0
    lag: int = 0

    def address(self, name: str) -> str:
        """Return the address of a folder in the bucket."""
        return f"{self.scheme}://{self.bucket}/{name}"

    def put(self, name: str, data: bytes, required: int | None) -> int:
        """Keep an object; `required` is the version that has to be there, 0 for none. Return its new version."""
        with self.lock:
            there = self.objects.get(name)
            if required is not None and required != (there.version if there else 0):
                raise RefusedError(412, "ConditionNotMet")
            self.n_versions += 1
            self.objects[name] = Object(data, self.n_versions)
            return self.n_versions

    def page(self, prefix: str, after: str) -> tuple[list[tuple[str, Object]], str]:
        """Return the objects of a page of a list, and the last name if there are more."""
        with self.lock:
            shown = [(name, o) for name, o in self.objects.items() if o.version <= self.n_versions - self.lag]
        found = sorted((name, o) for name, o in shown if name.startswith(prefix) and name > after)
        return found[:PAGE], found[PAGE - 1][0] if len(found) > PAGE else ""


class _Handler(QuietHandler):
    """What both services share."""

    cloud: CloudServer

    def handle_request(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.cloud.requests[self.command] += 1
        try:
            if not self.is_allowed():
                raise RefusedError(403, "AccessDenied")
            bucket, _, name = unquote(self.inside(parts.path)).partition("/")
            if bucket != self.cloud.bucket:
                raise RefusedError(404, "NoSuchBucket")
            self.answer(name)
        except RefusedError as refused:
            self.send(refused.status, f"<Error><Code>{refused.code}</Code></Error>".encode())

    def is_allowed(self) -> bool:
        raise NotImplementedError

    def inside(self, path: str) -> str:
        return path.removeprefix("/")

    def answer(self, name: str) -> None:
        raise NotImplementedError

    def send(self, status: int, data: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        found = dict(headers or {})
        for key, value in found.items():
            self.send_header(key, value)
        if "Content-Length" not in found:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_object(self, name: str) -> None:
        if name not in self.cloud.objects:
            raise RefusedError(404, "NoSuchKey")
        data, version = self.cloud.objects[name]
        headers = {"Last-Modified": formatdate(0, usegmt=True), **self.version_headers(version)}
        asked = self.headers.get("Range")
        first, last = byte_range(asked, len(data))
        if asked and first >= len(data):
            raise RefusedError(416, "InvalidRange")
        if asked:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(data))
        self.send(206 if asked else 200, data[first : last + 1], headers)

    def version_headers(self, version: int) -> dict[str, str]:
        return {"ETag": f'"{version}"'}

    def remove(self, name: str) -> None:
        with self.cloud.lock:
            if self.cloud.objects.pop(name, None) is None:
                raise RefusedError(404, "NoSuchKey")


class _Google(_Handler):
    """Google Cloud Storage, as its XML interface has it."""

    def is_allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def version_headers(self, version: int) -> dict[str, str]:
        return {"ETag": f'"{version}"', "x-goog-generation": str(version)}

    def answer(self, name: str) -> None:
        if self.command == "GET" and "list-type" in self.query:
            self.list()
        elif self.command in ("GET", "HEAD"):
            self.send_object(name)
        elif self.command == "DELETE" and "uploadId" not in self.query:
            self.remove(name)
            self.send(204)
        elif "uploads" in self.query or "uploadId" in self.query:
            self.upload(name)
        else:
            required = self.headers.get("x-goog-if-generation-match")
            version = self.cloud.put(name, self.body, None if required is None else int(required))
            self.send(200, headers=self.version_headers(version))

    def upload(self, name: str) -> None:
        upload = self.query.get("uploadId", f"upload-{len(self.cloud.parts)}-{name}")
        if self.command == "DELETE":
            self.send(204)
        elif self.command == "PUT":
            self.cloud.parts[upload, self.query["partNumber"]] = self.body
            self.send(200, headers={"ETag": f'"{self.query["partNumber"]}"'})
        elif "uploads" in self.query:
            answer = f"<InitiateMultipartUploadResult><UploadId>{escape(upload)}</UploadId>"
            self.send(200, f"{answer}</InitiateMultipartUploadResult>".encode())
        else:
            numbers = re.findall(rb"<PartNumber>(\d+)</PartNumber>", self.body)
            data = b"".join(self.cloud.parts.pop((upload, number.decode())) for number in numbers)
            version = self.cloud.put(name, data, None)
            answer = f"<CompleteMultipartUploadResult><ETag>{version}</ETag></CompleteMultipartUploadResult>"
            self.send(200, answer.encode(), self.version_headers(version))

    def list(self) -> None:
        page, more = self.cloud.page(self.query.get("prefix", ""), self.query.get("continuation-token", ""))
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(found.data)}</Size>"
            f'<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"{found.version}"</ETag></Contents>'
            for name, found in page
        )
        more = f"<NextContinuationToken>{escape(more)}</NextContinuationToken>" if more else ""
        self.send(200, f"<ListBucketResult>{entries}{more}</ListBucketResult>".encode())


class _Azure(_Handler):
    """Azure Blob Storage."""

    def is_allowed(self) -> bool:
        return (self.headers.get("Authorization") or "").startswith(f"SharedKey {ACCOUNT}:")

    def inside(self, path: str) -> str:
        return path.removeprefix(f"/{ACCOUNT}/")

    def answer(self, name: str) -> None:
        asked = self.query.get("comp")
        if asked == "list":
            self.list()
        elif asked == "batch":
            self.delete_all()
        elif asked == "block":
            self.cloud.parts[name, self.query["blockid"]] = self.body
            self.send(201)
        elif asked == "blocklist":
            blocks = [block.text or "" for block in ElementTree.fromstring(self.body)]  # noqa: S314  # of our client
            self.put(name, b"".join(self.cloud.parts.pop((name, block)) for block in blocks))
        elif self.command == "PUT":
            self.put(name, self.body)
        elif self.command == "DELETE":
            self.remove(name)
            self.send(202)
        else:
            self.send_object(name)

    def put(self, name: str, data: bytes) -> None:
        match = self.headers.get("If-Match")
        required = 0 if self.headers.get("If-None-Match") == "*" else int(match.strip('"')) if match else None
        try:
            version = self.cloud.put(name, data, required)
        except RefusedError:
            raise RefusedError(*((409, "BlobAlreadyExists") if required == 0 else (412, "ConditionNotMet"))) from None
        headers = {**self.version_headers(version), "Last-Modified": formatdate(0, usegmt=True)}
        self.send(201, headers=headers)

    def list(self) -> None:
        page, more = self.cloud.page(self.query.get("prefix", ""), self.query.get("marker", ""))
        blobs = "".join(
            f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{formatdate(0, usegmt=True)}</Last-Modified>"
            f"<Content-Length>{len(found.data)}</Content-Length>"
            f"<Content-Type>application/octet-stream</Content-Type><Etag>{found.version}</Etag></Properties></Blob>"
            for name, found in page
        )
        answer = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker>{escape(more)}</NextMarker>"
        self.send(200, f"{answer}</EnumerationResults>".encode())

    def delete_all(self) -> None:
        """Answer many deletions in one request, each with a part of its own."""
        answers = []
        for number, path in enumerate(re.findall(rb"DELETE (\S+) HTTP/1.1", self.body)):
            name = unquote(self.inside(urlsplit(path.decode()).path)).partition("/")[2]
            status = "202 Accepted"
            try:
                self.remove(name)
            except RefusedError:
                status = "404 The specified blob does not exist."
            head = f"--b\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
            answers.append(f"{head}HTTP/1.1 {status}\r\nx-ms-request-id: {number}\r\n\r\n")
        headers = {"Content-Type": "multipart/mixed; boundary=b"}
        self.send(202, "".join([*answers, "--b--\r\n"]).encode(), headers)


@contextmanager
def serving_cloud(scheme: str) -> Iterator[CloudServer]:
    """Run a server while the context lasts.

    Args:
        scheme: ``gs`` for Google Cloud Storage, ``az`` for Azure Blob Storage.
    """
    cloud = CloudServer(scheme)
    with listening(_Google if scheme == "gs" else _Azure, cloud=cloud) as url:
        if scheme == "gs":
            cloud.options = {"base_url": url, "bearer_token": TOKEN}
        else:
            cloud.options = {"endpoint": f"{url}/{ACCOUNT}", "account_name": ACCOUNT, "access_key": KEY}
        yield cloud
