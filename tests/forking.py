"""Command lines in real processes that start at once: one process imports everything, then forks what tests ask for.

Importing torch takes seconds, which twenty killed captures cannot afford. The process has no threads when it forks.
Workers find each other as under torchrun, by `RANK`, `WORLD_SIZE` and an address. Nothing is reaped before the test
knows that all have ended, so a signal never goes to a process number that another process has by then.
"""

import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn
from unittest import mock

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
SECONDS = 300
STEPS = ("replace", "link", "fsync", "fdatasync", "rename", "mkdir", "unlink")
"""The calls of `os` that make files durable, each of which may be the last of a process."""
COMMAND = "residua"
LOST_SECONDS = 5.0
"""Time without a heartbeat after which these workers count as lost; by default it is 30."""
SOON = 150.0
"""Time within which the others have ended after one is killed or all are told to stop.

It is long enough for a busy machine, and far below the ten minutes after which a collective gives up.
"""


@dataclass(frozen=True, kw_only=True)
class Start:
    """How one worker starts.

    Attributes:
        words: Its command line.
        env: Its environment variables.
        module: What takes the command line: this command, or the module of a program that runs as with ``python -m``.
        slow: Time by which each call of a model takes longer, in seconds.
        die_at: Number of the call of `STEPS`, from 1, in which the process is killed; 0 for none.
        after: A file that has to exist before it begins.
    """

    words: Sequence[str]
    env: Mapping[str, str]
    module: str = COMMAND
    slow: float = 0
    die_at: int = 0
    after: str = ""


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative: the signal that ended it), what it printed, and its steps."""

    code: int
    output: str
    n_steps: int


def read_end(code: int, log: Path) -> Ended:
    """Return how a process ended that has written to `log`."""
    output, _, steps = log.read_text().partition("\nSTEPS ")
    return Ended(code, output, int(steps or 0))


def launched(words: Sequence[str], n: int, *, slow: float = 0, module: str = COMMAND) -> list[Start]:
    """Return `n` workers that are launched together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [Start(words=words, env={**common, "RANK": str(rank)}, slow=slow, module=module) for rank in range(n)]


class ForkedWorkers:
    """The process that forks.

    Args:
        folder: Where the workers' output goes.

    Attributes:
        pids: Process numbers of the workers that were started last.
        logs: Where their output goes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._n = 0
        self.pids: list[int] = []
        self.logs: list[Path] = []
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.forking import serve; serve()"],
            cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._answer() == "ready"

    def start(self, workers: Sequence[Start]) -> None:
        """Start `workers`; earlier workers must have ended."""
        self.logs = [self._folder / f"{self._n + i}.log" for i in range(len(workers))]
        self._n += len(workers)
        for log in self.logs:
            log.touch()  # a worker may be killed before it opens its own
        self._send([{**asdict(worker), "log": str(log)} for worker, log in zip(workers, self.logs, strict=True)])
        self.pids = self._answer()

    def kill(self, worker: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one worker, which may have ended."""
        os.kill(self.pids[worker], number)

    def wait(self, seconds: float = SECONDS) -> list[Ended]:
        """Return how the workers ended; after `seconds`, kill them and fail."""
        try:
            codes = self._answer(seconds)
        except AssertionError:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            self._answer()
            self._send("reap them")
            raise
        self._send("reap them")
        return [read_end(code, log) for code, log in zip(codes, self.logs, strict=True)]

    def run(self, workers: Sequence[Start], seconds: float = SECONDS) -> list[Ended]:
        """Run `workers` until they end."""
        self.start(workers)
        return self.wait(seconds)

    def close(self) -> None:
        """Tell the process to end; its input may stay open, in a child that a loader has forked from this one since."""
        with self._server:
            self._send("end")
            self._server.wait(SECONDS)

    def _send(self, message: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(message).encode() + b"\n")
        self._server.stdin.flush()

    def _answer(self, seconds: float = SECONDS) -> Any:
        assert self._server.stdout is not None
        ready = is_readable(self._server.stdout, seconds)
        said = [log.read_text()[-2000:] for log in self.logs]
        assert ready, f"no answer for {seconds} seconds; the workers said:\n" + "\n".join(said)
        return json.loads(self._server.stdout.readline())


