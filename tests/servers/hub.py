"""The part of the Hugging Face Hub that `huggingface_hub` and readers use, on loopback: two servers, API and storage.

It has dataset repositories with commits and branches, and buckets. Large or binary files go to the storage, which
listens on another port and takes signed addresses only; all others are in the commits. It counts what it is asked for,
and fails as it is told.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.files import byte_range
from tests.servers.web import QuietHandler, listening

SECRET = b"of the storage"
REGULAR_BYTES = 10_000_000  # a larger file goes to the storage, whatever it holds


@dataclass(frozen=True)
class HubFile:
    """A file of a commit: its SHA-256, its size, and whether the storage has it; its SHA-1 as git counts it."""

    sha256: str
    n_bytes: int
    is_large: bool
    blob: str


@dataclass
class Repository:
    """A dataset repository or a bucket: its files by commit, and the commit of each branch."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def files(self, revision: str = "main") -> dict[str, HubFile]:
        """Return the files of a branch or a commit."""
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, files: dict[str, HubFile], branch: str = "main") -> str:
        """Add a commit, and return its name."""
        name = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()  # noqa: S324  # as git does
        self.commits[name], self.branches[branch] = files, name
        return name


class _RefusedError(Exception):
    """An answer that is an error: a status, the Hub's code for it, and further headers."""

    def __init__(self, status: int, code: str = "", **headers: str) -> None:
        super().__init__(status, code)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": f"{code} here", **headers}


@dataclass
class HubServer:
    """What the server does, and what it was asked.

    Attributes:
        folder: Where it keeps contents, by SHA-256.
        url: Where the API answers.
        storage_url: Where the storage answers.
        token: The login that may see private repositories and write.
        signed_seconds: How long a signed address is good for.
        page: Entries of a page of a listing.
        faults: What goes wrong next, by kind of request (``api``, ``commit``, ``resolve``, ``upload``, ``storage``):
            status codes, ``429`` with seconds to wait after a colon (or a semicolon, for the other header that says
            so), ``cut`` for half a body, ``lost`` for an answer
            that never comes although all was done, ``elsewhere`` for a redirect to another host.
        requests: Requests by kind.
        uploaded: Bytes that came to the storage.
        repositories: All repositories, by ``datasets/ORG/NAME``.
    """

    folder: Path
    url: str = ""
    storage_url: str = ""
    token: str = "hf_right"  # noqa: S105
    signed_seconds: float = 3600
    page: int = 1000
    faults: dict[str, list[int | str]] = field(default_factory=lambda: defaultdict(list))
    requests: Counter[str] = field(default_factory=Counter)
    uploaded: int = 0
    repositories: dict[str, Repository] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def options(self) -> dict[str, str]:
        """`storage_options` for it, with the login."""
        return {"endpoint": self.url, "token": self.token}

    def content(self, file: HubFile) -> bytes:
        """Return what a file holds."""
        return (self.folder / file.sha256).read_bytes()

    def add(self, data: bytes) -> HubFile:
        """Keep contents, and return the file that they are."""
        sha256 = hashlib.sha256(data).hexdigest()
        (self.folder / sha256).write_bytes(data)
        return HubFile(sha256, len(data), is_binary(data[:512]) or len(data) > REGULAR_BYTES, _blob(data))

    def publish(self, name: str, source: Path, **settings: Any) -> Repository:
        """Make a dataset repository of the files of a folder, in one commit."""
        paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
        repository = self.repositories[f"datasets/{name}"] = Repository(**settings)
        repository.commit({path.relative_to(source).as_posix(): self.add(path.read_bytes()) for path in paths})
        return repository

    def fault(self, kind: str) -> int | str | None:
        """Count a request, and return what goes wrong with it, if anything."""
        with self.lock:
            self.requests[kind] += 1
            return self.faults[kind].pop(0) if self.faults[kind] else None


