"""`huggingface_hub` set up for the server of the tests: online, with the LFS protocol, and without long waits."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from huggingface_hub import constants

from tests.servers.hub import HubServer


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> None:
    """Let the Hub's own tools, and ours, take `hub` for the Hub, with its login."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    online(monkeypatch)


def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `huggingface_hub` make requests, and not use Xet, whose protocol no server here speaks."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    waits, sleep = 0.01, time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, waits)))


class StandInXet:
    """What `hf_xet` does for `huggingface_hub`, with the storage of the tests in place of Xet's.

    Args:
        hub: Where the contents go; their SHA-256 stands for Xet's own hash.
    """

    def __init__(self, hub: HubServer) -> None:
        self._hub = hub

    @contextmanager
    def new_upload_commit(self, **_: object) -> Iterator["StandInXet"]:
        """Take files until the context ends."""
        yield self

    def start_upload_file(self, path: str, **_: object) -> Any:
        """Take a file of this machine."""
        with open(path, "rb") as file:  # noqa: PTH123  # the client gives a text
            return self.start_upload_bytes(file.read())

    def start_upload_bytes(self, data: bytes, **_: object) -> Any:
        """Take bytes."""
        file = self._hub.add(data)
        self._hub.uploaded += len(data)
        info = json.loads(json.dumps({"hash": file.sha256, "file_size": len(data)}), object_hook=_Values)
        return _Values({"result": lambda: _Values({"xet_info": info})})


class _Values:
    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__ = dict(values)
