"""Command lines in real processes that start at once: one process imports everything, then forks a child a request.

Importing torch takes seconds, which twenty killed captures cannot afford. The process below has no threads when it
forks. A child is reaped only after the test knows that it ended, so its process id cannot go to another process.
"""

import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from unittest import mock

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
SECONDS = 300
STEPS = ("replace", "link", "fsync", "fdatasync", "rename", "mkdir", "unlink")
"""The calls of `os` that make files durable, each of which may be the last of a process."""


class Forks:
    """The process that forks; give it command lines.

    Args:
        folder: Where the children's output goes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._n = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.pipelines.forking import serve; serve()"],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.answer()

    def start(
        self, words: Sequence[str | Path], *, slow: float = 0, die_at: int = 0, env: Mapping[str, str] | None = None
    ) -> "Child":
        """Start ``residua`` with `words`.

        Args:
            words: The command line.
            slow: Seconds by which each call of a model is delayed.
            die_at: Number of the call of `STEPS`, from 1, in which the process is killed; 0 for none.
            env: What its environment has besides.
        """
        self._n += 1
        log = self._folder / f"{self._n}.log"
        log.touch()
        request = {"words": [str(word) for word in words], "slow": slow, "die_at": die_at, "env": dict(env or {})}
        self.send({**request, "log": str(log)})
        return Child(self, int(self.answer()), log)

    def run(self, words: Sequence[str | Path], **options: Any) -> "Ended":
        """Run ``residua`` with `words` to its end."""
        return self.start(words, **options).wait()

    def send(self, message: object) -> None:
        """Send one line to the process."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(message).encode() + b"\n")
        self._server.stdin.flush()

    def answer(self) -> Any:
        """Return the process's next message; fails if it takes too long."""
        assert self._server.stdout is not None
        assert is_readable(self._server.stdout, SECONDS), f"no answer for {SECONDS} seconds"
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._server.communicate(timeout=SECONDS)


def is_readable(stream: IO[bytes], seconds: float) -> bool:
    """Return whether `stream` has something to read, or has ended, within `seconds`."""
    with selectors.DefaultSelector() as selector:  # select() has no room for a process that maps a thousand files
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(seconds))


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (negative: the signal that ended it), what it printed, and its steps."""

    code: int
    output: str
    n_steps: int


@dataclass
class Child:
    """A child that runs."""

    forks: Forks
    pid: int
    log: Path

    def send_signal(self, number: int) -> None:
        """Send a signal, which has no effect on a child that has ended."""
        os.kill(self.pid, number)

    def await_file(self, path: Path) -> None:
        """Return as soon as `path` exists."""
        deadline = time.monotonic() + SECONDS
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} never appeared:\n{self.log.read_text()}"
            time.sleep(0.005)

    def wait(self) -> Ended:
        """Return how the child ended."""
        code = self.forks.answer()
        self.forks.send("reap it")
        output, _, steps = self.log.read_text().partition("\nSTEPS ")
        return Ended(code, output, int(steps or 0))


@contextmanager
def forking(folder: Path) -> Iterator[Forks]:
    """Start the process; it ends with the context."""
    forks = Forks(folder)
    try:
        yield forks
    finally:
        forks.close()


def serve() -> None:
    """Run the process that forks, until its standard input ends."""
    import datasets  # noqa: F401  # here, so that no child has to import it

    import residua.pipelines.capture.capture
    import residua.pipelines.cli.progress  # noqa: F401  # as above
    from residua.pipelines.cli.main import main

    assert len(threading.enumerate()) == 1
    share_memory()
    _say("ready")
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(request)
            code = main(request["words"])
            print(f"\nSTEPS {_n_steps}", flush=True)
            os._exit(code)
        _say(pid)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        _say(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        sys.stdin.readline()
        os.waitpid(pid, 0)


def share_memory() -> None:
    """Do what each child would do first when it loads a model, and keep it from looking at what is imported.

    transformers compiles a thousand regular expressions before the first checkpoint of a process is loaded.
    Garbage collection would copy every page of memory, and the end of a child would free it all, in eight seconds.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.llama import modeling_llama  # noqa: F401  # the model of most children

    get_checkpoint_conversion_mapping("llama")  # type: ignore[no-untyped-call]  # transformers has no annotations here
    gc.collect()
    gc.freeze()


def _say(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _become(request: dict[str, Any]) -> None:
    """Set up this child as requested: output, speed, and the step in which it is killed."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["env"])
    if request["slow"]:
        _slow_down(request["slow"])
    for name in STEPS:
        setattr(os, name, partial(_step, getattr(os, name), request["die_at"]))


def _slow_down(seconds: float) -> None:
    from residua.pipelines.capture import dataset_job
    from residua.pipelines.setup import models

    load = models.load_model

    def load_slow(*arguments: Any) -> Any:
        model = load(*arguments)
        model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
        return model

    for module in (dataset_job, models):
        mock.patch.object(module, "load_model", load_slow).start()


_n_steps = 0
_lock = threading.Lock()


def _step(call: Any, die_at: int, *arguments: Any, **options: Any) -> Any:
    global _n_steps
    with _lock:
        _n_steps += 1
        if _n_steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **options)
