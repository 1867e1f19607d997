"""Headless Chromium for tests, over the DevTools protocol on a pipe: one process, a tab for each page."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_DEADLINE = 30.0  # seconds, for a machine that has much to do


def browser_path() -> str:
    """Return the path of Chromium; skip the test if it is not installed."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium is installed (looked for {', '.join(_NAMES)}), in which pages are drawn")
    return found


class Tab:
    """A tab of the browser.

    Attributes:
        requests: Addresses that pages of it asked for.
        problems: What was logged as an error, uncaught exceptions among it.
    """

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser = browser
        self._session = session
        self.requests: list[str] = []
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol, and return its result."""
        return self._browser.send(method, self, self._session, **parameters)

    def open(self, address: str) -> None:
        """Load a page, and wait until it has drawn itself."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address)
        self.wait("document.documentElement.dataset.ready && document.querySelector('#view').children.length")

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true, and return its value; what throws is not true yet."""
        as_value = f"const found = {script}; return found instanceof Node ? true : found;"
        script = f"(() => {{ try {{ {as_value} }} catch {{ return null; }} }})()"
        end = time.monotonic() + _DEADLINE
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"{script} stays {found!r}; {self.problems}"
            time.sleep(0.02)
        return found

    def key(self, key: str) -> None:
        """Press a key."""
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=key if len(key) == 1 else "")
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def note(self, event: dict[str, Any]) -> None:
        """Keep what an event says."""
        parameters = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(str(parameters["entry"]))


class Browser:
    """A running browser."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._left = b""
        self._number = 0
        self._tabs: dict[str, Tab] = {}

    def tab(self) -> Tab:
        """Open a tab."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._tabs[session] = Tab(self, session)
        return self._tabs[session]

    def send(self, method: str, tab: Tab | None = None, session: str = "", **parameters: Any) -> Any:
        """Call a method of the protocol, and return its result; events until then go to their tabs."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        os.write(self._writing, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            owner = self._tabs.get(answer.get("sessionId", ""), tab)
            if "method" in answer and owner is not None:
                owner.note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            more = os.read(self._reading, 2**20)
            assert more, "Chromium has ended"
            self._left += more
        text, _, self._left = self._left.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        return found


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Run Chromium with its profile in `folder`; skip the test if it is not installed."""
    path = browser_path()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"]
    options += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}"]
    to_browser, from_here = os.pipe()
    to_here, from_browser = os.pipe()
    command = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    running = subprocess.Popen(
        ["bash", "-c", command, path, *options, "--remote-debugging-pipe", "about:blank"],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        browser = Browser(to_here, from_here)
        yield browser
        browser.send("Browser.close")
    finally:
        os.close(from_here)
        os.close(to_here)
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
