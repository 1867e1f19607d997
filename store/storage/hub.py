"""A folder of a dataset repository or a bucket of the Hugging Face Hub, read within what the Hub allows.

The Hub answers a request for a large file with a redirect to a signed address of its storage, and counts such requests
(3,000 in five minutes without a login). So each file is asked for once: its signed address is used for all later
ranges, until the storage refuses it. A repository's branch or tag becomes a commit with the first answer, and every
later request is for that commit, so that an open archive does not change when somebody pushes. When requests are used
up, the next one waits as long as the Hub says.

`folder_at` opens any address; only this module knows what is particular to the Hub.
"""

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urljoin, urlsplit

import numpy as np

from residua.store.base.errors import StorageError
from residua.store.storage.address import check_address, hub_place, scheme_of, shown
from residua.store.storage.objects import Bytes, ObjectFolder
from residua.store.storage.web import Answer, Failure, ask

_OPTIONS = ("token", "endpoint")
_SIGNED = 10_000  # signed addresses that are kept; each has one or two thousand characters
_TURNS = 64
_WAIT_SECONDS = 330.0  # the Hub counts requests in windows of 300 seconds
_REDIRECTS = 4
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RESET = re.compile(r";\s*t\s*=\s*(\d+)")  # of the header "ratelimit", in seconds
_OK, _PARTIAL = 200, 206
_CODE = "x-error-code"
_OF_STORAGE = "storage"  # what we put there if a new address of the storage is refused
_MOVED = (301, 302, 303, 307, 308)
_REFUSED = (400, 401, 403, 410)  # what a storage answers when a signature is not valid any more
_MISSING, _TOO_SLOW, _BAD_RANGE, _TOO_MANY, _FAULT = 404, 408, 416, 429, 500
_LOGIN = "if it is private or gated, ask for access on its page, and log in with hf auth login"


def folder_at(address: str, options: Mapping[str, Any] | None = None) -> ObjectFolder:
    """Return the folder of objects at an address.

    Args:
        address: Where it is; see `residua.store.storage.address`.
        options: Arguments of obstore's store; of the Hub, ``token`` and ``endpoint``, which otherwise come from
            ``HF_TOKEN``, `hf auth login` and ``HF_ENDPOINT``.

    Raises:
        StorageError: The address or an option is not understood.
    """
    return (HubFolder if scheme_of(address) == "hf" else ObjectFolder)(address, options)


def hub_endpoint(options: Mapping[str, Any]) -> str:
    """Return where the Hub answers: of the options, or of the environment, as its own tools have it."""
    return str(options.get("endpoint") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token(options: Mapping[str, Any]) -> str:
    """Return the login: of the options, or the one that the Hub's own tools keep; empty if there is none."""
    if given := options.get("token") or os.environ.get("HF_TOKEN"):
        return str(given)
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("HF_HOME", f"{caches}/huggingface")).expanduser()
    path = Path(os.environ.get("HF_TOKEN_PATH", home / "token")).expanduser()
    return path.read_text().strip() if path.is_file() else ""