def is_readable(stream: IO[bytes], seconds: float) -> bool:
    """Return whether `stream` has something to read, or has ended, within `seconds`."""
    with selectors.DefaultSelector() as selector:  # select() has no room for a process that maps a thousand files
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(seconds))


class Forks:
    """One command line at a time, from the process that forks."""

    def __init__(self, workers: ForkedWorkers) -> None:
        self._workers = workers

    def start(
        self, words: Sequence[str | Path], *, slow: float = 0, die_at: int = 0, env: Mapping[str, str] | None = None
    ) -> "Child":
        """Start ``residua`` with `words`; the options are those of `Start`."""
        self._workers.start([Start(words=[str(word) for word in words], env=env or {}, slow=slow, die_at=die_at)])
        return Child(self._workers)

    def run(self, words: Sequence[str | Path], **options: Any) -> Ended:
        """Run ``residua`` with `words` to its end."""
        return self.start(words, **options).wait()


@dataclass
class Child:
    """A child that runs."""

    workers: ForkedWorkers

    def send_signal(self, number: int) -> None:
        """Send a signal, which has no effect on a child that has ended."""
        self.workers.kill(0, number)

    def await_file(self, path: Path) -> None:
        """Return as soon as `path` exists."""
        deadline = time.monotonic() + SECONDS
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} never appeared:\n{self.workers.logs[0].read_text()}"
            time.sleep(0.005)

    def wait(self) -> Ended:
        """Return how the child ended."""
        [ended] = self.workers.wait()
        return ended


def serve() -> None:
    """Run the process that forks, until it is told to end, or its standard input ends."""
    gc.disable()  # while everything is imported
    import datasets  # noqa: F401  # so that no worker has to import it
    import transformers.integrations.deepspeed  # noqa: F401  # likewise

    import residua.pipelines.capture.capture
    import residua.pipelines.circuits.induction
    import residua.pipelines.circuits.sweep
    import residua.pipelines.cli.progress
    import residua.pipelines.replay.replay  # noqa: F401  # as above
    import tests.distributed.model_parallel.capture_cases
    import tests.distributed.workers.user_script  # noqa: F401  # as above
    from residua.capture.scheduling.membership import Membership

    defaults = Membership.__init__.__kwdefaults__
    assert defaults is not None
    defaults["lost_seconds"] = LOST_SECONDS
    assert len(threading.enumerate()) == 1
    share_memory()
    _say("ready")
    for line in iter(sys.stdin.readline, ""):
        if (requests := json.loads(line)) == "end":
            break
        pids = [_fork(request) for request in requests]
        _say(pids)
        ends = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT) for pid in pids]
        _say([end.si_status if end.si_code == os.CLD_EXITED else -end.si_status for end in ends if end is not None])
        sys.stdin.readline()
        for pid in pids:
            os.waitpid(pid, 0)


def _fork(request: dict[str, Any]) -> int:
    from residua.pipelines.cli.main import main

    pid = os.fork()
    if pid:
        return pid
    _become(request)
    while request["after"] and not Path(request["after"]).exists():
        time.sleep(0.01)
    if request["module"] != COMMAND:
        _run_program(request["module"], request["words"])
    code = 70
    try:
        code = main(request["words"])
        print(f"\nSTEPS {_n_steps}", flush=True)
    except BaseException:  # noqa: BLE001  # a child must not continue as its parent
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_program(module: str, words: Sequence[str]) -> NoReturn:
    """Run a user's own program, and end as Python does: an exception is printed, and threads are waited for."""
    rank, n_ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    os.environ |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n_ranks, "CUDA_VISIBLE_DEVICES": ""}
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


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
    gc.enable()


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
