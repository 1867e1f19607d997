"""Requests to a web server, one at a time a thread: connections are kept open, bodies are bounded, nothing is followed.

It is for servers whose answers have to be seen (redirects, limits on requests), which obstore hides. Proxies and
certificates come from the environment, as for Python's own `urllib`. Connections belong to one process.
"""

import atexit
import http.client
import os
import ssl
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

_SECONDS = 60
_IDLE = 32  # connections that are kept open for each host

Failure = (OSError, http.client.HTTPException)
"""What a request raises if no whole answer came."""


class Answer(NamedTuple):
    """What a server answered.

    Attributes:
        status: The status code.
        headers: The headers, by their names in lower case.
        body: The body, if it is not larger than was allowed.
        n_bytes: Its bytes, as far as they are known.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    n_bytes: int


class _Host(NamedTuple):
    scheme: str
    name: str
    pid: int


_lock = threading.Lock()
_idle: dict[_Host, list[http.client.HTTPConnection]] = defaultdict(list)


def ask(url: str, headers: Mapping[str, str], most_bytes: int) -> Answer:
    """Return the answer to a GET, whatever its status; redirects are not followed.

    Args:
        url: An address with http: or https:.
        headers: Headers of the request.
        most_bytes: Largest body of an answer that brings what was asked for (status 200 or 206); a larger one is not
            read, and its body is empty. Of other answers, the beginning is read.

    Raises:
        OSError: No connection, or it broke; `Failure` has all classes.
        http.client.HTTPException: The answer is cut short, or is none.
    """
    parts = urlsplit(url)
    host = _Host(parts.scheme, parts.netloc, os.getpid())
    proxy = _proxy(host)
    target = parts._replace(scheme="", netloc="", path=parts.path or "/", fragment="").geturl()
    if proxy and host.scheme == "http":
        target = url  # a proxy is asked for whole addresses
    with _lock:
        kept = _idle[host].pop() if _idle[host] else None
    if kept is not None:
        try:
            return _exchange(kept, host, target, headers, most_bytes)
        except Failure:
            kept.close()  # the server may have closed it meanwhile: once more, with a new connection
    connection = _connected(host, proxy)
    try:
        return _exchange(connection, host, target, headers, most_bytes)
    except BaseException:
        connection.close()
        raise


def _exchange(
    connection: http.client.HTTPConnection, host: _Host, target: str, headers: Mapping[str, str], most_bytes: int
) -> Answer:
    connection.request("GET", target, headers={"User-Agent": "residua", **headers})
    response = connection.getresponse()
    found = {name.lower(): value for name, value in response.getheaders()}
    brings, length = response.status in (http.client.OK, http.client.PARTIAL_CONTENT), response.length or 0
    body = b""
    if not brings or length <= most_bytes:
        body = response.read(most_bytes + 1)  # of an answer without a length
        if brings and len(body) < length:
            raise http.client.IncompleteRead(body, length - len(body))
    answer = Answer(response.status, found, body, max(length, len(body)))
    if response.isclosed() and not response.will_close:
        with _lock:
            if len(_idle[host]) < _IDLE:
                _idle[host].append(connection)
                return answer
    connection.close()
    return answer


def _proxy(host: _Host) -> str:
    """Return the proxy of the environment for a host, as HOST:PORT; empty for none."""
    proxy = urllib.request.getproxies().get(host.scheme, "")
    if not proxy or urllib.request.proxy_bypass(urlsplit(f"//{host.name}").hostname or ""):
        return ""
    return urlsplit(proxy if "//" in proxy else f"//{proxy}").netloc.rpartition("@")[2]


def _connected(host: _Host, proxy: str) -> http.client.HTTPConnection:
    if host.scheme == "http":
        return http.client.HTTPConnection(proxy or host.name, timeout=_SECONDS)
    connection = http.client.HTTPSConnection(proxy or host.name, timeout=_SECONDS, context=_context())
    if proxy:
        connection.set_tunnel(host.name)
    return connection


@atexit.register
def _close() -> None:
    """Close kept connections when the process ends."""
    for kept in _idle.values():
        for connection in kept:
            connection.close()


@lru_cache(maxsize=1)
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()