class HubFolder(ObjectFolder):
    """The objects below one ``hf://`` address, read-only. See the module's head, and `ObjectFolder`.

    Args:
        address: ``hf://datasets/ORG/NAME[@REVISION][/FOLDER]`` or ``hf://buckets/ORG/NAME[/FOLDER]``.
        options: ``token`` and ``endpoint``.
        tries: How often a request is made again after a failure that may pass.

    Attributes:
        place: What the address names.
        address: The address, with the commit that is read as soon as one is known.

    Raises:
        StorageError: The address or an option is not understood.
    """

    def __init__(self, address: str, options: Mapping[str, Any] | None = None, *, tries: int = 6) -> None:
        check_address(address)
        self._tries = tries
        self.options = dict(options or {})
        if unknown := sorted(set(self.options) - set(_OPTIONS)):
            raise StorageError(
                f"{shown(address)} does not take {', '.join(unknown)}: storage_options of the Hub are "
                f"{' and '.join(_OPTIONS)}"
            )
        self.place = hub_place(address)
        self.address = self.place.address
        self._signed: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()
        self._turns = [threading.Lock() for _ in range(_TURNS)]

    @property
    def commit(self) -> str | None:
        """The commit that is read; None before the first answer, and of buckets, which have none."""
        return self.place.revision if _COMMIT.fullmatch(self.place.revision) else None

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return a whole object; see `ObjectFolder.read`."""
        answer = self._get(name, {}, most_bytes)
        if answer.n_bytes > most_bytes:
            raise StorageError(f"{self}/{name} has {answer.n_bytes:,} bytes, and at most {most_bytes:,} are read there")
        return answer.body

    def read_range(self, name: str, start: int, stop: int) -> Bytes:
        """Return the bytes of a range of an object; see `ObjectFolder.read_range`."""
        answer = self._get(name, {"Range": f"bytes={start}-{stop - 1}"}, stop - start)
        if answer.status != _PARTIAL or len(answer.body) != stop - start:
            what = f"{len(answer.body):,} came" if answer.status == _PARTIAL else "the whole object was offered"
            raise StorageError(
                f"{self}/{name} was asked for bytes {start:,} to {stop:,}, and {what}: the object is cut short, or the "
                "server does not answer requests for ranges"
            )
        return np.frombuffer(answer.body, np.uint8)

    def size(self, name: str) -> int | None:
        """Return the bytes of an object, None if there is none."""
        try:
            answer = self._get(name, {"Range": "bytes=0-0"}, 1)
        except FileNotFoundError:
            return None
        total = answer.headers.get("content-range", "").rpartition("/")[2]
        return int(total) if total.isdecimal() else answer.n_bytes

    @property
    def _store(self) -> NoReturn:
        """Refused: what other methods would do there is committed together, and nothing is listed."""
        raise StorageError(
            f"{self} is not written or listed file by file: write to a folder, and send it with residua push"
        )

    def _get(self, name: str, headers: Mapping[str, str], most_bytes: int) -> Answer:
        """Return the answer that brings an object or a range of it; failures that may pass are tried again."""
        tries, waited = 0, 0.0
        while True:
            try:
                answer = self._once(name, headers, most_bytes)
            except Failure as error:
                problem, wait = f"{type(error).__name__}: {error}".removesuffix(": "), 0.0
            else:
                if answer.status in (_OK, _PARTIAL):
                    return answer
                problem, wait = self._problem(name, answer)
            tries += not wait
            wait = wait or 0.1 * 4.0 ** (tries - 1)
            waited += wait
            if tries > self._tries or waited > _WAIT_SECONDS:
                raise StorageError(f"cannot read {self}/{name}: {problem}, {tries + 1} times. Try again later")
            time.sleep(wait)

    def _once(self, name: str, headers: Mapping[str, str], most_bytes: int) -> Answer:
        """Ask once: the signed address if one is known, else the Hub, and the address that it names."""
        answer = None
        for _ in range(2):
            # Threads that want the same file wait until one of them has its address.
            with self._turns[hash(name) % len(self._turns)] if name not in self._signed else nullcontext():
                signed = self._signed.get(name)
                if signed is None:
                    answer = self._ask_hub(name, headers, most_bytes)
                    signed = self._signed.get(name) if answer is None else None
            if signed is None:
                break
            answer = self._follow(name, signed, headers, most_bytes)
            if answer.status not in _REFUSED:
                break
            self._forget(name, signed)  # its time is over
            answer = answer._replace(headers={**answer.headers, _CODE: _OF_STORAGE})
        if answer is None:
            raise StorageError(f"cannot read {self}/{name}: the server names no address of it")
        return answer

    def _ask_hub(self, name: str, headers: Mapping[str, str], most_bytes: int) -> Answer | None:
        """Return the Hub's answer; None if it names an address elsewhere, which is kept."""
        hub = hub_endpoint(self.options)
        url, host = f"{hub}{self.place.files}/{quote(name)}", urlsplit(hub)[:2]
        for _ in range(_REDIRECTS):
            answer = ask(url, {**headers, **self._login()}, most_bytes)
            self._pin(answer)
            if answer.status not in _MOVED:
                return answer
            url = self._moved(name, url, answer)
            if urlsplit(url)[:2] != host:
                self._keep(name, url)
                return None
        raise self._endless(name)

    def _follow(self, name: str, url: str, headers: Mapping[str, str], most_bytes: int) -> Answer:
        """Return the answer of the storage; the address that gives it is kept."""
        for _ in range(_REDIRECTS):
            answer = ask(url, headers, most_bytes)
            if answer.status not in _MOVED:
                return answer
            url = self._moved(name, url, answer)
            self._keep(name, url)
        raise self._endless(name)

    def _endless(self, name: str) -> StorageError:
        return StorageError(f"cannot read {self}/{name}: the server sends from one address to the next")

    def _keep(self, name: str, url: str) -> None:
        with self._lock:
            self._signed[name] = url
            if len(self._signed) > _SIGNED:
                self._signed.popitem(last=False)

    def _forget(self, name: str, url: str) -> None:
        with self._lock:
            if self._signed.get(name) == url:
                del self._signed[name]

    def _login(self) -> dict[str, str]:
        token = hub_token(self.options)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _pin(self, answer: Answer) -> None:
        """Keep to the commit that an answer of the Hub names."""
        commit = answer.headers.get("x-repo-commit", "")
        with self._lock:
            if self.place.kind == "datasets" and self.commit is None and _COMMIT.fullmatch(commit):
                self.place = self.place.at(commit)
                self.address = self.place.address

    def _moved(self, name: str, url: str, answer: Answer) -> str:
        target = urljoin(url, answer.headers.get("location", ""))
        old, new = urlsplit(url), urlsplit(target)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme != "https") or new.username:
            raise StorageError(
                f"cannot read {self}/{name}: {old.netloc} sends to {new.scheme}://{new.hostname}, which is not safe: "
                "check HF_ENDPOINT"
            )
        return target

    def _problem(self, name: str, answer: Answer) -> tuple[str, float]:
        """Return what an answer says, and the seconds to wait if it says so; raise the error if it will not pass."""
        code, status = answer.headers.get(_CODE, ""), answer.status
        said = answer.headers.get("x-error-message", "")
        problem = f"the server answered {status}" + (f" ({said[:200]})" if said else "")
        if status == _TOO_MANY:
            reset = _RESET.search(answer.headers.get("ratelimit", ""))
            seconds = answer.headers.get("retry-after") or (reset[1] if reset else "")
            more = "" if hub_token(self.options) else "; with a login (hf auth login) the Hub allows more of them"
            return f"{problem}, too many requests{more}", max(0.1, float(seconds)) if seconds.isdecimal() else 0.0
        if status >= _FAULT or status == _TOO_SLOW or code == _OF_STORAGE:
            return problem, 0.0
        if status == _BAD_RANGE:
            raise StorageError(f"{self}/{name} is shorter than its archive says: it was cut short or replaced")
        if status == _MISSING and code in ("", "EntryNotFound"):
            raise FileNotFoundError(f"there is no {self}/{name}")
        if code == "RevisionNotFound":
            raise StorageError(f"cannot read {self}: there is no revision {self.place.revision}: check it on its page")
        where = f"{hub_endpoint(self.options)}{self.place.page}"
        if code == "RepoNotFound" or status == _MISSING:
            raise StorageError(f"cannot read {self}: there is no {where}, or it is private: check the name; {_LOGIN}")
        if status in _REFUSED:
            raise StorageError(f"cannot read {self}/{name}: it is not allowed: {problem}. See {where}: {_LOGIN}")
        raise StorageError(f"cannot read {self}/{name}: {problem}")
