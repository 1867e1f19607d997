"""Azurite, Microsoft's own emulator of Azure Blob Storage, on loopback: used where it is installed (npm i azurite)."""

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from urllib.request import Request, urlopen

from tests.servers.clouds import CloudServer
from tests.servers.processes import SECONDS, await_answer, free_ports

COMMAND = "azurite-blob"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # the documented one
_VERSION = "2021-08-06"


def is_installed() -> bool:
    """Return whether there is an Azurite to run."""
    return shutil.which(COMMAND) is not None


@contextmanager
def serving_azurite(folder: Path) -> Iterator[CloudServer]:
    """Run Azurite with one container, and its data in `folder`, while the context lasts."""
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    words = [shutil.which(COMMAND) or COMMAND, "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    words += ["--location", str(folder), "--silent", "--skipApiVersionCheck"]
    cloud = CloudServer("az", options={"endpoint": endpoint, "account_name": ACCOUNT, "account_key": KEY})
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            await_answer(process, lambda: socket.create_connection(("127.0.0.1", port), 1).close(), "Azurite")
            _make_container(endpoint, cloud.bucket)
            yield cloud
        finally:
            process.kill()
            process.wait(timeout=SECONDS)


def _make_container(endpoint: str, name: str) -> None:
    """Make a container, with the signature that Azure's documentation describes (Shared Key)."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": _VERSION}
    signed = "\n".join(f"{key}:{value}" for key, value in headers.items())
    blank = "\n" * 12
    text = f"PUT{blank}{signed}\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
    urlopen(Request(f"{endpoint}/{name}?restype=container", method="PUT", headers=headers), timeout=10).close()  # noqa: S310