def is_binary(sample: bytes) -> bool:
    """Say whether a file goes to the storage whatever its size."""
    with suppress(UnicodeDecodeError):
        sample.decode()
        return b"\0" in sample
    return True


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324  # as git does


class _Handler(QuietHandler):
    """What both servers share."""

    hub: HubServer

    def handle_request(self) -> None:
        self.parts = urlsplit(self.path)
        self.body = b"".join(self.chunks())
        try:
            self.answer()
        except _RefusedError as refused:
            self.send(refused.status, {"error": str(refused)}, **refused.headers)

    def chunks(self) -> Iterator[bytes]:
        """Yield the body of the request."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(self) -> None:
        raise NotImplementedError

    def fail(self, kind: str) -> str:
        """Count a request; refuse it if that is what goes wrong next, or return what else does."""
        fault = self.hub.fault(kind)
        if fault == "elsewhere":
            raise _RefusedError(302, Location="http://elsewhere.invalid/data")
        if isinstance(fault, str) and ":" in fault:
            raise _RefusedError(int(fault[:3]), **{"Retry-After": fault[4:]})
        if isinstance(fault, str) and ";" in fault:
            raise _RefusedError(int(fault[:3]), RateLimit=f'"resolvers";r=0;t={fault[4:]}')
        if isinstance(fault, int):
            raise _RefusedError(fault)
        return fault or ""

    def send(self, status: int, value: object = b"", *, fault: str = "", **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        if fault == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = self.close_connection or fault == "cut"

    def send_content(self, data: bytes, fault: str, **headers: str) -> None:
        asked = self.headers.get("Range")
        first, last = byte_range(asked, len(data))
        if asked and first >= len(data):
            raise _RefusedError(416)
        if asked:
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(206 if asked else 200, data[first : last + 1], fault=fault, **headers)


class _Storage(_Handler):
    """The storage: contents by their SHA-256, at signed addresses."""

    def answer(self) -> None:
        sha256, query = self.parts.path.strip("/"), parse_qs(self.parts.query)
        kind = "upload" if self.command == "PUT" else "storage"
        fault = self.fail(kind)
        until = query.get("Expires", ["0"])[0]
        if query.get("Signature") != [_signature(sha256, until)] or float(until) < time.time():
            raise _RefusedError(403)
        if "Authorization" in self.headers:
            raise _RefusedError(400)  # as S3 does when an address is signed already
        if kind == "storage":
            self.send_content((self.hub.folder / sha256).read_bytes(), fault)
            return
        with self.hub.lock:
            self.hub.uploaded += len(self.body)
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise _RefusedError(400)
        (self.hub.folder / sha256).write_bytes(self.body)
        self.send(200, fault=fault)


def _signature(sha256: str, until: str) -> str:
    return hashlib.sha256(SECRET + f"{sha256} {until}".encode()).hexdigest()


class _Api(_Handler):
    """The API, and the resolver of files."""

    def answer(self) -> None:
        for pattern, work in self.routes.items():
            if found := re.fullmatch(pattern, self.parts.path):
                work(self, **{name: unquote(text or "") for name, text in found.groupdict().items()})
                return
        raise _RefusedError(404)

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def repository(self, kind: str, id: str, *, write: bool = False) -> Repository:  # noqa: A002
        found = self.hub.repositories.get(f"{kind}/{id}")
        if found is None or (found.private and not self.is_known):
            raise _RefusedError(404 if self.is_known else 401, "RepoNotFound")
        if write and not self.is_known:
            raise _RefusedError(401)
        return found

    def files(self, found: Repository, revision: str) -> dict[str, HubFile]:
        if revision not in found.branches | found.commits:
            raise _RefusedError(404, "RevisionNotFound")
        return found.files(revision)

    def create(self) -> None:
        fault, asked = self.fail("api"), json.loads(self.body)
        if not self.is_known or asked["organization"] != "org":
            raise _RefusedError(403)
        name = f"datasets/{asked['organization']}/{asked['name']}"
        is_new = name not in self.hub.repositories
        if is_new:
            self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
            self.hub.repositories[name].commit({".gitattributes": self.hub.add(b"*.parquet filter=lfs\n")})
        self.send(200 if is_new else 409, {"url": f"{self.hub.url}/{name}"}, fault=fault)

    def info(self, id: str, revision: str) -> None:  # noqa: A002
        found = self.repository("datasets", id)
        self.fail("api")
        self.files(found, revision or "main")
        sha = found.branches.get(revision or "main", revision)
        self.send(200, {"id": id, "sha": sha, "private": found.private, "gated": found.gated, "siblings": []})

    def branch(self, id: str, branch: str) -> None:  # noqa: A002
        found = self.repository("datasets", id, write=True)
        self.fail("api")
        if branch in found.branches:
            raise _RefusedError(409)
        found.branches[branch] = found.branches["main"]
        self.send(200, {})

    def validate(self) -> None:
        self.fail("api")
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, id: str, revision: str) -> None:  # noqa: A002
        found = self.repository("datasets", id, write=True)
        fault, there = self.fail("api"), self.files(found, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            is_large = is_binary(base64.b64decode(file["sample"])) or file["size"] > REGULAR_BYTES
            answer = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if old := there.get(file["path"]):
                answer["oid"] = old.sha256 if old.is_large else old.blob
            answers.append(answer)
        self.send(200, {"files": answers}, fault=fault)

    def batch(self, id: str) -> None:  # noqa: A002
        self.repository("datasets", id, write=True)
        fault = self.fail("api")
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = dict(asked)
            if not (self.hub.folder / asked["oid"]).exists():
                answer["actions"] = {"upload": {"href": self.signed(asked["oid"])}}
            objects.append(answer)
        self.send(200, {"transfer": "basic", "objects": objects}, fault=fault)

    def signed(self, sha256: str) -> str:
        until = str(time.time() + self.hub.signed_seconds)
        return f"{self.hub.storage_url}/{sha256}?Expires={until}&Signature={_signature(sha256, until)}"

    def commit(self, id: str, revision: str) -> None:  # noqa: A002
        found = self.repository("datasets", id, write=True)
        fault = self.fail("commit")
        with self.hub.lock:
            files = dict(self.files(found, revision))
            for line in self.body.splitlines():
                self.apply(files, **json.loads(line))
            oid = found.commit(files, revision)
        where = f"{self.hub.url}/datasets/{id}/commit/{oid}"
        self.send(200, {"commitUrl": where, "commitOid": oid, "success": True}, fault=fault)

    def apply(self, files: dict[str, HubFile], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = replace(self.hub.add(base64.b64decode(value["content"])), is_large=False)
        elif key == "lfsFile":
            path = self.hub.folder / value["oid"]
            if not path.exists() or path.stat().st_size != value["size"]:
                raise _RefusedError(400)
            files[value["path"]] = HubFile(value["oid"], value["size"], True, value["oid"][:40])
        elif key == "deletedFile":
            del files[value["path"]]

    def tree(self, kind: str, id: str, path: str = "", revision: str = "main") -> None:  # noqa: A002
        found = self.repository(kind, id)
        fault, files = self.fail("api"), self.files(found, revision)
        inside = {name: file for name, file in files.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise _RefusedError(404, "EntryNotFound")
        entries: list[dict[str, Any]] = [self.entry(name, file) for name, file in sorted(inside.items())]
        query = parse_qs(self.parts.query)
        first = int(query.get("cursor", ["0"])[0])
        more = {}
        if first + self.hub.page < len(entries):
            address = f"{self.hub.url}{self.parts.path}?recursive=true&cursor={first + self.hub.page}"
            more = {"Link": f'<{address}>; rel="next"'}
        self.send(200, entries[first : first + self.hub.page], fault=fault, **more)

    def entry(self, name: str, file: HubFile) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": file.n_bytes, "oid": file.blob, "xetHash": file.sha256}
        lfs = {"oid": file.sha256, "size": file.n_bytes, "pointerSize": 130}
        return {**entry, "lfs": lfs} if file.is_large else entry

    def resolve(self, kind: str, id: str, path: str, revision: str = "main") -> None:  # noqa: A002
        fault, found = self.fail("resolve"), self.repository(kind, id)
        files = self.files(found, revision)
        if found.gated and not self.is_known:
            raise _RefusedError(401, "GatedRepo")
        if path not in files:
            raise _RefusedError(404, "EntryNotFound")
        file, headers = files[path], {}
        if kind == "datasets":
            headers["X_Repo_Commit"] = found.branches.get(revision, revision)
        if file.is_large:
            large = {"X_Linked_Size": str(file.n_bytes), "X_Linked_Etag": f'"{file.sha256}"'}
            self.send(302, fault=fault, Location=self.signed(file.sha256), **large, **headers)
        else:
            self.send_content(self.hub.content(file), fault, **headers)

    def create_bucket(self, id: str) -> None:  # noqa: A002
        fault, name = self.fail("api"), f"buckets/{id}"
        if not self.is_known or not id.startswith("org/"):
            raise _RefusedError(403)
        is_new = name not in self.hub.repositories
        if is_new:
            private = json.loads(self.body or b"{}").get("visibility") == "private"
            self.hub.repositories[name] = Repository(private=private)
            self.hub.repositories[name].commit({})
        self.send(200 if is_new else 409, {"url": f"{self.hub.url}/{name}"}, fault=fault)

    def batch_bucket(self, id: str) -> None:  # noqa: A002
        found, fault = self.repository("buckets", id, write=True), self.fail("commit")
        with self.hub.lock:
            files = dict(found.files())
            for line in map(json.loads, self.body.splitlines()):
                path = self.hub.folder / line.get("xetHash", "")
                if line["type"] == "addFile":
                    files[line["path"]] = HubFile(line["xetHash"], path.stat().st_size, True, line["xetHash"][:40])
                else:
                    files.pop(line["path"], None)
            found.commit(files)
        self.send(200, {"success": True, "failed": []}, fault=fault)

    routes: ClassVar[dict[str, Callable[..., None]]] = {
        "/api/repos/create": create,
        "/api/validate-yaml": validate,
        r"/api/datasets/(?P<id>[^/]+/[^/]+)/preupload/(?P<revision>.+)": preupload,
        r"/api/datasets/(?P<id>[^/]+/[^/]+)/commit/(?P<revision>.+)": commit,
        r"/api/datasets/(?P<id>[^/]+/[^/]+)/branch/(?P<branch>.+)": branch,
        r"/api/(?P<kind>datasets)/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?": tree,
        r"/api/(?P<kind>buckets)/(?P<id>[^/]+/[^/]+)/tree(/(?P<path>.+))?": tree,
        r"/api/datasets/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>.+))?": info,
        r"/datasets/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch": batch,
        r"/(?P<kind>datasets)/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)": resolve,
        r"/api/buckets/(?P<id>[^/]+/[^/]+)": create_bucket,
        r"/api/buckets/(?P<id>[^/]+/[^/]+)/batch": batch_bucket,
        r"/(?P<kind>buckets)/(?P<id>[^/]+/[^/]+)/resolve/(?P<path>.+)": resolve,
    }


@contextmanager
def serving_hub(folder: Path) -> Iterator[HubServer]:
    """Serve a Hub that keeps its contents in `folder`, on loopback, while the context lasts."""
    hub = HubServer(folder)
    with ExitStack() as stack:
        hub.url, hub.storage_url = (stack.enter_context(listening(kind, hub=hub)) for kind in (_Api, _Storage))
        yield hub
